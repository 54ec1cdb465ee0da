"""The ledger holds every row whenever it was seen, with the loss and margin of a hand computation, and nothing else."""

import copy
import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_trainer import OBJECTIVES, config, objective_of, random_rows, small_config, small_model
from test_trainer import rows as rows_of

from dpo.diagnostics import Facts
from dpo.logprobs import gather_logps
from dpo.metrics import Means
from dpo.objective import Objective
from dpo.preference import PreferenceObjective
from dpo.run import RunDir
from dpo.tokens import Encoded
from dpo.trainer import Trainer
from dpo.watch import Watch
from models.stream import pack
from models.transformer import Transformer
from train import train


def trainer_of(
    folder: Path, rows: list[Encoded], build=OBJECTIVES["sigmoid"], cut=(2, 2), steps=4, held_out=(), facts=None
) -> Trainer:
    """In float64, at a constant rate; a log after every second update."""
    cfg = copy.deepcopy(small_config())
    cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps = cut
    cfg.max_steps, cfg.logging_steps, cfg.save_strategy, cfg.eval_strategy = steps, 2, "no", "no"
    policy = small_model(0).requires_grad_(True)
    run_dir = RunDir(folder, overwrite=False, resume=False)
    return Trainer(cfg, policy, build(policy), rows, list(held_out), run_dir, Path("unused"), facts=facts)


def ledger(folder: Path) -> list[dict]:
    file = folder / "ledger.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def logp(model: Transformer, prompt: list[int], response: list[int]) -> float:
    """log pi(response | prompt) by the plain forward pass of one row."""
    with torch.no_grad():
        stream = pack([prompt], [[response]])
        hidden_TD = model(stream)
        return float(gather_logps(hidden_TD[stream.predictor_R], model.head_weight_VD, torch.tensor(response)).sum())


def ratios(policy: Transformer, row: Encoded) -> list[float]:
    """log pi - log pi_ref of each response; the reference is objective_of's."""
    reference = small_model(1)
    return [logp(policy, row.prompt_ids, ids) - logp(reference, row.prompt_ids, ids) for ids in row.response_ids]


# --- what a line says ---


def test_every_row_has_a_line_for_each_of_its_visits(tmp_path):
    """8 rows in batches of 4, shuffled: 5 updates are two epochs and a half."""
    trainer = trainer_of(tmp_path, random_rows(8), steps=5)
    trainer.train()
    lines = ledger(tmp_path)
    assert [line["step"] for line in lines] == [step for step in range(1, 6) for _ in range(4)]
    assert {line["split"] for line in lines} == {"train"}
    for step in range(5):
        rows = [f"rows:{i + 1}" for i in trainer.plan.indices(step)]
        assert [line["source"] for line in lines if line["step"] == step + 1] == rows
    visits = Counter(line["source"] for line in lines)
    assert sorted(visits.values()) == [2] * 4 + [3] * 4


def test_loss_and_margin_are_those_of_the_policy_that_had_not_learned_from_the_row_yet(tmp_path):
    """-log sigmoid(x) of each row alone, x = 0.3 (a - b), before the first update and before the second."""
    rows = random_rows(8)
    build = lambda policy: objective_of(policy, ["hinge"])
    trainer = trainer_of(tmp_path, rows, build, steps=2)
    by_source = {row.example.source: row for row in rows}
    expected = []
    update = trainer.update

    def noting(batch, *rest):
        expected.extend(0.3 * (a - b) for a, b in (ratios(trainer.policy, row) for row in batch))
        return update(batch, *rest)

    trainer.update = noting
    trainer.train()
    lines = ledger(tmp_path)
    assert {line["source"] for line in lines} == set(by_source)
    assert [line["margin"] for line in lines] == pytest.approx(expected, rel=1e-9)
    assert [line["loss"] for line in lines] == pytest.approx([max(0, 1 - x) for x in expected], rel=1e-9)
    assert min(map(abs, expected)) > 1e-3


def test_an_unpaired_row_has_its_reward_negative_where_it_is_undesirable(tmp_path):
    rows = random_rows(8)
    build = lambda policy: objective_of(policy, ["apo_zero_unpaired"])
    trainer = trainer_of(tmp_path, rows, build, steps=1, cut=(8, 1))
    expected = {row.example.source: 0.3 * ratios(trainer.policy, row)[0] for row in rows}
    for row in rows:
        expected[row.example.source] *= 1 if row.example.label else -1
    trainer.train()
    assert {line["source"]: line["margin"] for line in ledger(tmp_path)} == pytest.approx(expected, rel=1e-9)
    assert {row.example.label for row in rows} == {True, False}


def test_held_out_rows_are_of_the_eval_split_with_the_updates_made(tmp_path):
    rows, held_out = random_rows(4), random_rows(9)[4:]
    trainer = trainer_of(tmp_path, rows, held_out=held_out, steps=2)
    trainer.cfg.eval_on_start = True
    expected = {row.example.source: 0.3 * (a - b) for row in held_out for a, b in [ratios(trainer.policy, row)]}
    trainer.train()
    trainer.evaluate()
    lines = [line for line in ledger(tmp_path) if line["split"] == "eval"]
    assert [line["step"] for line in lines] == [0] * 5 + [2] * 5
    assert {line["source"]: line["margin"] for line in lines[:5]} == pytest.approx(expected, rel=1e-9)
    assert {line["source"] for line in lines[5:]} == set(expected)
    assert [line["margin"] for line in lines[5:]] != [line["margin"] for line in lines[:5]]


def test_sft_writes_none(tmp_path):
    trainer = trainer_of(tmp_path, random_rows(4), OBJECTIVES["stage=sft"], steps=2)
    trainer.train()
    assert not (tmp_path / "ledger.jsonl").exists() and (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["sigmoid", "aot", "kto", "dr_dpo", "beta_dpo"])
def test_the_cut_into_micro_batches_does_not_show(tmp_path, name):
    """Of losses that couple rows too, which are computed on the batch as a whole."""
    ledgers = []
    for cut in ((8, 1), (3, 3), (1, 8)):
        folder = tmp_path / str(cut[0])
        trainer_of(folder, random_rows(8), OBJECTIVES[name], cut=cut, steps=2).train()
        ledgers.append(ledger(folder))
    for lines in ledgers[1:]:
        for line, expected in zip(lines, ledgers[0], strict=True):
            assert line == expected | {key: pytest.approx(expected[key], rel=1e-8) for key in ("loss", "margin")}
    assert len(ledgers[0]) == 16


# --- what did not happen has no line ---


def spoilt(build, when: set[int]):
    """The objective, whose losses are not finite in some updates, counted from 1, in their second micro-batch."""

    def built(policy: Transformer) -> Objective:
        objective = build(policy)
        assert isinstance(objective, PreferenceObjective)
        losses, calls = objective.losses, [0]

        def spoil(measured):
            calls[0] += 1
            step, second = divmod(calls[0] + 1, 2)
            return losses(measured) * (math.nan if step in when and second else 1)

        objective.losses = spoil
        return objective

    return built


def test_a_skipped_update_leaves_no_line(tmp_path):
    """Its first micro-batch had been seen already."""
    trainer_of(tmp_path, random_rows(8), spoilt(OBJECTIVES["sigmoid"], {2}), steps=3).train()
    assert [line["step"] for line in ledger(tmp_path)] == [1] * 4 + [3] * 4
    assert all(math.isfinite(line["loss"]) for line in ledger(tmp_path))


def test_a_gradient_that_is_not_finite_leaves_no_line(tmp_path):
    trainer = trainer_of(tmp_path, random_rows(8), steps=3)
    weight = trainer.parameters[0]
    weight.register_hook(lambda gradient: gradient * (math.inf if trainer.step == 1 else 1))
    trainer.train()
    assert [line["step"] for line in ledger(tmp_path)] == [1] * 4 + [3] * 4


def test_a_run_that_ends_at_the_third_bad_update_has_the_lines_of_those_before(tmp_path):
    """No log, evaluation or checkpoint came before the end, and what the rows looked like is what one wants to know."""
    trainer = trainer_of(tmp_path, random_rows(8), spoilt(OBJECTIVES["sigmoid"], {3, 4, 5}), steps=8)
    trainer.cfg.logging_steps = 8
    with pytest.raises(ValueError, match="in the third update in a row"):
        trainer.train()
    assert [line["step"] for line in ledger(tmp_path)] == [1] * 4 + [2] * 4


class StopAt:
    """A StopRequest that hears a signal when the trainer asks for the n-th time."""

    exit_status = 143

    def __init__(self, asked: int):
        self.left = asked

    @property
    def signal(self) -> signal.Signals | None:
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


def test_an_interrupted_update_leaves_no_line(tmp_path, monkeypatch):
    """Asked at each micro-batch and after each update: the fifth time is between the two of the second update."""
    trainer = trainer_of(tmp_path, random_rows(8), steps=4)
    monkeypatch.setattr("dpo.trainer.save_checkpoint", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        trainer.train(StopAt(4))
    assert [line["step"] for line in ledger(tmp_path)] == [1] * 4
    assert trainer.watch.window.state()["loss"][1] == 4


# --- a run that goes on ---

RESUMED = [
    "max_samples=12", "max_steps=6", "save_steps=2", "logging_steps=3", "learning_rate=1e-3", "lora_dropout=0.1",
    "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "val_size=4", "eval_strategy=steps",
    "eval_steps=2", "num_samples=2", "max_new_tokens=4", "warmup_ratio=0",
]  # fmt: skip
LOGS = ("ledger.jsonl", "samples.jsonl")


@pytest.mark.slow
def test_a_resumed_run_has_the_ledger_and_samples_of_the_uninterrupted_one_to_the_byte(tmp_path):
    """From step 2 of 6, between two logs; later lines, and one cut short, are taken back."""
    run = tmp_path / "run"
    train(config(run, *RESUMED))
    expected, metrics = {name: (run / name).read_bytes() for name in LOGS}, rows_of(run)
    for later in ("checkpoint-6", "checkpoint-4"):
        shutil.rmtree(run / later)
    for name in LOGS:
        (run / name).write_bytes(expected[name] + b'{"step": 7, "so')
    train(config(run, *RESUMED, "resume_from_checkpoint=true"))
    assert {name: (run / name).read_bytes() for name in LOGS} == expected and rows_of(run) == metrics
    steps = Counter((line["split"], line["step"]) for line in ledger(run))
    assert steps == {("train", s): 4 for s in range(1, 7)} | {("eval", s): 4 for s in (2, 4, 6)}


# --- the watch alone ---


def test_back_to_a_mark_forgets_window_and_lines_since(tmp_path):
    run_dir, rows = RunDir(tmp_path, overwrite=False, resume=False), random_rows(2)
    watch = Watch(run_dir, None)
    for loss in (1.0, 3.0):
        mark = watch.mark()
        watch.window.add({"loss": torch.tensor([loss, loss])})
        watch.saw(1, "train", rows, torch.tensor([loss, loss]), torch.tensor([0.5, -0.5]))
    watch.back_to(mark)
    watch.flush()
    assert watch.window.means() == {"loss": 1}
    assert ledger(tmp_path) == [
        {"step": 1, "split": "train", "source": f"rows:{i}", "loss": 1, "margin": m} for i, m in ((1, 0.5), (2, -0.5))
    ]
    watch.flush()
    assert len(ledger(tmp_path)) == 2


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    """Of a held-out row: training skips it."""
    watch = Watch(RunDir(tmp_path, overwrite=False, resume=False), None)
    watch.saw(1, "eval", random_rows(1), torch.tensor([math.nan]), torch.tensor([math.inf]))
    watch.flush()
    assert (ledger(tmp_path)[0]["loss"], ledger(tmp_path)[0]["margin"]) == (None, None)


def saturated(step: int) -> dict[str, float]:
    return {"step": step, "loss": 0.001, "learning_rate": 1e-6, "grad_norm": 1.0}


def facts(**changed) -> Facts:
    return Facts(
        **{"beta": 0.1, "has_reference": True, "start": math.log(2), "total_steps": 9, "held_out": 0} | changed
    )


def test_an_alarm_is_said_once_and_not_again_after_a_resume(tmp_path):
    run_dir, said = RunDir(tmp_path, overwrite=False, resume=False), []
    watch = Watch(run_dir, facts())
    watch.log(saturated(1), said.append)
    watch.log(saturated(2), said.append)
    resumed = Watch(run_dir, facts())
    resumed.resume({"loss": [1.5, 3]})
    resumed.log(saturated(3), said.append)
    assert len(said) == 1 and said[0].startswith("warning: saturation at step 1: the loss is 0.001, ")
    assert resumed.diagnosis.alarms == watch.diagnosis.alarms
    assert resumed.window.means() == Means({"loss": [1.5, 3]}).means() == {"loss": 0.5}


def test_without_facts_nothing_is_diagnosed(tmp_path):
    said = []
    watch = Watch(RunDir(tmp_path, overwrite=False, resume=False), None)
    watch.log(saturated(1), said.append)
    watch.resume({})
    assert watch.diagnosis is None and said == []

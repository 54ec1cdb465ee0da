"""The training loop: how a batch is cut does not show, a seed determines a run, a resume continues it exactly."""

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import test_losses
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from dpo import trainer as trainer_module
from dpo.build import WORLD
from dpo.checkpoint import trainable
from dpo.formats import Example
from dpo.losses import OFF, PREF_LOSSES, PrefLoss
from dpo.metrics import TIMING_KEYS
from dpo.objective import Objective, evaluate
from dpo.plan import Plan, cut_by_tokens
from dpo.preference import PreferenceObjective, preference_loss
from dpo.reference import frozen_reference
from dpo.sft import SFTObjective
from dpo.tokens import Encoded
from dpo.trainer import Trainer, _Clock
from dpo.unpaired import UnpairedObjective
from models.config import parse_model_config
from models.lora import inject_lora
from models.transformer import Transformer
from models.weights import read_tensors
from train import train

LAWS = [
    test_losses.test_a_loss_is_per_pair_unless_it_couples,
    test_losses.test_a_step_from_the_start_pushes_each_side_as_declared,
    test_losses.test_gradients_are_autograds_own,
    test_losses.test_a_loss_on_the_margin_reads_only_the_difference,
    partial(test_losses.test_the_start_is_the_loss_where_policy_equals_reference, beta=0.5),
    partial(test_losses.test_a_loss_that_falls_falls_everywhere, beta=0.5),
]
CONF = str(Path(__file__).parent.parent / "conf")
SMALL = [
    "max_samples=24", "max_steps=3", "logging_steps=1", "num_samples=0", "eval_dataset=null", "device=cpu",
    "plot_loss=false",
]  # fmt: skip


def config(output_dir: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", [*SMALL, f"output_dir={output_dir}", *overrides])


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "adapter_model.safetensors")


# --- the cut of a batch, in float64, for every loss ---

MODEL = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
# Rows per micro-batch, how many of them; and tokens, which stand before both: rows have 3 to 18.
CUTS = [(8, 1), (2, 4), (3, 3), (1, 8), (1, 8, 25)]


@lru_cache(maxsize=1)
def small_config() -> DictConfig:
    return config(Path("unused"), "lr_scheduler_type=constant", "learning_rate=1e-2", "max_grad_norm=1.0")


def small_model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(parse_model_config(MODEL), torch.float64).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)  # or the lengths alone would order the margins
    return model


def random_rows(count: int, **numbers: float) -> list[Encoded]:
    """Pairs of random tokens, 1 to 6 a response."""
    draw = random.Random(0)

    def ids() -> list[int]:
        return [draw.randrange(23) for _ in range(draw.randint(1, 6))]

    examples = [
        Example((), ("", ""), f"rows:{i}", label=i % 3 > 0, **{key: i * value for key, value in numbers.items()})
        for i in range(1, count + 1)
    ]
    return [Encoded(ids(), (ids(), ids()), example, 0, (False, False)) for example in examples]


def objective_of(policy: Transformer, names: Sequence[str], **terms: object) -> PreferenceObjective:
    options = OFF | {"beta": 0.3, "label_smoothing": 0.1, "tau": 0.7, "gamma": 0.4}
    read = {option for name in names for option in PREF_LOSSES[name].options} | {"beta"}
    loss = preference_loss(names, None, {k: v if k in read else OFF[k] for k, v in options.items()}, **terms)
    return (UnpairedObjective if loss.unpaired else PreferenceObjective)(loss, frozen_reference(small_model(1)))


def three_updates(
    rows: list[Encoded], cut: tuple[int, ...], objective: Callable[[Transformer], Objective], dropout: float = 0.0
) -> list[Tensor]:
    """The weights after three updates on the same batch, and the gradient norm and metrics of each."""
    policy = small_model(0).requires_grad_(True)
    if dropout:
        inject_lora(policy, rank=2, alpha=4, use_rslora=False, dropout=dropout, target="all", seed=0)
        policy.double()
    cfg = copy.deepcopy(small_config())
    cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps, *budget = cut
    cfg.max_tokens_per_micro_batch = budget[0] if budget else None
    trainer = Trainer(cfg, policy, objective(policy), rows, [], None, Path("unused"))
    seen = []
    for _ in range(3):
        _, norm = trainer.update(rows, _Clock())
        trainer.state.step += 1
        seen.append(norm)
    weights = [tensor.detach() for _, tensor in sorted(trainable(policy).items())]
    return [*weights, *seen, torch.tensor(list(trainer.watch.window.means().values()), dtype=torch.float64)]


OBJECTIVES: dict[str, Callable[[Transformer], Objective]] = {
    name: lambda policy, name=name: objective_of(policy, [name]) for name in PREF_LOSSES
} | {
    "both unpaired": lambda policy: objective_of(policy, ["kto", "apo_zero_unpaired"]),
    "combination": lambda policy: objective_of(policy, ["sigmoid", "aot", "kto_pair", "sft"]),
    "terms": lambda policy: objective_of(policy, ["sigmoid"], pref_ftx=0.5, dpop_lambda=2.0, len_reg_alpha=0.1,
                                         ld_alpha=0.5, f_divergence_type="js_divergence"),
    "coupled terms": lambda policy: objective_of(policy, ["sigmoid", "aot"], pref_ftx=0.5, dpop_lambda=2.0,
                                                 ld_alpha=0.5),
    "dr_dpo": lambda policy: objective_of(policy, ["sigmoid"], pref_ftx=0.5, dr_dpo_beta=0.5),
    "beta_dpo": lambda policy: objective_of(policy, ["sigmoid", "nca_pair"], len_reg_alpha=0.1, beta_dpo_alpha=0.6),
    "wpo": lambda policy: objective_of(policy, ["sigmoid", "simpo"], ld_alpha=0.5, use_weighting=True),
    "wpo, coupled": lambda policy: objective_of(policy, ["sigmoid"], beta_dpo_alpha=0.6, use_weighting=True),
    "stage=sft": lambda policy: SFTObjective(),
}  # fmt: skip


# What no option or coupling tells apart is cut alike; one of it stands for the others.
LIKE_SIGMOID = {name for name, loss in PREF_LOSSES.items() if name != "sigmoid" and not loss.couples}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_SIGMOID else []) for name in OBJECTIVES]
)
def test_no_objective_shows_how_its_batch_was_cut(name):
    """8 x 1, 2 x 4, 3 x 3 (the last of 2), 1 x 8, by tokens: weights, gradient norms, metrics to 1e-9 in 3 updates."""
    rows = random_rows(8)
    if name == "stage=sft":
        rows = [replace(row, response_ids=row.response_ids[:1]) for row in rows]
    expected = three_updates(rows, CUTS[0], OBJECTIVES[name])
    for cut in CUTS[1:]:
        torch.testing.assert_close(three_updates(rows, cut, OBJECTIVES[name]), expected, rtol=1e-9, atol=1e-9)


def test_a_cut_by_tokens_is_in_order_and_within_its_limit_unless_a_row_is_longer():
    """Of 9, 2, 3, 9, 1 and 4 tokens at most 5 go together: 2 and 3, 1 and 4; 9 is too long for any."""
    lengths = (9, 2, 3, 9, 1, 4)
    rows = [replace(row, prompt_ids=[1], response_ids=([1] * (n - 1),))
            for row, n in zip(random_rows(6), lengths, strict=True)]  # fmt: skip
    parts = cut_by_tokens(rows, 5)
    assert [[row.tokens for row in part] for part in parts] == [[9], [2, 3], [9], [1, 4]]
    assert [row for part in parts for row in part] == rows


def test_a_micro_batch_has_no_more_tokens_than_it_may(monkeypatch):
    seen = []
    pack = trainer_module.to_stream
    monkeypatch.setattr(
        trainer_module,
        "to_stream",
        lambda rows, device: seen.append(sum(row.tokens for row in rows)) or pack(rows, device),
    )
    rows = random_rows(8)
    three_updates(rows, (1, 8, 25), OBJECTIVES["sigmoid"])
    assert 8 < max(seen) <= 25 and sum(seen) == 3 * sum(row.tokens for row in rows) and len(seen) < 3 * 8


def test_rows_with_numbers_of_their_own_do_not_show_the_cut_either():
    rows = random_rows(8, weight=0.3, margin=0.2, soft_label=0.1)
    results = [three_updates(rows, cut, OBJECTIVES["sigmoid"]) for cut in CUTS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)
    plain = three_updates(random_rows(8), CUTS[0], OBJECTIVES["sigmoid"])
    assert abs(plain[-1][0] - results[0][-1][0]) > 1e-3


def as_if(couples: bool, name: str) -> Callable[[Transformer], Objective]:
    """The objective of a loss, taken by the other path of the trainer."""

    def build(policy: Transformer) -> Objective:
        objective = OBJECTIVES[name](policy)
        objective.couples = couples
        return objective

    return build


@pytest.mark.parametrize("name", [*(name for name, loss in PREF_LOSSES.items() if loss.couples), "dr_dpo", "beta_dpo"])
def test_a_coupled_loss_would_show_the_cut_if_each_micro_batch_were_on_its_own(name):
    """So that the test above can fail."""
    whole, alone = (three_updates(random_rows(8), (2, 4), build) for build in (OBJECTIVES[name], as_if(False, name)))
    assert abs(whole[-1][0] - alone[-1][0]) > 1e-4
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(whole[:-1], alone[:-1], strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_coupled_path_is_the_plain_one_for_a_loss_that_does_not_couple(dropout):
    """With dropout too: what is measured without gradient is measured again with the same units dropped."""
    rows = random_rows(8)
    plain = three_updates(rows, (2, 4), OBJECTIVES["sigmoid"], dropout)
    coupled = three_updates(rows, (2, 4), as_if(True, "sigmoid"), dropout)
    torch.testing.assert_close(coupled, plain, rtol=1e-9, atol=1e-9)


def test_an_evaluation_of_a_coupled_loss_is_of_all_rows_at_once():
    policy, rows = small_model(0), random_rows(7)
    for name in ("aot", "aot_unpaired", "kto_pair", "sft", "combination", "dr_dpo", "beta_dpo"):
        metrics = [evaluate(policy, OBJECTIVES[name](policy), rows, size) for size in (7, 3, 1)]
        for other in metrics[1:]:
            assert other | {"eval_runtime": 0} == pytest.approx(metrics[0] | {"eval_runtime": 0}, rel=1e-9)


# --- runs on the built-in world ---


def test_a_loss_of_ones_own_is_a_function_and_a_row_of_the_table(tmp_path, monkeypatch):
    """Squared hinge, which nobody else knows of: 1 at the start, trained, and refused what it does not read."""

    def squared_hinge(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
        return (1 - beta * (chosen_logratios - rejected_logratios)).relu().square()

    row = PrefLoss(squared_hinge, "max(0, 1 - x)^2", "arXiv:0000.00000", start=lambda beta: 1.0, on_margin=True)
    monkeypatch.setitem(PREF_LOSSES, "squared_hinge", row)
    train(config(tmp_path / "run", "pref_loss=squared_hinge", "max_steps=2", "learning_rate=1e-2", "warmup_ratio=0"))
    first, second = rows(tmp_path / "run")
    assert first["loss"] == pytest.approx(row.start(beta=1.0)) and second["loss"] != first["loss"]
    train(config(tmp_path / "both", "pref_loss=[squared_hinge,sigmoid]", "dpop_lambda=1", "max_steps=1"))
    assert rows(tmp_path / "both")[0]["loss"] == pytest.approx(1.6931472, abs=1e-6)
    with pytest.raises(ValueError, match=r"dpo_label_smoothing=0\.1: not read by pref_loss=squared_hinge"):
        train(config(tmp_path / "bad", "pref_loss=squared_hinge", "dpo_label_smoothing=0.1"))
    for law in LAWS:
        law("squared_hinge")


def test_rows_that_the_loss_cannot_honour_stop_the_run_before_its_first_step(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"margin": 1.5}) + "\n")
    data = f"dataset={tmp_path / 'rows.jsonl'}"
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: margin=1\.5: pref_loss=bco_pair cannot honour it"):
        train(config(tmp_path / "run", data, "pref_loss=bco_pair"))
    assert not (tmp_path / "run").exists()
    train(config(tmp_path / "run", data, "max_steps=1"))
    # beta 1: the mean of log 2 and log(1 + exp(1.5)).
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx((math.log(2) + math.log1p(math.exp(1.5))) / 2)


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("[sigmoid,aot]", marks=pytest.mark.slow)])
def test_the_cut_into_micro_batches_does_not_show(tmp_path, loss):
    """8 x 1, 2 x 4 and 1 x 8 are one logical batch of 8. float32 adds up in another order, which Adam magnifies."""
    results = []
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        cut = [f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulate}", f"pref_loss={loss}"]
        train(config(tmp_path / f"{size}", *cut))
        results.append((rows(tmp_path / f"{size}"), adapter(tmp_path / f"{size}")))
    for metrics, weights in results[1:]:
        for row, expected in zip(metrics, results[0][0], strict=True):
            assert row == pytest.approx(expected, rel=2e-5, abs=2e-6)
        assert metrics[0] == pytest.approx(results[0][0][0], rel=2e-6, abs=2e-6)  # before Adam's first step
        for name, tensor in weights.items():
            # Adam's first steps are sign-like: a gradient of 1e-9 that changes in its last digits moves by a whole
            # learning rate times that relative change, so weights agree less closely than losses.
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-3, atol=5e-5)


def test_the_cut_does_not_show_in_sft_either(tmp_path):
    """The loss is the mean over the logical batch's response tokens, not a mean of micro-batch means."""
    for size, accumulate in ((8, 1), (2, 4)):
        cut = [f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulate}", "stage=sft"]
        train(config(tmp_path / f"{size}", *cut))
    for row, expected in zip(rows(tmp_path / "2"), rows(tmp_path / "8"), strict=True):
        assert row == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_sft_refuses_a_rows_numbers_in_training_and_held_out_rows(tmp_path):
    """It would ignore them. What says nothing is no such number."""
    turns = '"prompt": "Name a cat.", "chosen": "Tom."'
    (tmp_path / "plain.jsonl").write_text(f'{{{turns}, "weight": 1, "margin": 0, "soft_label": null}}\n' * 2)
    plain = [f"dataset={tmp_path / 'plain.jsonl'}", "stage=sft", "max_steps=1"]
    train(config(tmp_path / "run", *plain))
    for number in ("weight=0.5", "margin=2.0", "soft_label=1.0"):
        key, _, value = number.partition("=")
        file = tmp_path / f"{key}.jsonl"
        file.write_text(f'{{{turns}}}\n{{{turns}, "{key}": {value}}}\n')
        for where in ("dataset", "eval_dataset"):
            with pytest.raises(ValueError, match=f"{key}.jsonl:2: {number}: stage=sft cannot honour it; remove it"):
                train(config(tmp_path / key, *plain, f"{where}={file}"))
        assert not (tmp_path / key).exists()


def test_a_seed_determines_the_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config(tmp_path / name, f"seed={seed}", "lora_dropout=0.1", "per_device_train_batch_size=4"))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


@pytest.mark.parametrize("moves", [[], ["sync_ref_model=true", "ref_model_sync_steps=2"]], ids=["", "sync_ref_model"])
@pytest.mark.parametrize(
    "kind",
    [
        "finetuning_type=lora",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("finetuning_type=full", "beta_dpo_alpha=0.6")),
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, kind, moves):
    """From step 2 of 6, where a reference that moves has moved once."""
    common = [
        kind,
        *moves,
        "max_steps=6",
        "save_steps=2",
        "lora_dropout=0.1",
        "logging_steps=3",
        "per_device_train_batch_size=4",
        "warmup_ratio=0",  # or the first update would change nothing, and the objective's state after two be 0
    ]
    learning = "learning_rate=1e-5" if "full" in kind else "learning_rate=1e-3"
    train(config(tmp_path / "whole", *common, learning))
    for later in (tmp_path / "whole" / "checkpoint-6", tmp_path / "whole" / "checkpoint-4"):
        later.rename(tmp_path / later.name)
    weights = "model.safetensors" if "full" in kind else "adapter_model.safetensors"
    expected, expected_rows = read_tensors(tmp_path / "whole" / weights), rows(tmp_path / "whole")
    train(config(tmp_path / "whole", *common, learning, "resume_from_checkpoint=true"))
    assert rows(tmp_path / "whole") == expected_rows
    for name, tensor in read_tensors(tmp_path / "whole" / weights).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_first_loss_is_log_2_and_the_first_rewards_are_0(tmp_path):
    """Policy equals reference before the first update, whatever the reference's source."""
    for kind in ("finetuning_type=lora", "finetuning_type=full"):
        run = tmp_path / kind.partition("=")[2]
        train(config(run, kind, "max_steps=1", "learning_rate=1e-6"))
        first = rows(run)[0]
        assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0


@pytest.mark.slow
def test_an_adapter_that_is_continued_is_its_own_reference(tmp_path):
    """Without ref_model the reference is a snapshot of the adapter (loss log 2); ref_model names the base instead."""
    train(config(tmp_path / "first", "learning_rate=1e-2"))
    continued = f"adapter_name_or_path={tmp_path / 'first'}"
    train(config(tmp_path / "snapshot", continued, "max_steps=1"))
    train(config(tmp_path / "base", continued, "max_steps=1", "ref_model=world"))
    assert rows(tmp_path / "snapshot")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(rows(tmp_path / "base")[0]["loss"] - 0.6931472) > 1e-3


@pytest.mark.parametrize("kind", ["finetuning_type=lora", "finetuning_type=full"])
def test_a_step_after_the_reference_went_all_the_way_is_a_first_step(tmp_path, capsys, kind):
    """alpha 1 after every second of 3 updates: loss log 2 and margins 0 at the first and the third."""
    moves = ["sync_ref_model=true", "ref_model_mixup_alpha=1", "ref_model_sync_steps=2"]
    train(config(tmp_path, kind, *moves, "learning_rate=1e-5", "warmup_ratio=0"))
    output, logged = capsys.readouterr().out, rows(tmp_path)
    assert "reference: the policy as it starts, moved by 1 towards it every 2 updates" in output
    assert "closed form of the loss 0.6931" in output and "warning" not in output
    assert [row["rewards/margins"] == 0 for row in logged] == [True, False, True]
    assert [row["loss"] == pytest.approx(math.log(2), abs=1e-6) for row in logged] == [True, False, True]


def test_a_reference_that_moves_too_late_to_count_is_warned_about(tmp_path, capsys):
    train(config(tmp_path, "sync_ref_model=true", "ref_model_sync_steps=2", "max_steps=2", "warmup_ratio=0"))
    assert "warning: ref_model_sync_steps=2 in a run of 2: the reference does not move" in capsys.readouterr().out


@pytest.mark.slow
def test_the_norm_that_is_reported_is_the_one_before_clipping(tmp_path):
    for clip in (0, 1e-6):
        train(config(tmp_path / str(clip), f"max_grad_norm={clip}", "max_steps=1"))
    assert rows(tmp_path / "0")[0]["grad_norm"] == rows(tmp_path / "1e-06")[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    "precision",
    [
        "bf16=true",
        pytest.param("fp16=true", marks=pytest.mark.slow),
        pytest.param("gradient_checkpointing=true", marks=pytest.mark.slow),
    ],
)
def test_lower_precision_and_recomputation_follow_the_float32_run(tmp_path, precision):
    """bfloat16 keeps 8 bits: a response's log-probability of about -20 nats is known to about 0.1."""
    train(config(tmp_path / "plain"))
    train(config(tmp_path / "other", precision))
    for row, expected in zip(rows(tmp_path / "other"), rows(tmp_path / "plain"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.02)
        assert row["logps/chosen"] == pytest.approx(expected["logps/chosen"], rel=0.01)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(tmp_path / "other").values())


def plan(rows: int, *overrides: str) -> Plan:
    return Plan.of(config(Path("unused"), "max_steps=-1", *overrides), rows)


def test_epochs_become_steps_rounded_up_as_in_hugging_face():
    """7 rows in batches of 2 are 4 steps an epoch; 0.5 epochs 2, 0.6 epochs 3, 2 epochs 8; max_steps stands before."""
    batch = "per_device_train_batch_size=2"
    steps = {e: plan(7, batch, f"num_train_epochs={e}").total_steps for e in (1, 0.5, 0.6, 2)}
    assert steps == {1: 4, 0.5: 2, 0.6: 3, 2: 8}
    assert plan(7, batch, "max_steps=5").total_steps == 5


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    p = plan(7, "per_device_train_batch_size=2", "num_train_epochs=2")
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in p.indices(step)] for e in (0, 1)]
    assert [sorted(order) for order in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]


def test_disable_shuffling_keeps_file_order():
    p = plan(5, "per_device_train_batch_size=2", "disable_shuffling=true")
    assert [p.indices(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_a_reference_with_another_vocabulary_is_refused(tmp_path):
    """Its log-probabilities would be of other text."""
    other = tmp_path / "other"
    shutil.copytree(WORLD / "model", other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|endoftext|>", "<|endofstory|>"), encoding="utf-8")
    with pytest.raises(ValueError, match="another vocabulary"):
        train(config(tmp_path / "run", f"ref_model={other}"))


def test_a_run_that_cannot_begin_leaves_no_trace_and_removes_nothing(tmp_path):
    run = tmp_path / "run"
    train(config(run))
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())
    for overrides in (
        ["overwrite_output_dir=true", "lora_target=nonsense"],
        ["overwrite_output_dir=true", f"adapter_name_or_path={run}"],
        ["resume_from_checkpoint=true"],
        [],
    ):
        with pytest.raises(ValueError):
            train(config(run, *overrides))
        assert sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir()) == before


def test_a_resume_with_another_config_is_refused(tmp_path):
    train(config(tmp_path, "save_steps=2"))
    with pytest.raises(ValueError, match=r"pref_beta=0.5: the run in .* was made with pref_beta=1.0"):
        train(config(tmp_path, "save_steps=2", "resume_from_checkpoint=true", "pref_beta=0.5"))
    saved = tmp_path / "config.yaml"
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if "pref_beta" not in line))
    train(config(tmp_path, "save_steps=2", "resume_from_checkpoint=true"))  # saved before that key existed


@pytest.mark.parametrize(("number", "loss"), [("weight", 3 * math.log(2)), ("margin", math.log1p(math.e**3))])
def test_rows_with_numbers_of_their_own_do_not_look_like_a_run_gone_wrong(tmp_path, capsys, number, loss):
    """Weight 3, or margin 3 at beta 1: the first loss is 2.08 or 3.05, and that is where such rows start."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b", number: 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    train(config(tmp_path / "run", f"dataset={tmp_path / 'rows.jsonl'}", "max_steps=1", "warmup_ratio=0.5"))
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert "training_instability" not in capsys.readouterr().out


def test_a_warm_up_as_long_as_the_run_is_warned_about(tmp_path, capsys):
    train(config(tmp_path, "max_steps=2", "warmup_steps=2", "eval_dataset=null"))
    assert "warning: 2 steps of warm-up in a run of 2" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_row(tmp_path):
    """Weights so large that fp16 overflows in the forward pass: no loss scale can mend that."""
    from models.weights import write_tensors

    broken = tmp_path / "broken"
    shutil.copytree(WORLD / "model", broken)
    tensors = read_tensors(broken / "model.safetensors")
    write_tensors(broken / "model.safetensors", {n: t * (1e4 if "down_proj" in n else 1) for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"start: loss nan .* on the rows from .*train.jsonl:\d+: not finite"):
        train(config(tmp_path / "run", f"model_name_or_path={broken}", "fp16=true"))


def test_resume_from_checkpoint_false_starts_anew(tmp_path):
    """LLaMA-Factory's files write false where they mean none."""
    train(config(tmp_path, "resume_from_checkpoint=false", "max_steps=1"))
    assert len(rows(tmp_path)) == 1

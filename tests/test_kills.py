"""A run that is killed, signalled, or meets a full disk or numbers that are not finite.

Kills are of forked children, so that each begins in milliseconds. DPO_KILLS=60 is the long form, of every kind of
training; the short one is 4 kills of LoRA and 1 of each other kind.
"""

import json
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from test_trainer import adapter, config, rows

from dpo import preference, trainer
from dpo.checkpoint import OPTIMIZER, checkpoints
from dpo.durable import damage
from dpo.signals import StopRequest
from dpo.trainer import Trainer
from models.command import one_line_errors
from models.weights import read_tensors
from train import train

KILLS = int(os.environ.get("DPO_KILLS", "4"))
RUN = [
    "max_steps=12", "save_steps=2", "logging_steps=3", "learning_rate=1e-3", "lora_dropout=0.1", "val_size=8",
    "eval_strategy=steps", "eval_steps=4", "per_device_train_batch_size=2", "gradient_accumulation_steps=2",
    "sync_ref_model=true", "ref_model_sync_steps=3", "save_total_limit=3", "lr_scheduler_type=constant",
    "num_samples=2", "max_new_tokens=4",
]  # fmt: skip
KINDS = {
    "LoRA": [], "LoRA in bf16": ["bf16=true"], "full": ["finetuning_type=full"],
    "full in bf16": ["finetuning_type=full", "bf16=true"],
}  # fmt: skip
SAYS: dict[Path, int] = {}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A forked child may not use the parent's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(folder: Path, *overrides: str, before: Callable[[], object] = lambda: None) -> int:
    """The process id of a child that trains in `folder`, from the newest checkpoint where there is one.

    What it says can be read by `said`: a pipe, which a limit on the size of files does not touch.
    """
    if folder in SAYS:
        os.close(SAYS.pop(folder))
    SAYS[folder], says = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = os.fdopen(says, "w", buffering=1)
            before()
            resume = "resume_from_checkpoint=true" if checkpoints(folder) else "overwrite_output_dir=true"
            with one_line_errors():
                train(config(folder, *RUN, resume, *overrides))
            status = 0
        except SystemExit as error:
            status = int(str(error.code))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(says)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def said(folder: Path) -> str:
    """What the last child in `folder` said, which has ended."""
    with os.fdopen(SAYS.pop(folder)) as file:
        return file.read()


@pytest.fixture(scope="module")
def undisturbed_of(tmp_path_factory) -> Callable[[str], tuple[Path, float]]:
    """Of a kind of training a run that nothing happens to, and its seconds."""
    train(config(tmp_path_factory.mktemp("first"), "max_steps=1"))  # what is loaded once, children need not load again

    @cache
    def run(kind: str) -> tuple[Path, float]:
        folder = tmp_path_factory.mktemp("undisturbed")
        begin = time.monotonic()
        assert wait(start(folder, *KINDS[kind])) == 0
        return folder, time.monotonic() - begin

    return run


@pytest.fixture(scope="module")
def undisturbed(undisturbed_of) -> tuple[Path, float]:
    return undisturbed_of("LoRA")


def assert_same_result(folder: Path, undisturbed: Path) -> None:
    """Result, metrics, ledger and answers, to the bit."""
    assert rows(folder) == rows(undisturbed)
    for log in ("ledger.jsonl", "samples.jsonl"):
        assert (folder / log).read_bytes() == (undisturbed / log).read_bytes(), log
    (name,) = (path.name for path in undisturbed.glob("*.safetensors"))
    assert_equal_files(folder / name, undisturbed / name)


def assert_equal_files(one: Path, other: Path) -> None:
    tensors, expected = read_tensors(one), read_tensors(other)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items()), one


def assert_same(folder: Path, undisturbed: Path, *also_saved: int) -> None:
    """Result, optimiser, moving reference and metrics, to the bit. A signal saves after any step."""
    assert_same_result(folder, undisturbed)
    for name in (OPTIMIZER, "objective.safetensors"):
        assert_equal_files(folder / "checkpoint-12" / name, undisturbed / "checkpoint-12" / name)
    newest = sorted({*range(2, 13, 2), *also_saved})[:-4:-1]
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}" for step in newest]
    assert not [path for path in checkpoints(folder) if damage(path)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_are_killed_at_random_times_end_as_the_one_that_was_not(tmp_path, undisturbed_of, kind):
    """Each run is killed until it gets through; the times reach from its first line to after its last."""
    begin = time.monotonic()
    expected, seconds = undisturbed_of(kind)
    wanted = KILLS if KILLS > 4 or kind == "LoRA" else 1
    draw = random.Random(wanted)
    kills = finished = 0
    folder = tmp_path / "0"
    while kills < wanted or finished * 10 < wanted:
        child = start(folder, *KINDS[kind])
        limit = time.monotonic() + draw.uniform(0, 1.1 * seconds)
        if kills < wanted:
            while time.monotonic() < limit and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        status = wait(child)
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), said(folder)
        if status == 0:
            finished += 1
            assert_same(folder, expected)
            folder = tmp_path / str(finished)
    print(
        f"{kind}: {kills} kills, {finished} runs got through, all equal to the undisturbed one, "
        f"{time.monotonic() - begin:.0f} s"
    )


def stopped_after(folder: Path, output: str, status: int, number: signal.Signals) -> int:
    """The step after which a run said that this signal stopped it: its newest checkpoint's."""
    assert status == 128 + number
    (step, kept) = re.search(rf"stopped by {number.name} after step (\d+)/12: (.*)", output).groups()
    saved = checkpoints(folder)
    assert kept.startswith(f"{saved[0]} holds it" if step != "0" else "nothing of it is kept")
    assert [path.name for path in saved[:1]] == ([f"checkpoint-{step}"] if step != "0" else [])
    return int(step)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_time_saves_the_step_and_leaves_with_its_status(tmp_path, undisturbed, number):
    """143 or 130. Before the first update nothing listens yet, and the signal does what it does to any program; after
    the last the run is whole, and ends as if there had been none."""
    begin = time.monotonic()
    expected, seconds = undisturbed
    draw = random.Random(number)
    real_update, real_note = Trainer.update, StopRequest._note

    def noting() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own says a traceback

        def update(self, *arguments):
            Trainer.now = self.step
            return real_update(self, *arguments)

        def note(self, *arguments):
            print(f"heard in update {getattr(Trainer, 'now', 0)}")
            real_note(self, *arguments)

        Trainer.update, StopRequest._note = update, note

    statuses: dict[int, int] = {}
    for trial in range(max(1, KILLS // 3)):
        folder = tmp_path / str(trial)
        child = start(folder, before=noting)
        time.sleep(draw.uniform(0, 1.1 * seconds))
        os.kill(child, number)
        status = wait(child)
        statuses[status] = statuses.get(status, 0) + 1
        also = []
        if status not in (0, -number):
            heard = int(re.search(r"heard in update (\d+)", output := said(folder))[1])
            also = [stopped_after(folder, output, status, number)]
            assert also[0] - heard in (0, 1)
        if status != 0:
            assert wait(start(folder)) == 0, said(folder)
        assert_same(folder, expected, *also)
    print(
        f"{number.name}: exit statuses {statuses}, all ended as the undisturbed one, {time.monotonic() - begin:.0f} s"
    )


def interrupting(where: str, step: int, *numbers: signal.Signals) -> Callable[[], None]:
    """Signals in the middle of the first or the second micro-batch after `step` updates, or of the evaluation there."""

    def before() -> None:
        coming: list[str] = []
        real_losses, real_update, real_evaluate = (
            preference.PreferenceObjective.losses,
            Trainer.update,
            Trainer.evaluate,
        )

        def update(self, *arguments):
            coming[:] = ["first", "second"] if self.step == step else []
            return real_update(self, *arguments)

        def evaluate(self, *arguments):
            coming[:] = ["evaluation"] if self.step == step else []
            return real_evaluate(self, *arguments)

        def losses(self, measured):
            if coming and coming.pop(0) == where:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return real_losses(self, measured)

        preference.PreferenceObjective.losses, Trainer.update, Trainer.evaluate = losses, update, evaluate

    return before


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first", "second", "evaluation"])
def test_a_signal_within_an_update_drops_it_and_within_an_evaluation_lets_it_end(tmp_path, undisturbed, where):
    """In the first of two micro-batches the update is dropped, and made again by the resumed run; in the second it is
    made. An evaluation is ended and logged, once."""
    draw = random.Random(where)
    for trial in range(max(1, KILLS // 6)):
        folder, number = tmp_path / str(trial), draw.choice([signal.SIGTERM, signal.SIGINT])
        step = draw.choice([4, 8]) if where == "evaluation" else draw.randrange(11)
        status = wait(start(folder, before=interrupting(where, step, number)))
        expected = step + (where == "second")
        assert stopped_after(folder, said(folder), status, number) == expected
        assert wait(start(folder)) == 0
        assert_same(folder, undisturbed[0], expected)


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_changes_nothing(tmp_path, undisturbed):
    assert wait(start(tmp_path / "a", before=interrupting("evaluation", 12, signal.SIGTERM))) == 0
    assert_same(tmp_path / "a", undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)],
)
def test_a_second_signal_ends_the_process_at_once(tmp_path, undisturbed, first, second):
    """Without a checkpoint of its own; the ones before it are as good as ever."""
    draw = random.Random(first + second)
    for trial in range(max(1, KILLS // 12)):
        step = draw.randrange(12)
        folder, where = tmp_path / str(trial), draw.choice(["first", "second"])
        assert wait(start(folder, before=interrupting(where, step, first, second))) == -second
        assert [path.name for path in checkpoints(folder)][:1] == [f"checkpoint-{step // 2 * 2}"] * (step > 1)
        assert wait(start(folder)) == 0
        assert_same(folder, undisturbed[0])


@pytest.mark.parametrize("cut", [(4, 1), (1, 4), (4, 2)])
def test_a_resume_with_another_cut_of_the_batch_is_refused(tmp_path, cut):
    """Of as many rows it would be another run by rounding, of more rows by its data."""
    train(config(tmp_path / "a", *RUN, "max_steps=2", "eval_strategy=no"))
    before = rows(tmp_path / "a")
    other = [f"per_device_train_batch_size={cut[0]}", f"gradient_accumulation_steps={cut[1]}"]
    with pytest.raises(ValueError, match=rf"per_device_train_batch_size={cut[0]}: the run in .* was made with .*=2;"):
        train(config(tmp_path / "a", *RUN, "resume_from_checkpoint=true", *other))
    assert rows(tmp_path / "a") == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_and_passed_over(tmp_path, undisturbed, capsys):
    assert wait(start(tmp_path / "a", "max_steps=6")) == 0
    broken = tmp_path / "a" / "checkpoint-6" / OPTIMIZER
    broken.write_bytes(broken.read_bytes()[:-1])
    train(config(tmp_path / "a", *RUN, "resume_from_checkpoint=true"))
    assert f"{broken.parent} is damaged ({OPTIMIZER} is not what was written) and is" in capsys.readouterr().out
    assert rows(tmp_path / "a") == rows(undisturbed[0]) and (tmp_path / "a" / "checkpoint-6.left-1").is_dir()
    (tmp_path / "a" / "checkpoint-12" / OPTIMIZER).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-12: optimizer.safetensors is missing; name a whole checkpoint-N"):
        train(config(tmp_path / "a", *RUN, f"resume_from_checkpoint={tmp_path / 'a' / 'checkpoint-12'}"))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 600, 4_000, 20_000, 60_000])
def test_a_disk_that_is_full_ends_the_run_with_the_last_good_checkpoint_untouched(tmp_path, undisturbed, limit):
    """A limit on the size of any file, from update 7 on, stands for the disk."""
    real = Trainer.update

    def filling() -> None:
        def update(self, *arguments):
            if self.step == 6:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return real(self, *arguments)

        Trainer.update = update

    assert wait(start(tmp_path / "a", before=filling)) == 2
    whole = [path.name for path in checkpoints(tmp_path / "a") if not damage(path)]
    assert whole[-3:] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert wait(start(tmp_path / "a")) == 0
    assert rows(tmp_path / "a") == rows(undisturbed[0])


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_directory(tmp_path):
    first = start(tmp_path / "a")
    while not checkpoints(tmp_path / "a"):
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"output_dir={tmp_path}/a: process {first} on .* is training in it; wait for"):
        train(config(tmp_path / "a", *RUN, "resume_from_checkpoint=true"))
    os.kill(first, signal.SIGCONT)
    assert wait(first) == 0


def with_losses_not_finite(monkeypatch, steps: set[int], value: float = float("nan")) -> None:
    """The first pair's loss is `value` in these updates, counted from 1."""
    real = preference.PreferenceObjective.losses
    update = Trainer.update
    now = [0]

    def losses(self, measured):
        result = real(self, measured)
        if now[0] in steps and result.requires_grad:
            mask = torch.zeros_like(result)
            mask[0] = 1
            result = torch.where(mask > 0, result * value, result)
        return result

    def counted(self, *arguments):
        now[0] = self.step + 1
        try:
            return update(self, *arguments)
        finally:
            now[0] = 0

    monkeypatch.setattr(preference.PreferenceObjective, "losses", losses)
    monkeypatch.setattr(Trainer, "update", counted)


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_an_update_that_is_not_finite_is_skipped_counted_and_its_rows_are_named(tmp_path, monkeypatch, capsys, value):
    """The run is the one that had never seen these updates' gradients: two of twelve are not made."""
    with_losses_not_finite(monkeypatch, {2, 6}, value)
    train(config(tmp_path / "a", *RUN))
    out = capsys.readouterr().out
    assert out.count("the loss is not finite (") == 2 and "train.jsonl:" in out and "skipped, 1 in a row" in out
    logged = [row for row in rows(tmp_path / "a") if "grad_norm" in row]
    assert [row.get("skipped_steps") for row in logged] == [1, 2, 2, 2]
    assert all(row["loss"] is not None for row in logged)
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "a").values())


def test_three_in_a_row_stop_the_run_with_a_bundle(tmp_path, monkeypatch):
    with_losses_not_finite(monkeypatch, {5, 6, 7})
    with pytest.raises(ValueError, match=r"step 7: the loss is not finite .*in the third .*postmortem-7.json says"):
        train(config(tmp_path / "a", *RUN))
    bundle = json.loads((tmp_path / "a" / "postmortem-7.json").read_text())
    assert (bundle["step"], bundle["not_finite"], bundle["weights_not_finite"]) == (7, "loss", [])
    assert len(bundle["batch"]) == 4 and bundle["rows"][0]["responses"] and bundle["rows"][0]["source"]
    assert damage(checkpoints(tmp_path / "a")[0]) is None


def test_a_gradient_that_is_not_finite_is_skipped_too_and_a_module_is_named(tmp_path, monkeypatch):
    """A weight that became infinite: the bundle names it, and the first module whose output shows it."""
    real = Trainer.update

    def update(self, *arguments):
        if self.step >= 4:
            name = "model.layers.0.mlp.up_proj"
            self.policy.get_submodule(name).lora_B.data.fill_(float("inf"))
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(ValueError, match="in the third update in a row"):
        train(config(tmp_path / "a", *RUN, "save_steps=3"))
    bundle = json.loads((tmp_path / "a" / "postmortem-7.json").read_text())
    assert bundle["first_non_finite"].startswith("model.layers.0.mlp")
    assert bundle["weights_not_finite"] == ["model.layers.0.mlp.up_proj.lora_B"]
    assert [path.name for path in checkpoints(tmp_path / "a")] == ["checkpoint-3"]


# --- the best, and when to stop ---


def with_evaluations(monkeypatch, losses: list[float]) -> None:
    """These are the held-out losses, one for each evaluation."""
    coming = iter(losses)
    real = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *a: real(*a) | {"eval_loss": next(coming)})


BEST = [*RUN, "eval_steps=2", "save_strategy=no", "save_total_limit=1", "load_best_model_at_end=true"]


def test_the_best_evaluation_is_kept_and_is_the_result(tmp_path, monkeypatch, capsys):
    """Best after step 4 of 12; its checkpoint outlives save_total_limit=1."""
    with_evaluations(monkeypatch, [0.6, 0.4, 0.5, 0.45, 0.7, 0.41, 0.4001])
    metrics = train(config(tmp_path / "a", *BEST))
    assert metrics["eval_loss"] == 0.4001  # measured again, of the policy that is saved
    assert "the result is the policy after step 4: eval_loss was best, 0.4, after step 4" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "a")] == ["checkpoint-4"]
    kept = read_tensors(tmp_path / "a" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter(tmp_path / "a").items())


@pytest.mark.slow
def test_training_stops_when_its_patience_is_over_and_a_resume_does_not_go_on(tmp_path, monkeypatch, capsys):
    """Two evaluations in a row that are no better than the one after step 4: the last is after step 8."""
    with_evaluations(monkeypatch, [0.6, 0.4, 0.5, 0.45, 0.3, 0.3])
    patient = [*BEST, "early_stopping_steps=2", "save_strategy=steps", "save_total_limit=5"]
    train(config(tmp_path / "a", *patient))
    assert "early stop after step 8: eval_loss was best, 0.4, after step 4" in capsys.readouterr().out
    assert rows(tmp_path / "a")[-1]["step"] == 8
    train(config(tmp_path / "a", *patient, "resume_from_checkpoint=true"))
    assert rows(tmp_path / "a")[-1]["step"] == 8


@pytest.mark.slow
def test_more_is_better_unless_the_name_ends_in_loss(tmp_path, monkeypatch):
    """Accuracies rise and fall; the best is the highest, and with greater_is_better=false the lowest."""
    for greater, step in (("null", 4), ("false", 2)):
        coming = iter([0.5, 0.9, 0.7, 0.6, 0.8, 0.85, 0.9])
        monkeypatch.setattr(trainer, "evaluate", lambda *_, coming=coming: {"eval_rewards/accuracies": next(coming)})
        cfg = config(
            tmp_path / greater, *BEST, "metric_for_best_model=rewards/accuracies", f"greater_is_better={greater}"
        )
        train(cfg)
        assert [path.name for path in checkpoints(tmp_path / greater)] == [f"checkpoint-{step}"]


def test_a_metric_that_no_evaluation_gives_is_refused_with_those_that_it_gives(tmp_path):
    with pytest.raises(ValueError, match=r"metric_for_best_model=bleu: an evaluation gives loss, rewards/chosen, .*"):
        train(config(tmp_path / "a", *BEST, "metric_for_best_model=bleu"))


@pytest.mark.parametrize("key", ["load_best_model_at_end=true", "early_stopping_steps=2"])
def test_what_needs_evaluations_is_refused_without(tmp_path, key):
    with pytest.raises(ValueError, match=rf"{key.partition('=')[0]}=.*: needs evaluations; set eval_strategy"):
        train(config(tmp_path / "a", key))


# --- going back, and looking ---


@pytest.mark.slow
def test_a_run_that_goes_back_puts_aside_what_it_leaves(tmp_path):
    """Checkpoints beyond the one resumed from are of another branch: not the newest, and not deleted."""
    train(config(tmp_path / "a", *RUN, "max_steps=6", "save_total_limit=null"))
    again = ["max_steps=5", "save_steps=1", "save_total_limit=1"]
    train(config(tmp_path / "a", *RUN, *again, f"resume_from_checkpoint={tmp_path / 'a' / 'checkpoint-2'}"))
    left = sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*"))
    assert left == ["checkpoint-4.left-1", "checkpoint-5", "checkpoint-6.left-1"]


@pytest.mark.slow
def test_an_evaluation_of_a_checkpoint_is_of_its_policy(tmp_path):
    train(config(tmp_path / "a", *RUN, "save_steps=4"))
    evaluations = {row["step"]: row["eval_loss"] for row in rows(tmp_path / "a") if "eval_loss" in row}
    assert len(set(evaluations.values())) == 3
    looked = config(tmp_path / "a", *RUN, "do_train=false", f"resume_from_checkpoint={tmp_path / 'a' / 'checkpoint-4'}")
    assert train(looked)["eval_loss"] == pytest.approx(evaluations[4])


@pytest.mark.slow
def test_a_run_that_had_only_its_end_to_come_ends_with_the_same_metrics(tmp_path):
    first = train(config(tmp_path / "a", *RUN))
    assert train(config(tmp_path / "a", *RUN, "resume_from_checkpoint=true")) == pytest.approx(first)


@pytest.mark.slow
def test_a_best_checkpoint_that_could_not_be_written_is_not_gone_back_to(tmp_path, monkeypatch):
    with_evaluations(monkeypatch, [0.6, 0.4, 0.5, 0.55, 0.7, 0.52, 0.6])
    real = trainer.save_checkpoint

    def full(target, *arguments, **result):
        if target.name == "checkpoint-4":
            raise OSError("No space left on device")
        real(target, *arguments, **result)

    monkeypatch.setattr(trainer, "save_checkpoint", full)
    train(config(tmp_path / "a", *BEST))
    assert checkpoints(tmp_path / "a")[0].name == "checkpoint-6"  # 0.5 was best among those that are there

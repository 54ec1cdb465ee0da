"""Faults within a run: numbers that are not finite, disks and directories that fail, two processes, and a long run.

What holds of all of them: no checkpoint is damaged or holds a number that is not finite, the error is one line, and a
resume ends as the undisturbed run. DPO_KILLS=60 is the long form of these too.
"""

import builtins
import ctypes
import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_durable import CALLS
from test_kills import (
    KILLS,
    assert_same_result,
    one_thread,
    said,
    start,
    undisturbed,
    undisturbed_of,
    wait,
)
from test_trainer import config, rows
from torch import Tensor

import train as command
from dpo.checkpoint import checkpoints, optimizer_tensors
from dpo.durable import damage
from dpo.trainer import Trainer
from models.weights import read_tensors
from train import train

__all__ = ["one_thread", "undisturbed", "undisturbed_of"]  # fixtures, which pytest finds by name
LONG = KILLS > 4


def assert_all_finite(run: Path) -> None:
    """Every number of every tensor and every trainer_state.json."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} in {run}")

    for path in run.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in read_tensors(path).values()), path
    for path in run.rglob("trainer_state.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    assert not [path for path in checkpoints(run) if damage(path)]


# --- numbers that are not finite ---

SHORT = ["max_steps=6", "save_steps=1", "logging_steps=1", "lr_scheduler_type=constant", "learning_rate=1e-3",
         "per_device_train_batch_size=2", "gradient_accumulation_steps=2"]  # fmt: skip
Undo = Callable[[], object]


def spoilt_first(tensor: Tensor, value: float) -> Tensor:
    return torch.cat((tensor[:1] * value, tensor[1:]))


def in_loss(trainer: Trainer, value: float) -> Undo:
    """Of the first pair of each micro-batch."""
    real = trainer.objective.losses
    trainer.objective.losses = lambda measured: spoilt_first(real(measured), value)
    return lambda: delattr(trainer.objective, "losses")


def in_gradient(trainer: Trainer, value: float) -> Undo:
    """Of one parameter."""
    return trainer.parameters[3].register_hook(lambda gradient: gradient * value).remove


def in_activation(trainer: Trainer, value: float) -> Undo:
    module = trainer.policy.get_submodule("model.layers.1.mlp")
    return module.register_forward_hook(lambda module, inputs, output: output * value).remove


def in_embeddings(trainer: Trainer, value: float) -> Undo:
    """Of the first token of each micro-batch, so of its first prompt."""

    def spoil(module: object, inputs: object, output: Tensor) -> Tensor:
        return spoilt_first(output, value)

    return trainer.policy.get_submodule("model.embed_tokens").register_forward_hook(spoil).remove


def in_reference(trainer: Trainer, value: float) -> Undo:
    """Of the first token of each micro-batch's first chosen response: minus infinity makes a loss of 0."""
    real = trainer.objective.reference
    trainer.objective.reference = lambda stream, rows: spoilt_first(real(stream, rows), value)
    return lambda: setattr(trainer.objective, "reference", real)


def in_moment(trainer: Trainer, value: float) -> Undo:
    """Of one number of one parameter; it stays."""
    moments = optimizer_tensors(trainer.policy, trainer.optimizer)
    moments[min(name for name in moments if name.endswith("exp_avg"))].view(-1)[0] = value
    return lambda: None


SPOILT: dict[str, tuple[Callable[[Trainer, float], Undo], str | None]] = {
    # where: (how, the first module whose output shows it)
    "loss": (in_loss, "loss"), "gradient": (in_gradient, None), "activation": (in_activation, "model.layers.1.mlp"),
    "embeddings": (in_embeddings, "model.embed_tokens"), "reference": (in_reference, "loss"),
}  # fmt: skip


def spoil(monkeypatch, how: Callable[[Trainer, float], Undo], value: float, *steps: int) -> None:
    """In these updates, counted from 1."""
    real = Trainer.update

    def update(self, *arguments):
        undo = how(self, value) if self.step + 1 in steps else lambda: None
        try:
            return real(self, *arguments)
        finally:
            undo()

    monkeypatch.setattr(Trainer, "update", update)


NUMBERS = [
    pytest.param(step, value, id=f"{value} in update {step}", marks=[pytest.mark.slow] * ((step, value) != (3, "nan")))
    for step in (1, 3, 6) for value in ("nan", "inf", "-inf") if value == "nan" or LONG
]  # fmt: skip


@pytest.mark.parametrize(("step", "value"), NUMBERS)
@pytest.mark.parametrize("where", SPOILT)
def test_an_update_that_is_not_finite_anywhere_is_left_out(tmp_path, monkeypatch, capsys, where, step, value):
    """At the first, a middle and the last step: skipped, counted, its rows named, and nothing of it is ever saved."""
    spoil(monkeypatch, SPOILT[where][0], float(value), step)
    train(config(tmp_path / "a", *SHORT))
    (warning,) = re.findall(
        r"warning: step (\d): the (?:loss|gradient) is not finite \((.*)\); the upd", capsys.readouterr().out
    )
    assert warning[0] == str(step) and "train.jsonl:" in warning[1]
    assert [row.get("skipped_steps", 0) for row in rows(tmp_path / "a")] == [int(i >= step) for i in range(1, 7)]
    assert [path.name for path in checkpoints(tmp_path / "a")] == [f"checkpoint-{i}" for i in range(6, 0, -1)]
    assert_all_finite(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("where", SPOILT)
def test_three_in_a_row_stop_the_run_and_say_where_it_began(tmp_path, monkeypatch, where):
    how, first = SPOILT[where]
    spoil(monkeypatch, how, float("nan"), 2, 3, 4)
    with pytest.raises(ValueError, match=r"step 4: .* in the third update in a row; .*postmortem-4.json says more"):
        train(config(tmp_path / "a", *SHORT))
    assert json.loads((tmp_path / "a" / "postmortem-4.json").read_text())["first_non_finite"] == first
    assert_all_finite(tmp_path / "a")


@pytest.mark.parametrize("value", ["nan", "inf"] if LONG else ["nan"])
@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_weights_that_a_moment_spoilt_are_never_saved(tmp_path, monkeypatch, capsys, step, value):
    """They show at the next loss, and no update is made of them. The run stops at the third, or at its end: a result
    is refused as a checkpoint is."""
    spoil(monkeypatch, in_moment, float(value), step)
    message = rf"postmortem-{step + 3}.json says more" if step < 4 else rf"{tmp_path}/a: not written, .*lora_A.* is not"
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "a", *SHORT))
    assert f"checkpoint-{step}: not written, " in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "a")] == [f"checkpoint-{i}" for i in range(step - 1, 0, -1)]
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert_all_finite(tmp_path / "a")


# --- disks and directories ---


def from_update_7(fault: Callable[[], None]) -> Callable[[], None]:
    """Something that happens in a child when 6 updates are made and saved."""
    real = Trainer.update

    def before() -> None:
        def update(self, *arguments):
            if self.step == 6:
                fault()
            return real(self, *arguments)

        Trainer.update = update

    return before


def failing(number: int, first: int, times: float) -> Callable[[], None]:
    """Calls into the file system, from the `first` on, fail with this error."""

    def fault() -> None:
        count = 0
        for module, name in [*((os, name) for name in CALLS), (io, "open"), (builtins, "open")]:
            real = getattr(module, name)

            def counted(*arguments, real=real, **options):
                nonlocal count
                count += 1
                if first <= count < first + times:
                    raise OSError(number, os.strerror(number))
                return real(*arguments, **options)

            setattr(module, name, counted)

    return fault


def as_any_user() -> None:
    """To root no directory is closed: give that up."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of capset(2), this process
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


def assert_no_harm(folder: Path, status: int, undisturbed: Path) -> None:
    """The run ended well or in one line, what was saved is whole, and a resume ends as the undisturbed run."""
    output = said(folder)
    assert "Traceback" not in output and status in (0, 2), output
    assert status == 0 or output.splitlines()[-1].startswith("error: "), output
    saved = checkpoints(folder)
    assert saved and not [path for path in saved if damage(path)]
    assert int(saved[0].name.removeprefix("checkpoint-")) >= 6
    assert wait(start(folder)) == 0, said(folder)
    assert_same_result(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT][: 3 if LONG else 1], ids=errno.errorcode.get)
def test_a_call_that_fails_costs_a_checkpoint_at_most(tmp_path, undisturbed, number):
    """Once or from then on, at any call into the file system from update 7 on."""
    draw = random.Random(number)
    statuses = {0: 0, 2: 0}
    for trial in range(20 if LONG else 1):
        folder, times = tmp_path / str(trial), draw.choice([1, 5, math.inf])
        status = wait(start(folder, before=from_update_7(failing(number, draw.randrange(1, 150), times))))
        assert_no_harm(folder, status, undisturbed[0])
        statuses[status] += 1
    print(f"{errno.errorcode[number]}: {sum(statuses.values())} runs, exit statuses {statuses}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "metrics.jsonl"])
def test_what_becomes_read_only_ends_the_run_in_one_line(tmp_path, undisturbed, name):
    """The run directory, at the third checkpoint in a row that it does not take; or a file of it."""
    closed = tmp_path / "a" / name
    status = wait(start(tmp_path / "a", before=from_update_7(lambda: (as_any_user(), closed.chmod(0o500)))))
    closed.chmod(0o700)
    assert status == 2
    assert_no_harm(tmp_path / "a", status, undisturbed[0])


@pytest.mark.slow
def test_a_run_directory_that_vanishes_ends_the_run_in_one_line(tmp_path, undisturbed):
    folder = tmp_path / "a"
    assert wait(start(folder, before=from_update_7(lambda: shutil.rmtree(folder)))) == 2
    output = said(folder).splitlines()
    assert re.search(rf"No such file or directory: '{folder}/(metrics|samples|ledger)\.jsonl'$", output[-1])
    assert output[-1].startswith("error: ") and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["closed", "closed/inner", "file/inner"])
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, folder):
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "file").write_text("")
    assert wait(start(tmp_path / folder, before=as_any_user)) == 2
    assert re.fullmatch(r"error: .*(Permission denied|Not a directory): '.*'", said(tmp_path / folder).splitlines()[-1])
    assert not list((tmp_path / "closed").iterdir())


# --- two processes ---


@pytest.mark.slow
def test_of_two_that_start_at_once_one_trains_and_the_other_names_it(tmp_path, undisturbed_of):
    real = command.RunDir
    begin = time.monotonic()
    trials = 20 if LONG else 2
    for trial in range(trials):
        folder, other = tmp_path / str(trial), tmp_path / str(trial) / ".." / str(trial)
        ready, over = multiprocessing.Barrier(2), multiprocessing.Barrier(2)

        def together(ready=ready, over=over) -> None:
            class RunDir(real):
                def __init__(self, *arguments, **options):
                    ready.wait()
                    try:
                        super().__init__(*arguments, **options)
                    finally:
                        over.wait()  # the one that trains does not end before the other has tried

            command.RunDir = RunDir

        children = {path: start(path, "max_steps=2", before=together) for path in (folder, other)}
        statuses = {path: wait(child) for path, child in children.items()}
        assert sorted(statuses.values()) == [0, 2]
        loser = max(statuses, key=statuses.get)
        winner = children[min(statuses, key=statuses.get)]
        message = said(loser).splitlines()[-1]
        assert re.match(rf"error: output_dir=.*: process {winner} on .* is training in it; wait for", message), message
        assert len(rows(folder)) == 3 and not damage(folder / "checkpoint-2")
    print(f"{trials} starts of two processes: one trained each time, {time.monotonic() - begin:.0f} s")


# --- a long run ---


@pytest.mark.slow
def test_a_long_run_takes_no_more_memory_and_no_more_files(tmp_path, undisturbed_of):
    """Of 2,000 updates (short form: 200), with logs, evaluations and saves; measured at a tenth, and at the end."""
    begin = time.monotonic()
    steps = 2000 if LONG else 200
    real = Trainer._log

    def measuring() -> None:
        def log(self, *arguments):
            if self.step in (steps // 10, steps):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                print(f"resident {pages * os.sysconf('SC_PAGESIZE')} files {len(os.listdir('/proc/self/fd'))}")
            return real(self, *arguments)

        Trainer._log = log

    long = [f"max_steps={steps}", "save_steps=50", "eval_steps=50", "logging_steps=10", "per_device_train_batch_size=1",
            "gradient_accumulation_steps=1"]  # fmt: skip
    assert wait(start(tmp_path / "a", *long, before=measuring)) == 0, said(tmp_path / "a")
    output = said(tmp_path / "a")
    (early, files), (late, files_late) = re.findall(r"resident (\d+) files (\d+)", output)
    print(f"{steps} updates: resident {int(early) / 2**20:.0f} MB, then {int(late) / 2**20:.0f} MB, {files} files, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    assert int(late) < 1.05 * int(early) and files == files_late
    logged = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    for _ in range(3):
        assert wait(start(tmp_path / "a", *long)) == 0
        assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == logged

"""The run directory: no run is lost by accident, TensorBoard shows what metrics.jsonl holds, a sweep is one table."""

import csv
import fcntl
import json
import sys
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_trainer import config

from dpo.data import read_examples
from dpo.formats import Example
from dpo.run import RunDir, collect_sweep, write_results
from dpo.trainer import Trainer
from train import train

TRAIN = {"step": 5, "epoch": 0.5, "loss": 0.6931, "learning_rate": 5e-7, "rewards/margins": -0.0625}
EVALUATION = {"step": 5, "epoch": 0.5, "eval_loss": 0.7, "eval_rewards/accuracies": 1.0}
LATER = {"step": 10, "epoch": 1.0, "loss": 0.6, "learning_rate": 0.0, "rewards/margins": 0.25}


def new_run(path: Path, *, overwrite: bool = False, resume: bool = False) -> RunDir:
    return RunDir(path, overwrite=overwrite, resume=resume)


def finished_run(path: Path) -> None:
    run = new_run(path)
    run.write_config(OmegaConf.create({"seed": 7, "output_dir": "${seed}"}))
    run.write_skipped(["f:1: bad"])
    run.log(TRAIN)
    run.close()
    write_results(path, {"seed": "7"}, {"loss": 0.5})
    (path / "checkpoint-5").mkdir()
    (path / "checkpoint-5" / "trainer_state.json").write_text("{}")


def logged(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# --- whose directory it is ---


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    finished_run(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=rf"output_dir={tmp_path}/run: holds a run already; .*overwrite_output_dir=true"
    ):
        new_run(tmp_path / "run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"output_dir={tmp_path}/file: is a file; name a directory"):
        new_run(tmp_path / "file")


def test_a_directory_without_a_run_is_used_and_its_files_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    new_run(tmp_path).close()
    new_run(tmp_path / "a" / "b").close()
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "a" / "b").is_dir()


def test_overwriting_leaves_nothing_of_the_earlier_run_but_what_is_not_its(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    new_run(tmp_path, overwrite=True).close()
    left = {path.name for path in tmp_path.iterdir()} - {
        "config.yaml",
        "run.lock",
    }  # the config is written again a moment later
    assert left == {"runs", "notes.txt"} and len(list((tmp_path / "runs").iterdir())) == 1


def test_overwriting_removes_the_earlier_result(tmp_path):
    """A whole model written beside a stale adapter would be evaluated as that adapter: run= looks for it first."""
    finished_run(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    new_run(tmp_path, overwrite=True).close()
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "adapter_config.json").exists()


def test_overwriting_removes_nothing_from_a_directory_that_holds_no_run(tmp_path):
    """Another program's model and checkpoints are not ours to delete, whatever output_dir says."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "model.safetensors").write_text("{}")
    new_run(tmp_path, overwrite=True).close()
    assert (tmp_path / "checkpoint-500").is_dir() and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_resuming_keeps_everything(tmp_path, overwrite):
    finished_run(tmp_path)
    new_run(tmp_path, overwrite=overwrite, resume=True).close()
    assert logged(tmp_path) == [TRAIN]
    assert (tmp_path / "checkpoint-5" / "trainer_state.json").exists() and (tmp_path / "results.json").exists()


def test_a_process_that_has_just_begun_to_train_is_named(tmp_path):
    """Between its lock and its name lie a few instructions."""
    with open(tmp_path / "run.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.05, lambda: print("process 7 on host", file=lock, flush=True)).start()
        with pytest.raises(ValueError, match=f"output_dir={tmp_path}: process 7 on host is training in it; wait"):
            new_run(tmp_path)


# --- what it holds ---


def test_config_is_written_resolved(tmp_path):
    finished_run(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "seed: 7\noutput_dir: 7\n"


def test_skipped_rows_are_a_line_each_in_utf8(tmp_path):
    run = new_run(tmp_path)
    run.write_skipped(["f:1: chosen is empty", "f:2: 猫"])
    run.close()
    assert (tmp_path / "skipped_rows.txt").read_text(encoding="utf-8") == "f:1: chosen is empty\nf:2: 猫\n"


def test_every_log_is_a_line_of_metrics_jsonl_at_once_and_exactly(tmp_path):
    """Readable while the run goes on; floats come back bit for bit."""
    run = new_run(tmp_path)
    for count, metrics in enumerate((TRAIN, EVALUATION, {**LATER, "loss": 0.1 + 0.2}), start=1):
        run.log(metrics)
        assert len(logged(tmp_path)) == count
    run.close()
    assert logged(tmp_path) == [TRAIN, EVALUATION, {**LATER, "loss": 0.1 + 0.2}]


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag of a run's TensorBoard events, read back as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "runs"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def as_tags(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard must show of metrics.jsonl; events hold float32."""
    tags: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                tag = "eval/" + name[5:] if name.startswith("eval_") else "train/" + name
                tags.setdefault(tag, []).append((row["step"], pytest.approx(value, rel=1e-7)))
    return tags


def test_tensorboard_shows_what_metrics_jsonl_holds(tmp_path):
    run = new_run(tmp_path)
    for metrics in (TRAIN, EVALUATION, LATER):
        run.log(metrics)
    run.close()
    shown = scalars(tmp_path)
    assert shown == as_tags(logged(tmp_path))
    assert {"train/loss", "train/learning_rate", "train/rewards/margins", "eval/loss"} <= shown.keys()
    assert "eval/rewards/accuracies" in shown and not any("step" in tag for tag in shown)


def test_without_tensorboard_metrics_jsonl_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the extra is not installed
    run = new_run(tmp_path)
    run.log(TRAIN)
    run.close()
    assert logged(tmp_path) == [TRAIN] and not (tmp_path / "runs").exists()


# --- resuming ---


def test_forget_after_removes_what_a_resume_will_write_again(tmp_path):
    """A checkpoint of step 5 was written after what was logged at step 5, which therefore stays."""
    run = new_run(tmp_path)
    for metrics in ({**TRAIN, "step": 4}, TRAIN, EVALUATION, {**TRAIN, "step": 6}, LATER):
        run.log(metrics)
    run.forget_after(5)
    assert [row["step"] for row in logged(tmp_path)] == [4, 5, 5]
    run.forget_after(0)
    assert logged(tmp_path) == []
    run.close()


def test_forget_after_without_metrics_is_nothing(tmp_path):
    run = new_run(tmp_path)
    run.forget_after(5)
    run.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_that_a_crash_cut_short_does_not_stop_the_resume(tmp_path):
    run = new_run(tmp_path)
    run.log(TRAIN)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    run.forget_after(5)
    run.log(LATER)
    run.close()
    assert logged(tmp_path) == [TRAIN, LATER]


def test_after_a_resume_tensorboard_shows_every_step_once(tmp_path):
    """Steps 5 and 10 are logged, the run is resumed from a checkpoint of step 5, and step 10 is made again."""
    first = new_run(tmp_path)
    for metrics in (TRAIN, LATER):
        first.log(metrics)
    first.close()
    resumed = new_run(tmp_path, resume=True)
    resumed.forget_after(5)
    resumed.log({**LATER, "loss": 0.4})
    resumed.close()
    assert logged(tmp_path) == [TRAIN, {**LATER, "loss": 0.4}]
    assert scalars(tmp_path) == as_tags(logged(tmp_path))


def test_tensorboard_shows_every_number_of_a_run_that_was_killed_and_resumed(tmp_path):
    """From step 2 of 4, after logs, samples and an evaluation of later steps had been written."""
    common = ["max_steps=4", "save_steps=2", "max_samples=8", "val_size=2", "eval_strategy=steps", "eval_steps=1",
              "num_samples=1", "max_new_tokens=2", "per_device_train_batch_size=2"]  # fmt: skip
    write, calls = Trainer._log_evaluation, []

    def killed(self, *metrics):
        result = write(self, *metrics)
        calls.append(self.step)
        if self.step == 3:
            raise KeyboardInterrupt  # nobody listens for it: no checkpoint is written
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log_evaluation", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, *common))
    assert calls == [0, 1, 2, 3] and scalars(tmp_path)["eval/loss"][-1][0] == 3
    train(config(tmp_path, *common, "resume_from_checkpoint=true"))
    shown, rows = scalars(tmp_path), logged(tmp_path)
    assert shown == as_tags(rows)
    assert [step for step, _ in shown["train/loss"]] == [step for step, _ in shown["eval/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in shown["eval/completions/kl"]] == [0, 1, 2, 3, 4]


# --- sweeps ---


def test_results_hold_overrides_and_metrics(tmp_path):
    write_results(tmp_path, {"pref_beta": "0.1"}, {"eval_loss": 0.1 + 0.2})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"overrides": {"pref_beta": "0.1"}, "metrics": {"eval_loss": 0.1 + 0.2}}


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sweep_of(folder: Path, jobs: dict[str, tuple[dict[str, str], dict[str, float]]]) -> list[dict[str, str]]:
    for job, (overrides, metrics) in jobs.items():
        (folder / job).mkdir()
        write_results(folder / job, overrides, metrics)
    return table(collect_sweep(folder, last_job=99))


def test_a_sweep_is_a_row_per_job_in_order_of_their_numbers(tmp_path):
    """2 before 10, though "10" < "2"; what is no numbered job is no row."""
    jobs = {job: ({"pref_beta": job}, {"eval_loss": int(job) / 4}) for job in ("10", "2", "0")}
    for stray in ("notes", "checkpoint-1"):
        (tmp_path / stray).mkdir()
        write_results(tmp_path / stray, {"pref_beta": "9"}, {})
    rows = sweep_of(tmp_path, jobs)
    assert [(row["job"], row["pref_beta"], row["eval_loss"]) for row in rows] == [
        ("0", "0", "0.0"), ("2", "2", "0.5"), ("10", "10", "2.5")
    ]  # fmt: skip


def test_an_unfinished_job_has_no_row_yet_and_a_missing_value_is_empty(tmp_path):
    (tmp_path / "1").mkdir()
    rows = sweep_of(tmp_path, {"0": ({"seed": "7"}, {"a": 1.0}), "2": ({}, {"b": 2.0})})
    assert rows == [
        {"job": "0", "seed": "7", "a": "1.0", "b": ""}, {"job": "2", "seed": "", "a": "", "b": "2.0"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "metric"), [("loss=ipo", {"loss": 0.25}), ("learning_rate=1e-6", {"learning_rate": 0.0})]
)
def test_an_override_and_a_metric_of_one_name_are_two_columns(tmp_path, key, metric):
    """-m loss=sigmoid,ipo and -m learning_rate=1e-6,1e-5: a table that forgot what was swept would be useless."""
    name, value = key.split("=")
    (row,) = sweep_of(tmp_path, {"0": ({name: value}, metric)})
    assert row[name] == value
    assert str(metric[name]) in row.values()


def test_held_out_pairs_come_back_with_all_that_their_rows_say(tmp_path):
    scores = {"safety": {"chosen": 5.0, "rejected": 4.0}}
    messages = ({"role": "user", "content": "Hi"},)
    examples = [
        Example(messages, ("Yes", "No"), "f:1", weight=0.5, margin=2.0, soft_label=0.75, dimensions=scores),
        Example(messages, ("A", "B"), "f:2"),
    ]
    RunDir(tmp_path / "run", overwrite=False, resume=False).write_held_out(examples)
    read, _ = read_examples(tmp_path / "run" / "held_out.jsonl", stage="dpo", on_bad_row="stop")
    fields = ("messages", "responses", "weight", "margin", "soft_label", "dimensions")
    assert [[getattr(e, f) for f in fields] for e in read] == [[getattr(e, f) for f in fields] for e in examples]

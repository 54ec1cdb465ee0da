"""The run directory: what a run leaves behind, and where.

config.yaml                  the resolved config
report.md, curves.png        what it came to, to read (dpo.report)
metrics.jsonl                one object per logged step and evaluation
ledger.jsonl                 loss and margin of every row whenever it was seen (dpo.watch)
samples.jsonl                answers to fixed prompts at every evaluation (dpo.samples)
runs/                        TensorBoard events (extra `log`)
skipped_rows.txt             rows left out under on_bad_row=skip, a line each
held_out.jsonl               the rows that val_size held out
checkpoint-N/                after step N (dpo.checkpoint)
postmortem-N.json            of a run that numbers which were not finite stopped (dpo.postmortem)
run.lock                     held by the process that trains in the directory
adapter_*.* or a model       the result, in PEFT's or Hugging Face's format
results.json                 overrides and final metrics; a sweep collects them in its results.csv
"""

import csv
import fcntl
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from dpo.formats import NUMBERS, Example
from dpo.step_log import StepLog, to_json
from models.command import read_config_file
from models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models.weights import WEIGHTS

CONFIG, RESULTS, HELD_OUT = "config.yaml", "results.json", "held_out.jsonl"
METRICS, LEDGER, SAMPLES = "metrics.jsonl", "ledger.jsonl", "samples.jsonl"
LOCK = "run.lock"


# Keys that a resumed run may change: where, how often and how much it reports, saves and evaluates, and how long it is.
FREE_ON_RESUME = frozenset({
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_train", "device", "eval_dataset",
    "per_device_eval_batch_size", "logging_steps", "eval_on_start", "eval_strategy", "eval_steps", "save_strategy",
    "save_steps", "attn_implementation", "torch_compile",
    "max_steps", "num_train_epochs", "plot_loss", "num_samples", "max_new_tokens", "ref_cache_dir", "tokenized_path",
    "save_total_limit", "load_best_model_at_end", "early_stopping_steps",
})  # fmt: skip


class Occupied(ValueError):
    """output_dir holds a run that is to be left alone."""


def check_output_dir(path: Path, *, overwrite: bool, resume: bool) -> None:
    """ValueError where output_dir is no directory, or holds a run that is neither to be overwritten nor resumed."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir={path}: is a file; name a directory")
    if (path / CONFIG).exists() and not (overwrite or resume):
        raise Occupied(
            f"output_dir={path}: holds a run already; name another, or pass overwrite_output_dir=true or "
            "resume_from_checkpoint=true"
        )


def check_resume(path: Path, cfg: DictConfig) -> None:
    """ValueError where the run that is resumed was made with another config, beyond the keys it may change."""
    if not (path / CONFIG).is_file():
        return
    saved = OmegaConf.to_container(OmegaConf.load(path / CONFIG))
    assert isinstance(saved, dict)
    for key in map(str, cfg):
        # A key that the run does not know is younger than the run.
        if key not in FREE_ON_RESUME and key in saved and saved[key] != cfg[key]:
            raise ValueError(
                f"{key}={cfg[key]}: the run in {path} was made with {key}={saved[key]}; resume with the same "
                "config, or name another output_dir"
            )


def with_chosen_cut(cfg: DictConfig, path: Path) -> DictConfig:
    """cfg, where max_tokens_per_micro_batch=auto becomes the number that the run in `path` chose for itself.

    Another cut would round otherwise, and what is free differs from one day to the next.
    """
    if cfg.max_tokens_per_micro_batch == "auto" and (path / CONFIG).is_file():
        saved = OmegaConf.to_container(OmegaConf.load(path / CONFIG))
        assert isinstance(saved, dict)
        cfg.max_tokens_per_micro_batch = saved.get("max_tokens_per_micro_batch") or "auto"
    return cfg


class RunDir:
    """One run's directory, opened by one process alone: an earlier run in it is removed (overwrite) or continued."""

    def __init__(self, path: Path, *, overwrite: bool, resume: bool):
        check_output_dir(path, overwrite=overwrite, resume=resume)
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path)
        self.metrics, self.ledger, self.samples = (StepLog(path / name) for name in (METRICS, LEDGER, SAMPLES))
        if overwrite and not resume and (path / CONFIG).exists():
            self._remove_earlier_run()
        self._tensorboard = _tensorboard_writer(path / "runs")

    def _remove_earlier_run(self) -> None:
        logs, texts = (METRICS, LEDGER, SAMPLES), ("skipped_rows.txt", "report.md", "curves.png")
        for name in (*logs, *texts, RESULTS, HELD_OUT, ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS):
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.glob("postmortem-*.json"):
            path.unlink()
        for folder in [self.path / "runs", *self.path.glob("checkpoint-*")]:
            shutil.rmtree(folder, ignore_errors=True)

    def write_config(self, cfg: DictConfig) -> None:
        (self.path / CONFIG).write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")

    def write_skipped(self, rows: Sequence[str]) -> None:
        (self.path / "skipped_rows.txt").write_text("".join(row + "\n" for row in rows), encoding="utf-8")

    def write_held_out(self, examples: Sequence[Example]) -> None:
        """The rows that val_size held out, in the guide's format, for a later evaluation of this run."""
        with open(self.path / HELD_OUT, "w", encoding="utf-8") as file:
            for example in examples:
                turns = [{"from": m["role"], "value": m["content"]} for m in example.messages]
                row: dict[str, Any] = {"conversations": turns}
                if example.label is None:
                    row |= dict(zip(("chosen", "rejected"), example.responses, strict=True))
                else:
                    turns.append({"from": "assistant", "value": example.responses[0]})
                    row["label"] = example.label
                row |= {
                    name: value for name in (*NUMBERS, "dimensions") if (value := getattr(example, name)) is not None
                }
                file.write(json.dumps(row) + "\n")

    def record(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to ledger.jsonl."""
        self.ledger.append(rows)

    def log(self, metrics: dict[str, float]) -> None:
        """Append one object to metrics.jsonl and to TensorBoard, there as train/NAME or eval/NAME."""
        self.metrics.append([metrics])
        if self._tensorboard is not None:
            for name, value in metrics.items():
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                if name != "step":
                    self._tensorboard.add_scalar(tag, value, int(metrics["step"]))
            self._tensorboard.flush()

    def forget_after(self, step: int) -> None:
        """Remove what a resume from `step` will write again."""
        for log in (self.metrics, self.ledger, self.samples):
            log.forget_after(step)
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._tensorboard = _tensorboard_writer(self.path / "runs", purge_step=step + 1)

    def last_metrics(self) -> tuple[dict[str, float], dict[str, float]]:
        """The last training row and the last evaluation of metrics.jsonl."""
        rows = self.logged()
        evaluations = [row for row in rows if is_evaluation(row)]
        training = [row for row in rows if "learning_rate" in row]
        last = {k: v for k, v in evaluations[-1].items() if k not in ("step", "epoch")} if evaluations else {}
        return (training[-1] if training else {}), last

    def logged(self) -> list[dict[str, float]]:
        """Every row of metrics.jsonl."""
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in self.metrics.rows()]

    def sync(self) -> None:
        """Have the disk hold every line of the logs, as it must before it holds a later checkpoint."""
        for log in (self.metrics, self.ledger, self.samples):
            log.sync()

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.close()


def is_evaluation(row: Mapping[str, float]) -> bool:
    """Whether a row of metrics.jsonl is an evaluation's, or else of training."""
    return any(key.startswith("eval_") for key in row)


def _locked(path: Path) -> IO[str]:
    """The lock of a run directory, held until it is closed or the process ends, however it ends."""
    lock = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open as long as the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.2)  # its holder may have begun just now, and not have written its name yet
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise Occupied(f"output_dir={path}: {holder} is training in it; wait for it, or name another") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _tensorboard_writer(path: Path, purge_step: int | None = None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `log` is not installed; metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(str(path), purge_step=purge_step)


def write_results(run_dir: Path, overrides: dict[str, str], metrics: dict[str, float], error: str = "") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    result = {"overrides": overrides, "metrics": json.loads(to_json(metrics))} | ({"error": error} if error else {})
    text = json.dumps(result, indent=2)
    (run_dir / RESULTS).write_text(text + "\n", encoding="utf-8")


def is_finished(run_dir: Path) -> bool:
    """Whether a run ended here with metrics, which a later mistake in the same place may not replace."""
    path = run_dir / RESULTS
    return path.is_file() and "error" not in json.loads(path.read_text(encoding="utf-8"))


def collect_sweep(sweep_dir: Path, last_job: int) -> Path:
    """results.csv of a sweep: a row per finished job up to last_job, its number, its overrides, its final metrics.

    Jobs of a higher number that lie there are of an earlier, longer sweep.
    """
    finished = [path.parent for path in sweep_dir.glob(f"*/{RESULTS}") if path.parent.name.isdigit()]
    finished = [path for path in finished if int(path.name) <= last_job]
    rows = []
    for job in sorted(finished, key=lambda path: int(path.name)):
        result = json.loads((job / RESULTS).read_text(encoding="utf-8"))
        # -m learning_rate=... and the metric learning_rate, the last step's, are two things.
        metrics = {f"final_{k}" if k in result["overrides"] else k: v for k, v in result["metrics"].items()}
        failed = {"error": result["error"]} if "error" in result else {}
        rows.append({"job": job.name, **result["overrides"], **metrics, **failed})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    target = sweep_dir / "results.csv"
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return target


def saved_keys(run: str, wanted: Collection[str]) -> dict[str, Any]:
    """What an evaluation takes from a saved run: the wanted keys, its result as policy, its start as reference."""
    path = Path(run)
    if not (path / CONFIG).is_file():
        raise ValueError(f"run={run}: holds no config.yaml; name the directory of a finished run")
    saved = read_config_file(path / CONFIG)
    # max_samples was of the training rows; a held-out file is evaluated whole.
    keys = {k: v for k, v in saved.items() if k in wanted and k != "max_samples" and v is not None}
    if (path / HELD_OUT).is_file():
        keys["eval_dataset"] = str(path / HELD_OUT)
        keys.pop("data_format", None)  # it was of the rows that were held out of
    if (path / ADAPTER_CONFIG).is_file():
        started_from = saved.get("adapter_name_or_path")
        # A continued adapter was its own reference, unless another was named.
        if started_from and not saved.get("ref_model") and not saved.get("ref_model_adapters"):
            keys["ref_model_adapters"] = started_from
        return keys | {"adapter_name_or_path": run}
    if (path / WEIGHTS).is_file():
        return keys | {"model_name_or_path": run, "ref_model": saved.get("ref_model") or saved["model_name_or_path"]}
    raise ValueError(f"run={run}: holds neither adapter_config.json nor model.safetensors; has the run finished?")

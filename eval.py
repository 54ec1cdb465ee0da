"""Evaluate: `python eval.py task=preference run=RUN_DIR eval_dataset=FILE` (every key in conf/eval.yaml).

A task is a file of dpo/evals/ with the function `run`, from the config to a Result.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo.config import EvalConfig, check
from dpo.evals import provenance
from dpo.evals.results import REPORT, RESULTS, Result, read, show, write
from dpo.run import CONFIG, collect_sweep, write_results
from models.command import one_line_errors, prepare_command_line, while_read

ConfigStore.instance().store(name="eval_schema", node=EvalConfig)

FAILED_JOBS: list[str] = []
"""Jobs of a sweep that ended in an error; the others run all the same."""


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    pairs = (item.partition("=") for item in job.overrides.task if "=" in item)
    # Where it was written does not change what was found.
    pairs = (pair for pair in pairs if pair[0] not in ("output_dir", "output_file"))
    overrides = {key: value.strip("'") for key, _, value in pairs}
    if job.mode == RunMode.MULTIRUN:
        sweep_job(cfg, overrides, int(job.job.num))
        return
    with one_line_errors(), while_read():
        evaluate(cfg, overrides)


def sweep_job(cfg: DictConfig, overrides: dict[str, str], number: int) -> None:
    """One job of a sweep, in a directory of its own; a mistake ends the job and is a row of the sweep's results."""
    sweep_dir = Path(cfg.output_dir)
    cfg.output_dir = str(sweep_dir / str(number))
    print(f"job {number}: {' '.join(f'{key}={value}' for key, value in overrides.items())}")
    try:
        evaluate(cfg, overrides)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        FAILED_JOBS.append(str(number))
        print(f"error: job {number}: {error}", file=sys.stderr)
        if not (Path(cfg.output_dir) / RESULTS).exists():
            write_results(Path(cfg.output_dir), overrides, {}, error=str(error))
    print(f"sweep: {collect_sweep(sweep_dir, last_job=number)}")


def evaluate(cfg: DictConfig, overrides: dict[str, str]) -> Result:
    """One evaluation, from config to files."""
    check(cfg)
    check_output_dir(Path(cfg.output_dir), cfg.task)
    start = time.time()
    result: Result = import_module(f"dpo.evals.{cfg.task}").run(cfg)
    result.provenance = provenance.of_code(cfg) | result.provenance
    result.time |= {"started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start))}
    result.time |= {"seconds": round(time.time() - start, 3)}
    for line in show(result):
        print(line)
    write(result, Path(cfg.output_dir), overrides)
    if cfg.output_file:
        numbers = result.metrics | {name: value for name, value in result.time.items() if name == "eval_runtime"}
        Path(cfg.output_file).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(f"report: {Path(cfg.output_dir) / REPORT}")
    if result.error:
        raise ValueError(result.error)
    return result


def check_output_dir(path: Path, task: str) -> None:
    """ValueError where the result would replace something else than an earlier one of the same task."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir={path}: is a file; name a directory")
    if (path / CONFIG).exists():
        raise ValueError(f"output_dir={path}: holds a training run; name another directory")
    if (path / RESULTS).is_file():
        held = read(path / RESULTS).get("task", task)
        if held != task:
            raise ValueError(f"output_dir={path}: holds the result of task={held}; name another directory")


if __name__ == "__main__":
    prepare_command_line(EvalConfig)
    main()
    if FAILED_JOBS:
        sys.exit(2)

"""Is the data worth training on? `python -m dpo.doctor dataset=FILE key=value ...` (keys: conf/doctor.yaml).

The guide's good pairs differ clearly, in more than length and formatting, on topic, consistently and diversely. Each of
these is measured; nothing is changed but in a new file (export=).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from dpo.data import read_examples
from dpo.doctor.check import Check
from dpo.doctor.diversity import check_diversity
from dpo.doctor.duplicates import check_duplicates
from dpo.doctor.export import check_export, dropped_path, export_rows
from dpo.doctor.leaks import benchmark_prompts, leaks
from dpo.doctor.page import write_page
from dpo.doctor.report import dropped, summary, write_json
from dpo.doctor.shortcuts import check_shortcuts
from dpo.doctor.structure import check_structure
from dpo.doctor.text import Corpus
from dpo.doctor.topic import check_topic
from dpo.files import find_dataset
from dpo.formats import Example
from models.command import CONF, one_line_errors, prepare_command_line, refuse_unset
from models.weights import WORLD


@dataclass
class DoctorConfig:
    """Every key of dpo.doctor; see conf/doctor.yaml for what each means."""

    dataset: str = MISSING
    dataset_dir: str = MISSING
    eval_dataset: str | None = MISSING
    benchmarks: list[str] = MISSING
    max_samples: int | None = MISSING
    on_bad_row: str = MISSING
    model_name_or_path: str | None = MISSING
    export: str | None = MISSING
    output_dir: str = MISSING
    seed: int = MISSING


ConfigStore.instance().store(name="doctor_schema", node=DoctorConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="doctor")
def main(cfg: DictConfig) -> None:
    with one_line_errors():
        examine(cfg)


def check(cfg: DictConfig) -> None:
    refuse_unset(cfg)
    for key, rule, holds in (
        ("on_bad_row", "expected one of stop, skip", cfg.on_bad_row in ("stop", "skip")),
        ("max_samples", "must be at least 1", cfg.max_samples is None or cfg.max_samples >= 1),
        ("seed", "must be at least 0 and below 2^32", 0 <= cfg.seed < 2**32),
    ):
        if not holds:
            raise ValueError(f"{key}={cfg[key]}: {rule}")


def examine(cfg: DictConfig) -> list[Check]:
    """All checks, told in the terminal and written to output_dir, and the export where one is asked for."""
    check(cfg)
    dataset = _path(cfg, cfg.dataset, "train.jsonl")
    export = check_export(cfg.export, dataset) if cfg.export else None
    benchmarks = [(path, *benchmark_prompts(path)) for path in (_path(cfg, b, "eval.jsonl") for b in cfg.benchmarks)]
    held_out = _path(cfg, cfg.eval_dataset, "eval.jsonl") if cfg.eval_dataset else None

    examples, bad = read_examples(dataset, stage="dpo", on_bad_row=cfg.on_bad_row, max_samples=cfg.max_samples)
    corpus = Corpus(examples)
    checks = check_structure(corpus, bad) + check_duplicates(corpus)
    if held_out:
        held, also_bad = read_examples(held_out, stage="dpo", on_bad_row=cfg.on_bad_row)
        if also_bad:
            print(f"eval_dataset: {len(also_bad):,} rows cannot be used; the first: {also_bad[0]}")
        other = Corpus(held, corpus.vocabulary)
        checks.append(leaks(corpus, "eval_dataset", other.prompt_words, [example.source for example in held]))
    for path, prompts, places in benchmarks:
        checks.append(leaks(corpus, path.stem, corpus.vocabulary.read(prompts), places))
    checks += check_shortcuts(corpus, cfg.seed) + check_topic(corpus, cfg.seed) + check_diversity(corpus)
    if cfg.model_name_or_path:
        checks += _with_model(examples, cfg)

    print(summary(checks, corpus))
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    about = {"dataset": str(dataset), "sha256": hashlib.sha256(dataset.read_bytes()).hexdigest()}
    write_json(output / "report.json", checks, corpus, about)
    write_page(output / "report.html", checks, corpus, about)
    print(f"report: {output / 'report.html'}, {output / 'report.json'}")
    if export:
        kept, left_out = export_rows(dataset, export, dropped(checks), cfg.max_samples)
        print(f"export: {kept:,} rows in {export}, {left_out:,} left out, in {dropped_path(export)}")
    return checks


def _path(cfg: DictConfig, dataset: str, world_file: str) -> Path:
    return WORLD / "data" / world_file if dataset == "world" else find_dataset(dataset, cfg.dataset_dir)


def _with_model(examples: Sequence[Example], cfg: DictConfig) -> list[Check]:
    try:
        with_model: Any = import_module("dpo.doctor.with_model")
    except ModuleNotFoundError:
        raise ValueError(
            f"model_name_or_path={cfg.model_name_or_path}: the checks that ask a model are not here; leave it out"
        ) from None
    return with_model.checks(examples, cfg)


if __name__ == "__main__":
    prepare_command_line(DoctorConfig)
    main()

"""Is the data worth training on? `python -m dpo.doctor dataset=FILE key=value ...` (keys: conf/doctor.yaml).

The guide's good pairs differ clearly, in more than length and formatting, on topic, consistently and diversely. Each of
these is measured; nothing is changed but in a new file (export=). `ledger=RUN_DIR` asks a finished run instead.
"""

from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from dpo.build import read_datasets, sources_of
from dpo.config import AT_LEAST_1, POSITIVE, SHARE, check_values
from dpo.doctor.cartography import map_run
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
from models.command import CONF, one_line_errors, prepare_command_line, refuse_unset, while_read


@dataclass
class DoctorConfig:
    """Every key of dpo.doctor; see conf/doctor.yaml for what each means."""

    dataset: Any = MISSING
    ledger: str | None = MISSING
    dataset_dir: str = MISSING
    data_format: str | None = MISSING
    ranking_to_pairs: str = MISSING
    eval_dataset: Any = MISSING
    benchmarks: list[str] = MISSING
    max_samples: int | None = MISSING
    on_bad_row: str = MISSING
    model_name_or_path: str | None = MISSING
    template: str = MISSING
    date_string: str | None = MISSING
    cutoff_len: int = MISSING
    per_device_eval_batch_size: int = MISSING
    bf16: bool = MISSING
    fp16: bool = MISSING
    device: str = MISSING
    displacement_share: float = MISSING
    flip_folds: int = MISSING
    flip_rounds: int = MISSING
    flip_epochs: float = MISSING
    flip_learning_rate: float = MISSING
    flip_beta: float = MISSING
    flip_batch_size: int = MISSING
    flip_lora_rank: int = MISSING
    flip_share: float = MISSING
    export: str | None = MISSING
    output_dir: str = MISSING
    seed: int = MISSING


ConfigStore.instance().store(name="doctor_schema", node=DoctorConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="doctor")
def main(cfg: DictConfig) -> None:
    with one_line_errors(), while_read():
        examine(cfg)


RULES = {
    "displacement_share": SHARE, "flip_share": SHARE, "flip_epochs": POSITIVE, "flip_learning_rate": POSITIVE,
    "flip_beta": POSITIVE, "flip_batch_size": AT_LEAST_1, "flip_rounds": AT_LEAST_1, "flip_lora_rank": AT_LEAST_1,
    "flip_folds": ((lambda value: value == 0 or value >= 2), "must be at least 2, or 0 for no check"),
}  # fmt: skip


def examine(cfg: DictConfig) -> list[Check]:
    """All checks, told in the terminal and written to output_dir, and the export where one is asked for.

    With ledger no check, but the map of its run.
    """
    if cfg.ledger:
        for key in ("dataset", "eval_dataset", "benchmarks", "model_name_or_path", "export"):
            if not OmegaConf.is_missing(cfg, key) and cfg[key]:
                raise ValueError(f"ledger={cfg.ledger} with {key}={cfg[key]}: is not read there; leave one of them out")
        map_run(cfg)
        return []
    refuse_unset(cfg, dataset=" (or ledger=RUN_DIR)")
    check_values(cfg, RULES)
    sources = sources_of(cfg, cfg.dataset, "train.jsonl")
    files = [path for source in sources for path in source.files]
    export = check_export(cfg.export, files) if cfg.export else None
    benchmarks = [
        (path, *benchmark_prompts(path))
        for name in cfg.benchmarks
        for source in sources_of(cfg, name, "eval.jsonl")
        for path in source.files
    ]
    datasets, bad = read_datasets(cfg, cfg.dataset, "train.jsonl")
    examples = [example for dataset in datasets.values() for example in dataset]
    corpus = Corpus(examples)
    checks = check_structure(corpus, bad) + check_duplicates(corpus)
    if cfg.eval_dataset:
        held_out, also_bad = read_datasets(cfg, cfg.eval_dataset, "eval.jsonl")
        held = [example for dataset in held_out.values() for example in dataset]
        if also_bad:
            print(f"eval_dataset: {len(also_bad):,} rows cannot be used; the first: {also_bad[0]}")
        other = Corpus(held, corpus.vocabulary)
        checks.append(leaks(corpus, "eval_dataset", other.prompt_words, [example.source for example in held]))
    for path, prompts, places in benchmarks:
        checks.append(leaks(corpus, path.stem, corpus.vocabulary.read(prompts), places))
    checks += check_shortcuts(corpus, cfg.seed) + check_topic(corpus, cfg.seed) + check_diversity(corpus)
    if cfg.model_name_or_path:
        from dpo.doctor.with_model import checks as checks_with_model

        checks += checks_with_model(examples, cfg)

    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    about = {"dataset": ", ".join(map(str, files)), "sha256": ", ".join(map(_sha256, files))}
    write_json(output / "report.json", checks, corpus, about)
    write_page(output / "report.html", checks, corpus, about)
    told = [summary(checks, corpus), f"report: {output / 'report.html'}, {output / 'report.json'}"]
    if export:
        kept, left_out = export_rows(cfg, sources, export, dropped(checks))
        told.append(f"export: {kept:,} rows in {export}, {left_out:,} left out, in {dropped_path(export)}")
    print("\n".join(told))  # when all is written: whoever reads may have enough of it
    return checks


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    prepare_command_line(DoctorConfig)
    main()

"""The rows worth keeping, as they stand in the dataset, and beside them those left out with the reason."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from omegaconf import DictConfig

from dpo.data import rows_wanted
from dpo.formats import BadRow, examples_of
from dpo.sources import Source


def check_export(export: str, files: Sequence[Path]) -> Path:
    """The path to write; ValueError where something would be lost."""
    path = Path(export).expanduser()
    if path.suffix != ".jsonl":
        raise ValueError(f"export={export}: expected the name of a .jsonl file")
    if path.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"export={export}: is the dataset itself, which is never changed; name another file")
    for file in (path, dropped_path(path)):
        if file.exists():
            raise ValueError(f"export={export}: {file} exists, and is never overwritten; name another file")
    return path


def dropped_path(path: Path) -> Path:
    return path.with_name(path.name + ".dropped.jsonl")


def export_rows(
    cfg: DictConfig, sources: Sequence[Source], path: Path, reasons: Mapping[int, Sequence[str]]
) -> tuple[int, int]:
    """Writes the rows whose Examples have no reason to `path`, all others with the reasons to dropped_path(path).

    Returns both numbers. reasons: by the index of an Example, as read_datasets(on_bad_row="skip") counts them; a row
    that is several pairs goes if one of them does. Rows of a registry's entry are written under our keys.
    """
    index, counts = 0, [0, 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "x", encoding="utf-8") as kept, open(dropped_path(path), "x", encoding="utf-8") as left_out:
        for source, row in chain.from_iterable(islice(s.rows(), rows_wanted(s, cfg.max_samples)) for s in sources):
            try:
                examples = examples_of(
                    row, source, "dpo", data_format=cfg.data_format, ranking_to_pairs=cfg.ranking_to_pairs
                )
            except BadRow as error:
                why: Sequence[str] = [f"bad row: {error}"]
            else:
                why = [reason for i in range(len(examples)) for reason in reasons.get(index + i, ())]
                index += len(examples)
            counts[bool(why)] += 1
            if why:
                row = {"source": source, "why": list(why), "row": None if isinstance(row, BadRow) else row}
            # Text as it is, unless it holds half a surrogate pair, which only an escape can write.
            # A .parquet file may hold dates and the like: as text.
            text = json.dumps(row, ensure_ascii=False, default=str)
            text = text if text.isascii() or _has_utf8(text) else json.dumps(row, default=str)
            (left_out if why else kept).write(text + "\n")
    return counts[0], counts[1]


def _has_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

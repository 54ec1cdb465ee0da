"""The rows worth keeping, as they stand in the dataset, and beside them those left out with the reason."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from dpo.files import rows_of
from dpo.formats import BadRow, examples_of


def check_export(export: str, dataset: Path) -> Path:
    """The path to write; ValueError where something would be lost."""
    path = Path(export).expanduser()
    if path.suffix != ".jsonl":
        raise ValueError(f"export={export}: expected the name of a .jsonl file")
    if path.resolve() == dataset.resolve():
        raise ValueError(f"export={export}: is the dataset itself, which is never changed; name another file")
    for file in (path, dropped_path(path)):
        if file.exists():
            raise ValueError(f"export={export}: {file} exists, and is never overwritten; name another file")
    return path


def dropped_path(path: Path) -> Path:
    return path.with_name(path.name + ".dropped.jsonl")


def export_rows(
    dataset: Path, path: Path, reasons: Mapping[int, Sequence[str]], max_samples: int | None = None
) -> tuple[int, int]:
    """Writes the rows of the dataset's first max_samples that are Examples without a reason to `path`, all others with
    the reasons to dropped_path(path); returns both numbers.

    reasons: by the index of an Example, as read_examples(on_bad_row="skip") counts them.
    """
    index, counts = 0, [0, 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "x", encoding="utf-8") as kept, open(dropped_path(path), "x", encoding="utf-8") as left_out:
        for source, row in islice(rows_of(dataset), max_samples):
            try:
                examples_of(row, source, "dpo")
            except BadRow as error:
                why: Sequence[str] = [f"bad row: {error}"]
            else:
                why, index = reasons.get(index, []), index + 1
            counts[bool(why)] += 1
            if why:
                row = {"source": source, "why": list(why), "row": None if isinstance(row, BadRow) else row}
            # Text as it is, unless it holds half a surrogate pair, which only an escape can write.
            text = json.dumps(row, ensure_ascii=False)
            text = text if text.isascii() or _has_utf8(text) else json.dumps(row)
            (left_out if why else kept).write(text + "\n")
    return counts[0], counts[1]


def _has_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

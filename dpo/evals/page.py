"""report.html of an evaluation: its numbers with their intervals, its tables, and answers side by side; one file.

Whatever a model or a dataset says is escaped: it is shown, never run. Of a sample `prompt` and `answers` (texts by
name) stand as texts, everything else as one line above them.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from dpo.doctor.page import STYLE, row_html
from models.command import printable

SHOWN = 200


def page(
    found: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], pictures: Sequence[str] = ()
) -> bytes:  # fmt: skip
    """found: what results.json holds; pictures: HTML."""
    title = escape(f"Evaluation: {found['task']}")
    metrics = [
        {"metric": name, "value": value, "95% interval": found["intervals"].get(name)}
        for name, value in found["metrics"].items()
    ] + [{"metric": name, "value": count} for name, count in found["counts"].items()]
    about = [{"": name, "value": value} for name, value in (found["provenance"] | found["time"]).items()]
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>",
        f'<p class="warn">{_escaped(found["error"])}</p>' if "error" in found else "",
        table_html(metrics) if metrics else "",
        *pictures,
        *(f"<h2>{_escaped(name)}</h2>{table_html(rows)}" for name, rows in found["tables"].items()),
        "<h2>What it was found with</h2>" + table_html(about),
        f"<h2>{min(SHOWN, len(samples)):,} of {len(samples):,} samples</h2>" if samples else "",
        *(_sample(sample) for sample in samples[:SHOWN]),
        "</body></html>\n",
    ]
    # Half a surrogate pair, which JSON can hold, has no UTF-8.
    return "\n".join(parts).encode("utf-8", "backslashreplace")


def table_html(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    tags = ["th", *["td"] * len(rows)]
    return "<table>" + "\n".join(
        "<tr>" + "".join(f"<{tag}>{_escaped(text)}</{tag}>" for text in line) + "</tr>"
        for tag, line in zip(tags, lines, strict=True)
    ) + "</table>"  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows as aligned lines below their keys, for a terminal."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([printable(cell(row.get(column))) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        # Two numbers are an interval.
        numbers = len(value) == 2 and all(isinstance(item, float) for item in value)
        return (" to " if numbers else " | ").join(map(cell, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _sample(sample: Mapping[str, Any]) -> str:
    texts = sample.get("answers", {})
    facts = {name: value for name, value in sample.items() if name not in ("id", "prompt", "answers", "source")}
    why = "; ".join(f"{name}: {cell(value)}" for name, value in facts.items() if cell(value))
    place = " ".join(str(sample[name]) for name in ("id", "source") if name in sample)
    return row_html(place, printable(why), printable(str(sample.get("prompt", ""))), [*map(_printable, texts.items())])


def _printable(item: tuple[str, str]) -> tuple[str, str]:
    # A page does not obey control characters, but it is not text with them.
    return item[0], printable(item[1])


def _escaped(text: str) -> str:
    return escape(printable(text))

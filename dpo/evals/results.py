"""Results: what an evaluation found, how it is shown and written, and what it was found with.

    results.json      metrics, 95% intervals, counts, tables and provenance; keys are sorted, times stand under "time"
    samples.jsonl     a line per item, each with its id
    report.html       the same to read, answers side by side (dpo.evals.page)

Two evaluations of the same model, data and seeds write the same bytes, but for "time". A number that cannot be had is
left out: JSON has no NaN.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo.digests import write_beside
from dpo.evals.page import page, table
from models.command import printable

RESULTS, SAMPLES, REPORT = "results.json", "samples.jsonl", "report.html"


@dataclass
class Result:
    task: str
    metrics: dict[str, float]
    """never NaN: a number that cannot be had is left out."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95%, under the metric's name."""
    counts: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, str | int | float | None] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """by slice."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """one per item, JSON values, each with a stable `id`."""
    pictures: list[str] = field(default_factory=list)
    """HTML of report.html alone."""
    time: dict[str, str | float] = field(default_factory=dict)
    """what differs from one evaluation to the next of the same."""
    error: str = ""
    """why the numbers are not to be trusted: written with them, and the command fails."""


def write(result: Result, directory: Path, overrides: Mapping[str, str] | None = None) -> None:
    """The three files; overrides: what the command line said, for the table of a sweep."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {
        "task": result.task, "metrics": result.metrics, "intervals": result.intervals, "counts": result.counts,
        "provenance": result.provenance, "tables": result.tables, "time": result.time,
        "overrides": dict(overrides or {}),
    } | ({"error": result.error} if result.error else {})  # fmt: skip
    lines = "".join(_json(sample) + "\n" for sample in result.samples)
    write_beside(directory / SAMPLES, lines.encode())
    write_beside(directory / REPORT, page(found, result.samples, result.pictures))
    # Last: where it stands, the others do.
    write_beside(directory / RESULTS, (_json(found, indent=2) + "\n").encode())


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False)


def read(path: Path) -> dict[str, Any]:
    """What a results.json holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; delete it, or name another directory")
    return found


def show(result: Result) -> Iterator[str]:
    """The lines of a result for the terminal: metrics with their intervals, counts, and tables."""
    for name, value in result.metrics.items():
        low_high = result.intervals.get(name)
        between = f"   95% interval {low_high[0]:.4f} to {low_high[1]:.4f}" if low_high else ""
        yield f"{name:28s}{value:10.4f}{between}"
    for name, count in result.counts.items():
        yield f"{name:28s}{count:10d}"
    for title, rows in result.tables.items():
        yield f"\n{printable(title)}"
        yield from table(rows)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers that there are."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}

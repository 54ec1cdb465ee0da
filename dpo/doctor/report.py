"""What the doctor says: a summary for the terminal, and report.json for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.doctor.check import VERDICTS, Check
from dpo.doctor.text import Corpus
from models.command import printable

MOST_TELLING, PLACES = 3, 3


def weight(check: Check) -> tuple[int, float]:
    """How much a check matters: its verdict, then the share of rows or the distance of its AUC from chance."""
    numbers = check.numbers
    return VERDICTS.index(check.verdict), max(numbers.get("share", 0.0), abs(2 * numbers.get("auc", 0.5) - 1))


def most_telling(checks: Sequence[Check]) -> list[Check]:
    found = [check for check in checks if check.verdict != "ok"]
    return sorted(found, key=weight, reverse=True)[:MOST_TELLING]


def summary(checks: Sequence[Check], corpus: Corpus) -> str:
    """A line for each check, then the most telling ones with what to do and where to look."""
    lines = [f"{check.verdict:5s} {check.name:22s} {check.summary}" for check in checks]
    for number, check in enumerate(most_telling(checks), start=1):
        lines += ["", f"{number}. {check.question} {check.summary}.", f"   {check.advice}"]
        lines += [f"   {corpus.source(row)}: {why}" for row, why in list(check.rows.items())[:PLACES]]
    counts = ", ".join(f"{sum(c.verdict == verdict for c in checks)} {verdict}" for verdict in reversed(VERDICTS))
    return printable("\n".join([*lines, "", f"{len(corpus):,} rows: {counts}"]))


def dropped(checks: Sequence[Check]) -> dict[int, list[str]]:
    """For each row that export= leaves out, why."""
    reasons: dict[int, list[str]] = {}
    for check in checks:
        if check.drops:
            for row, why in check.rows.items():
                reasons.setdefault(row, []).append(f"{check.name}: {why}")
    return dict(sorted(reasons.items()))


def write_json(path: Path, checks: Sequence[Check], corpus: Corpus, about: dict[str, Any]) -> None:
    """about: what was looked at, for the first keys."""
    out = dropped(checks)
    report = about | {
        "rows": len(corpus),
        "kept": len(corpus) - len(out),
        "dropped": len(out),
        "most_telling": [check.name for check in most_telling(checks)],
        "checks": [
            {
                "name": check.name,
                "question": check.question,
                "verdict": check.verdict,
                "summary": check.summary,
                "advice": check.advice,
                "drops": check.drops,
                "numbers": {name: float(value) for name, value in check.numbers.items()},
                "rows": [{"source": corpus.source(row), "why": why} for row, why in check.rows.items()],
            }
            for check in checks
        ],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

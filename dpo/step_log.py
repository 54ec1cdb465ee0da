"""A file of JSON lines that each say their step, so that a resume can take back what it will write again.

A line is whole or cut short by a crash at the file's end, where it does not count. JSON has no Infinity or NaN: such a
number is null.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo.digests import write_beside


class StepLog:
    """One file; it is there from its first line on."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add objects, a line each; every one has a `step`."""
        text = "".join(to_json(row) + "\n" for row in rows)
        if text:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines()]

    def forget_after(self, step: int) -> None:
        """Remove the lines of later steps, and what a crash has cut short."""
        if self.path.exists():
            kept = [line + b"\n" for line in self._lines() if json.loads(line)["step"] <= step]
            write_beside(self.path, b"".join(kept))

    def sync(self) -> None:
        """Have the disk hold every line."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def _lines(self) -> list[bytes]:
        # As bytes: what a crash cut short may be no text, and a response may hold what str.splitlines() parts at.
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []


def to_json(row: Mapping[str, Any]) -> str:
    """One line, with null for numbers that are not finite."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})

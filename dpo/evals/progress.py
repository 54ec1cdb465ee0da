"""Progress: the rows that an evaluation has done so far, so that one that was killed goes on where it was.

A file of JSON lines. The first says what the rows are of (model, data, settings); another evaluation than that is
refused. Every row has an `id`.
"""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Progress:
    def __init__(self, path: Path, key: Mapping[str, Any]):
        """key: all that the rows depend on, in JSON values."""
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        key = json.loads(json.dumps(key))
        self._file = open(path, "ab")  # noqa: SIM115 (it stays open as long as the evaluation)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process writes it; wait for it, or name another output_dir") from None
        # As bytes: a row may hold what str.splitlines() parts at. What a kill has cut short has no newline.
        lines = path.read_bytes().split(b"\n")[:-1]
        if lines:
            self._check(json.loads(lines[0]), key)
            self.done = {row["id"]: row for row in map(json.loads, lines[1:])}
        self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._write(key)

    def _check(self, found: Any, key: Mapping[str, Any]) -> None:
        found = found if isinstance(found, dict) else {}
        for name in sorted({*key, *found}):
            if found.get(name) != key.get(name):
                raise ValueError(
                    f"{self.path}: holds rows of {name}={found.get(name)!r}, this evaluation has {key.get(name)!r}; "
                    "name another output_dir, or delete the file"
                )

    def add(self, *rows: dict[str, Any]) -> None:
        """Rows that are done, on the disk at once."""
        self._write(*rows)
        self.done |= {row["id"]: row for row in rows}

    def _write(self, *rows: Mapping[str, Any]) -> None:
        # One write, so that rows computed together are there together.
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

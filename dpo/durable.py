"""Directories that are whole or not there, whatever kills the process or the power while they are written.

    NAME.tmp/    every file is written and synced; manifest.json last, with each one's size and SHA-256
    NAME/        by one rename, and a sync of the directory that holds it

So a directory called NAME whose files are as its manifest says is what was written. One that is not is damaged: said by
its reader, and never deleted, for a person may still want to look at it.
"""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path

MANIFEST = "manifest.json"


def write_whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the directory `target` of what `fill` writes into the directory that it is given.

    A whole directory that stands there is replaced, a damaged one is put aside. OSError leaves both as they were.
    """
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    try:
        beside.mkdir(parents=True)
        fill(beside)
        files = sorted(path for path in beside.rglob("*") if path.is_file())
        listed = {str(path.relative_to(beside)): _facts(path) for path in files}
        (beside / MANIFEST).write_text(_json(listed), encoding="utf-8")
        for path in [*files, beside / MANIFEST, beside]:
            _sync(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    replaced = None
    if target.exists():
        replaced = target.with_name(target.name + ".old") if damage(target) is None else _free_name(target)
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        beside.rename(target)
    except OSError:
        if replaced is not None:
            replaced.rename(target)
        raise
    _sync(target.parent)
    if replaced is not None and replaced.name.endswith(".old"):
        shutil.rmtree(replaced, ignore_errors=True)


def damage(directory: Path) -> str | None:
    """What is wrong with a directory that write_whole made, in a few words; None where it is whole."""
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        listed = json.loads(text)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not readable"
    if not isinstance(listed, dict) or _json(listed) != text:
        return f"{MANIFEST} is not readable"
    for name, facts in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if _facts(path) != facts:
            return f"{name} is not what was written"
    return None


def _facts(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"sha256": file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _json(listed: dict) -> str:
    return json.dumps(listed, indent=0, sort_keys=True) + "\n"


def _free_name(target: Path) -> Path:
    names = (target.with_name(f"{target.name}.damaged-{i}") for i in range(1, 10**6))
    return next(name for name in names if not name.exists())


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

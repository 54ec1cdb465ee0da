"""Digests: the SHA-256 of files and texts, and files that are written whole or not at all.

dpo.reference_cache and dpo.token_cache name what they keep by the digests of all that it depends on.
"""

import json
import os
import uuid
from collections.abc import Iterable
from hashlib import file_digest, sha256
from pathlib import Path

DIGESTS = "digests.json"


def file_sha256(*paths: Path) -> str:
    """Of one file its SHA-256; of several that of theirs, one after the other."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else text_sha256(digests)


def text_sha256(texts: Iterable[str]) -> str:
    return sha256("\n".join(texts).encode()).hexdigest()


def digest(path: Path, memory: Path) -> str:
    """The SHA-256 of a file, remembered in `memory` for as long as the file is not touched."""
    stat = path.stat()
    # The time of change too: unlike the time of modification, no copying tool sets it back.
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: what it says is then found out again
        known = {}
    if key not in known:
        known[key] = file_sha256(path)
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_beside(memory, json.dumps(known, indent=0).encode())
    return known[key]


def write_beside(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that a reader never sees half of one."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)

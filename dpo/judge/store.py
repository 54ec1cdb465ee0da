"""What a judge has said, in a SQLite file, so that nothing is asked twice, whatever kills the process.

A row is written by the worker that got the answer, right after it: kill -9 loses what was in flight and nothing else.
The key is the SHA-256 of all that an answer depends on; what it is made of says the judge. Only answers are kept, and
deliberate refusals; a failure is asked about again.
"""

import json
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
KEPT = ("ok", "reasked", "refused")
Exchange = dict[str, Any]
"""one question and what became of it, as JSON values; `outcome` is one of dpo.judge.verdict.OUTCOMES."""


def key_of(**parts: Any) -> str:
    """The SHA-256 of canonical JSON."""
    text = json.dumps(parts | {"schema": SCHEMA_VERSION}, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


class Store:
    """path None: in memory, for a judge whose answers nobody wants to keep."""

    def __init__(self, path: str | None):
        self.path = path
        self.lock = threading.Lock()
        self.asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        with self._writing():
            if path:
                Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            name = str(Path(path).expanduser()) if path else ":memory:"
            self.connection = sqlite3.connect(name, timeout=60, check_same_thread=False)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"judge_cache={self.path}: is no SQLite file that can be written ({error}); name another"
            ) from None

    def get(self, key: str) -> Exchange | None:
        with self.lock:
            row = self.connection.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, exchange: Mapping[str, Any]) -> None:
        """Keep an answer or a refusal; of anything else nothing is kept."""
        if exchange["outcome"] in KEPT:
            with self._writing(), self.lock, self.connection:
                self.connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(exchange)))

    def once(self, key: str, ask: Callable[[], Exchange]) -> tuple[Exchange, bool]:
        """(the answer, whether it was known): of several threads with one question, one asks."""
        with self.lock:
            asking = self.asking[key]
        with asking:
            known = self.get(key)
            if known is not None:
                return known, True
            exchange = ask()
            self.put(key, exchange)
            return exchange, False

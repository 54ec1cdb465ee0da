"""What the data doctor finds: one Check per question that it asks of a dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# A verdict, from harmless to grave: `warn` says that training on the rows as they are would teach the wrong thing.
VERDICTS = ("ok", "note", "warn")


@dataclass(frozen=True)
class Check:
    name: str
    """as in the JSON report: `length`, `near_duplicates`."""
    question: str
    """what a reader wants to know: is chosen better in more than its length?"""
    verdict: str
    """one of VERDICTS."""
    summary: str
    """one line: the number, the threshold, the share of rows."""
    advice: str = ""
    """what to do about it; empty where the verdict is ok."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """everything measured, by name, for the JSON report."""
    rows: Mapping[int, str] = field(default_factory=dict)
    """why a row is flagged, by its index in the examples; the worst first."""
    drops: bool = False
    """whether export= leaves the flagged rows out."""
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """per-row numbers that the HTML report draws, by name; each (rows,)."""

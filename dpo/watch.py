"""What a run shows of itself while it trains: means between two logs, the ledger of rows, and alarms.

The ledger (ledger.jsonl) has a line for every row whenever it was seen:

    step      of a training row the update that it was part of, whose policy had not learned from it yet; of a held-out
              row the updates before its evaluation
    split     train or eval
    source    file:line of the row
    loss      of the row alone
    margin    the reward margin; of a labelled row its reward, negative where it is undesirable

Nothing waits for the device before it is written: with the next log, evaluation or checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dpo.diagnostics import Diagnosis, Facts
from dpo.metrics import Means
from dpo.run import RunDir
from dpo.tokens import Encoded

Seen = tuple[int, str, list[str], Tensor, Tensor]


class Watch:
    def __init__(self, run_dir: RunDir, facts: Facts | None):
        """facts: None where nothing is diagnosed."""
        self.run_dir = run_dir
        self.window = Means()
        """of the updates since the last log."""
        self.diagnosis = Diagnosis(facts) if facts else None
        self._seen: list[Seen] = []

    def mark(self) -> Any:
        """Where it is now, for `back_to`."""
        return self.window.copy(), len(self._seen)

    def back_to(self, mark: Any) -> None:
        """Forget what was seen since: the update did not happen."""
        self.window, length = mark
        del self._seen[length:]

    def saw(self, step: int, split: str, rows: Sequence[Encoded], losses: Tensor, margins: Tensor | None) -> None:
        """A line of the ledger for each row; none where an objective has no margins."""
        if margins is not None:
            self._seen.append((step, split, [row.example.source for row in rows], losses.detach(), margins.detach()))

    def flush(self) -> None:
        """Write the ledger as far as it goes."""
        for step, split, sources, losses, margins in self._seen:
            self.run_dir.record(
                {"step": step, "split": split, "source": source, "loss": loss, "margin": margin}
                for source, loss, margin in zip(sources, losses.tolist(), margins.tolist(), strict=True)
            )
        self._seen = []

    def log(self, metrics: dict[str, float], say: Callable[[str], object]) -> None:
        """A row of metrics.jsonl; what it gives away for the first time is said."""
        self.flush()
        self.run_dir.log(metrics)
        for alarm in self.diagnosis.read(metrics) if self.diagnosis else ():
            say(f"warning: {alarm}")

    def resume(self, window: Mapping[str, list[float]]) -> None:
        """Go on after the rows that the run's directory holds, whose alarms have been said."""
        self.window = Means(dict(window))
        if self.diagnosis is not None:
            for row in self.run_dir.logged():
                self.diagnosis.read(row)

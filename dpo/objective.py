"""An objective: what is measured of rows, their losses, what is reported of them; and its means over a whole split."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dpo.coupled import joined
from dpo.metrics import Means
from dpo.plan import cut
from dpo.tokens import Encoded
from models.stream import Stream, pack
from models.transformer import Transformer


class Objective(Protocol):
    """What is trained: what is measured of rows, their losses, and what is reported of them."""

    couples: bool
    """whether a row's loss depends on the others of its logical batch."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What it carries from one update to the next, by name, changed in place; a checkpoint holds it."""

    def updated(self, step: int) -> None:
        """Called after update `step`, counted from 1."""

    def check(self, rows: Iterable[Encoded]) -> None:
        """ValueError for a row that carries a number which is not honoured."""

    def units(self, rows: Sequence[Encoded]) -> int:
        """What a batch's loss is the mean over: its pairs, or its response tokens."""

    def measure(self, policy: Transformer, stream: Stream, rows: Sequence[Encoded], batch: Sequence[Encoded]) -> Any:
        """What the losses read of some rows of a logical batch, with gradient."""

    def losses(self, measured: Any) -> Tensor:
        """One loss per unit."""

    def metrics(self, measured: Any, losses: Tensor) -> dict[str, Tensor]:
        """Detached numbers per unit, by name."""

    def margins(self, measured: Any) -> Tensor | None:
        """One number per row, above 0 where the policy agrees with its label; None where rows have no label."""


Saw = Callable[[Sequence[Encoded], Tensor, Tensor | None], None]


def to_stream(rows: Sequence[Encoded], device: torch.device) -> Stream:
    return pack([row.prompt_ids for row in rows], [row.response_ids for row in rows]).to(device)


def evaluate(
    policy: Transformer, objective: Objective, rows: Sequence[Encoded], batch_size: int, saw: Saw = lambda *_: None
) -> dict[str, float]:
    """Means over all rows, under `eval_` names; `eval_runtime` is in seconds.

    saw: called with rows, their losses and their margins.
    """
    start = time.perf_counter()
    means = Means()
    policy.eval()
    # By length: rows of one batch then share their attention's padding. The order cannot change a mean.
    ordered = sorted(rows, key=lambda row: row.tokens)
    with torch.no_grad():
        batches = cut(ordered, batch_size)
        bar = tqdm(batches, desc="evaluation", unit="batch", disable=None, delay=5, leave=False)
        parts = [objective.measure(policy, to_stream(part, policy.device), part, ordered) for part in bar]
        # A loss that couples rows is computed on all of them at once.
        if objective.couples:
            batches, parts = [ordered], [joined(parts)]
        for part, measured in zip(batches, parts, strict=True):
            losses = objective.losses(measured)
            means.add(objective.metrics(measured, losses))
            saw(part, losses, objective.margins(measured))
    return means.means("eval_") | {"eval_runtime": round(time.perf_counter() - start, 3)}

"""A loss that couples the rows of a logical batch, computed on all of them although they pass in micro-batches.

    1. measure every micro-batch without gradient, and join them
    2. g = d mean loss / d log-probability, for every log-probability of the whole batch
    3. measure each micro-batch again, with gradient: sum(g * log-probability) has the mean loss's gradient

Exact, whatever the loss, for the chain rule asks for g alone (gradient caching: Gao et al. 2021, arXiv:2101.06983).

Shapes: every field of what was measured is (B,), one entry per row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """What losses read of some rows with a reference; a subclass names its fields, each a (B,) tensor."""

    LOGPS: ClassVar[tuple[str, ...]] = ()
    """the fields with a gradient."""

    @property
    def avg_logratios(self) -> Tensor:
        """log pi - log pi_ref per token of the responses, detached; the start certificate looks at it."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


M = TypeVar("M", bound=Measured)


def joined(parts: Sequence[M]) -> M:
    """What was measured of several micro-batches, as of one batch."""
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def logp_gradients(measured: M, mean_loss: Callable[[M], Tensor]) -> M:
    """d mean_loss / d each log-probability, in the place of each; the log-probabilities' own graph is not entered."""
    leaves = {name: getattr(measured, name).detach().requires_grad_() for name in measured.LOGPS}
    loss = mean_loss(replace(measured, **leaves))
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return replace(measured, **dict(zip(leaves, gradients, strict=True)))


def with_gradients(measured: M, gradients: M, start: int) -> Tensor:
    """A number whose gradient is that of the mean loss, as far as these rows, from `start` on, have a share in it."""
    part = slice(start, start + len(measured))
    shares = [(getattr(measured, name) * getattr(gradients, name)[part]).sum() for name in measured.LOGPS]
    return torch.stack(shares).sum()

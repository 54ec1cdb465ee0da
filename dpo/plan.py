"""Which rows each update takes, a function of config and seed alone; and how they are cut into micro-batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, TypeVar

import torch
from omegaconf import DictConfig


class HasTokens(Protocol):
    @property
    def tokens(self) -> int: ...


Row = TypeVar("Row", bound=HasTokens)


@dataclass(frozen=True)
class Plan:
    """How many updates a run makes of how many rows, and which rows each takes."""

    rows: int
    batch: int
    """rows of a logical batch; an epoch's last may be smaller."""
    steps_per_epoch: int
    total_steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, cfg: DictConfig, rows: int) -> "Plan":
        batch = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
        steps_per_epoch = math.ceil(rows / batch)
        # Rounded up as Hugging Face's trainer does; 0.5 epochs of 7 steps are 4.
        total = cfg.max_steps if cfg.max_steps > 0 else math.ceil(steps_per_epoch * cfg.num_train_epochs)
        return cls(rows, batch, steps_per_epoch, total, cfg.seed, not cfg.disable_shuffling)

    def indices(self, step: int) -> list[int]:
        """The rows of update `step`, counted from 0: a function of seed and step alone, so a resume needs no replay."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _permutation(self.rows, self.seed, epoch) if self.shuffle else range(self.rows)
        return list(order[within * self.batch : (within + 1) * self.batch])


@lru_cache(maxsize=1)
def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def micro_batches(cfg: DictConfig, batch: Sequence[Row]) -> list[Sequence[Row]]:
    """A logical batch as it passes through the model, in its order: a function of the config and the rows' lengths."""
    return cutting(cfg)(batch)


def cutting(cfg: DictConfig) -> Callable[[Sequence[Row]], list[Sequence[Row]]]:
    """micro_batches for many batches: a look into the config takes longer than a cut."""
    if cfg.max_tokens_per_micro_batch is None:
        return partial(cut, size=cfg.per_device_train_batch_size)
    return partial(cut_by_tokens, most=cfg.max_tokens_per_micro_batch)


def cut(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def cut_by_tokens(rows: Sequence[Row], most: int) -> list[Sequence[Row]]:
    """Parts of at most so many tokens of the packed stream; a row that is longer is a part of its own."""
    parts, start, tokens = [], 0, 0
    for i, row in enumerate(rows):
        if i > start and tokens + row.tokens > most:
            parts.append(rows[start:i])
            start, tokens = i, 0
        tokens += row.tokens
    return [*parts, rows[start:]]

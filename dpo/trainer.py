"""The training loop: logical batches, one update each, metrics, evaluations, checkpoints.

One step: take the logical batch (per_device_train_batch_size x gradient_accumulation_steps rows) that seed and step
determine; for each micro-batch pack a stream, get reference and policy log-probabilities, add the gradient of its share
of the mean loss; clip; update. Every loss is divided by the whole batch's pairs (SFT: response tokens), so how the
batch is cut into micro-batches does not show in the result.

Shapes: P pairs, R response tokens of a micro-batch.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from dpo.checkpoint import TrainerState, load_checkpoint, save_checkpoint, trainable
from dpo.coupled import Measured, joined, logp_gradients, with_gradients
from dpo.formats import NUMBERS, Example
from dpo.logprobs import token_logps
from dpo.metrics import Means, one_line
from dpo.optim import LossScale, build_adamw, clip_gradients, learning_rate_at
from dpo.run import RunDir
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


class SFTObjective:
    """Negative log-likelihood of every response token, nats; its mean over tokens is the loss."""

    couples = False
    state: Mapping[str, Tensor] = {}

    def updated(self, step: int) -> None:
        pass

    def check(self, rows: Iterable[Encoded]) -> None:
        for row in (row for row in rows if row.has_numbers):
            for key in NUMBERS:
                value = getattr(row.example, key)
                if value != getattr(Example, key):  # the default, which changes nothing
                    raise ValueError(
                        f"{row.example.source}: {key}={value}: stage=sft cannot honour it; remove it from the rows"
                    )

    def units(self, rows: Sequence[Encoded]) -> int:
        return sum(sum(row.lengths) for row in rows)

    def measure(self, policy: Transformer, stream: Stream, rows: Sequence[Encoded], batch: Sequence[Encoded]) -> Tensor:
        return token_logps(policy, stream)

    def losses(self, measured: Tensor) -> Tensor:
        return -measured

    def metrics(self, measured: Tensor, losses: Tensor) -> dict[str, Tensor]:
        return {"loss": losses}


def evaluate(policy: Transformer, objective: Objective, rows: Sequence[Encoded], batch_size: int) -> dict[str, float]:
    """Means over all rows, under `eval_` names; `eval_runtime` is in seconds."""
    start = time.perf_counter()
    means = Means()
    policy.eval()
    # By length: rows of one batch then share their attention's padding. The order cannot change a mean.
    ordered = sorted(rows, key=lambda row: row.tokens)
    with torch.no_grad():
        parts = [
            objective.measure(policy, to_stream(part, policy.device), part, ordered)
            for part in _cut(ordered, batch_size)
        ]
        # A loss that couples rows is computed on all of them at once.
        for measured in [joined(parts)] if objective.couples else parts:
            means.add(objective.metrics(measured, objective.losses(measured)))
    return means.means("eval_") | {"eval_runtime": round(time.perf_counter() - start, 3)}


def _cut(rows: Sequence[Encoded], size: int) -> list[Sequence[Encoded]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def to_stream(rows: Sequence[Encoded], device: torch.device) -> Stream:
    return pack([row.prompt_ids for row in rows], [row.response_ids for row in rows]).to(device)


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


class Trainer:
    """The state of one run: policy, optimiser, position. `train` makes the updates that the plan has left."""

    def __init__(
        self, cfg: DictConfig, policy: Transformer, objective: Objective,
        train_rows: Sequence[Encoded], eval_rows: Sequence[Encoded], run_dir: RunDir, source_dir: Path,
    ):  # fmt: skip
        self.cfg = cfg
        self.policy = policy
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.run_dir = run_dir
        self.objective = objective
        self.plan = Plan.of(cfg, len(train_rows))
        self.parameters = list(trainable(policy).values())
        self.optimizer = build_adamw(trainable(policy).items(), weight_decay=cfg.weight_decay)
        self.loss_scale = LossScale(policy.dtype)
        self.result = {
            "base_model": str(source_dir) if cfg.model_name_or_path == "world" else cfg.model_name_or_path,
            "source_dir": source_dir, "lora_dropout": cfg.lora_dropout,
        }  # fmt: skip
        self.step = 0
        self.window = Means()
        self.last_evaluation: dict[str, float] = {}

    def resume(self, source: Path) -> None:
        """Continue from a checkpoint-N directory."""
        state = load_checkpoint(source, self.policy, self.optimizer, self.objective.state)
        self.step = state.step
        self.window = Means(state.window)
        self.loss_scale.scale, self.loss_scale.good_steps = state.loss_scale, state.good_steps
        self.run_dir.forget_after(state.step)

    def train(self) -> dict[str, float]:
        """Make the updates that are left; returns the last logged training metrics and the last evaluation."""
        last: dict[str, float] = {}
        clock = _Clock()
        total = self.plan.total_steps
        with tqdm(total=total, initial=self.step, disable=None, unit="step", dynamic_ncols=True) as bar:
            while self.step < total:
                batch = [self.train_rows[i] for i in self.plan.indices(self.step)]
                with clock:
                    rate, norm = self.update(batch, clock)
                self.step += 1
                bar.update()
                if self._due(self.cfg.logging_steps) or self.step == total:
                    last = self._log(rate, norm, clock, bar)
                    clock = _Clock()
                if self.eval_rows and self._scheduled(self.cfg.eval_strategy, self.cfg.eval_steps, at_end=True):
                    self.evaluate(bar)
                if self._scheduled(self.cfg.save_strategy, self.cfg.save_steps, at_end=False):
                    self.save_checkpoint()
        return last | self.last_evaluation

    def update(self, batch: Sequence[Encoded], clock: "_Clock") -> tuple[float, Tensor]:
        """One update from one logical batch; returns the learning rate used and the gradient norm before clipping."""
        self.policy.train()
        torch.manual_seed(self._dropout_seed)
        cut = _cut(batch, self.cfg.per_device_train_batch_size)
        gradients = self._coupled_gradients(batch, cut) if self.objective.couples and len(cut) > 1 else None
        start = 0
        for rows in cut:
            stream = to_stream(rows, self.policy.device)
            measured = self.objective.measure(self.policy, stream, rows, batch)
            if gradients is None:
                total = self._share_of_loss(measured, rows, batch)
            else:
                total = with_gradients(measured, gradients, start)
            (total * self.loss_scale.scale).backward()
            start += len(rows)
            clock.count(len(rows), len(stream.input_ids_T))
        usable = self.loss_scale.unscale(self.parameters)
        norm = clip_gradients(self.parameters, self.cfg.max_grad_norm)
        if usable and not torch.isfinite(norm):
            raise ValueError(
                f"step {self.step + 1}: the gradient is not finite (rows {batch[0].example.source} ...); lower "
                "learning_rate, raise pref_beta or lower max_grad_norm"
            )
        rate = learning_rate_at(
            self.step, learning_rate=self.cfg.learning_rate, lr_scheduler_type=self.cfg.lr_scheduler_type,
            warmup_steps=self.warmup_steps, total_steps=self.plan.total_steps,
        )  # fmt: skip
        if usable:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.updated(self.step + 1)
        return rate, norm

    def _share_of_loss(self, measured: Any, rows: Sequence[Encoded], batch: Sequence[Encoded]) -> Tensor:
        """What `rows` contribute to the mean loss of their batch; logged."""
        losses = self.objective.losses(measured)
        if not torch.isfinite(losses).all():
            raise ValueError(
                f"step {self.step + 1}: the loss is not finite (rows {rows[0].example.source} ...); with fp16 try "
                "bf16, else lower learning_rate or raise pref_beta"
            )
        self.window.add(self.objective.metrics(measured, losses))
        return losses.sum() / self.objective.units(batch)

    def _coupled_gradients(self, batch: Sequence[Encoded], cut: Sequence[Sequence[Encoded]]) -> Measured:
        """d mean loss / d log-probability of the whole batch, for a loss that couples its rows; see dpo.coupled."""
        with torch.no_grad():
            parts = [self.objective.measure(self.policy, to_stream(r, self.policy.device), r, batch) for r in cut]
        gradients = logp_gradients(joined(parts), lambda whole: self._share_of_loss(whole, batch, batch))
        torch.manual_seed(self._dropout_seed)  # so that the second time drops what the first did
        return gradients

    @property
    def _dropout_seed(self) -> int:
        """Dropout is a function of seed and step too."""
        return self.plan.seed * 1_000_003 + self.step

    @property
    def warmup_steps(self) -> int:
        return self.cfg.warmup_steps or math.ceil(self.plan.total_steps * self.cfg.warmup_ratio)

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _scheduled(self, strategy: str, every: int, at_end: bool) -> bool:
        last = self.step == self.plan.total_steps
        if strategy == "no" or (last and at_end):
            return strategy != "no"
        return self._due(every if strategy == "steps" else self.plan.steps_per_epoch)

    def _position(self) -> dict[str, float]:
        return {"step": self.step, "epoch": round(self.step / self.plan.steps_per_epoch, 4)}

    def _log(self, rate: float, norm: Tensor, clock: "_Clock", bar: tqdm) -> dict[str, float]:
        means = self.window.means()
        metrics = self._position() | {"loss": means.pop("loss"), "learning_rate": rate, "grad_norm": float(norm)}
        metrics |= means | clock.rates()
        self.run_dir.log(metrics)
        self.window = Means()
        shown = {k: v for k, v in metrics.items() if k in ("loss", "rewards/accuracies", "rewards/margins")}
        bar.set_postfix_str(one_line(shown))
        if bar.disable:
            print(f"step {self.step}/{self.plan.total_steps}  {one_line(metrics)}", flush=True)
        return metrics

    def evaluate(self, bar: tqdm | None = None) -> dict[str, float]:
        """Metrics of the held-out rows, logged."""
        metrics = evaluate(self.policy, self.objective, self.eval_rows, self.cfg.per_device_eval_batch_size)
        self.run_dir.log(self._position() | metrics)
        write = tqdm.write if bar is not None and not bar.disable else print
        write(f"step {self.step}/{self.plan.total_steps}  {one_line(metrics)}")
        self.last_evaluation = metrics
        return metrics

    def save_checkpoint(self) -> None:
        state = TrainerState(self.step, self.loss_scale.scale, self.loss_scale.good_steps, self.window.state())
        target = self.run_dir.path / f"checkpoint-{self.step}"
        save_checkpoint(target, self.policy, self.optimizer, self.objective.state, state, **self.result)


class _Clock:
    """Pairs and tokens per second of updates since the last log; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.seconds, self.pairs, self.tokens = 0.0, 0, 0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.start

    def count(self, pairs: int, tokens: int) -> None:
        self.pairs += pairs
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """A token is one of the packed stream, where a shared prompt counts once."""
        return {
            "pairs_per_second": round(self.pairs / self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }

"""The training loop: logical batches, one update each, metrics, evaluations, checkpoints.

One step: take the logical batch (per_device_train_batch_size x gradient_accumulation_steps rows) that seed and step
determine; for each micro-batch pack a stream, get reference and policy log-probabilities, add the gradient of its share
of the mean loss; clip; update. Every loss is divided by the whole batch's pairs (SFT: response tokens), so how the
batch is cut into micro-batches does not show in the result.

Shapes: P pairs, R response tokens of a micro-batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from dpo.checkpoint import TrainerState, load_checkpoint, save_checkpoint, trainable
from dpo.data import Encoded
from dpo.logprobs import sum_over_responses, token_logps
from dpo.losses import PREF_LOSSES, PrefLoss
from dpo.metrics import Means, one_line, preference_metrics
from dpo.optim import LossScale, build_adamw, clip_gradients, learning_rate_at
from dpo.reference import Reference
from dpo.run import RunDir
from models.stream import Stream, pack
from models.transformer import Transformer

Objective = Callable[[Transformer, Stream], tuple[Tensor, dict[str, Tensor]]]
"""(policy, stream) -> (losses of pairs or tokens, metrics per pair)"""


def preference_objective(reference: Reference, loss: PrefLoss, beta: float) -> Objective:
    """The objective of preference pairs: branches 2i and 2i + 1 of the stream are chosen and rejected of pair i."""

    def objective(policy: Transformer, stream: Stream) -> tuple[Tensor, dict[str, Tensor]]:
        reference_R = reference(stream)
        policy_R = token_logps(policy, stream)
        logps = sum_over_responses(policy_R, stream.lengths_B)
        logratios = sum_over_responses(policy_R - reference_R, stream.lengths_B)
        read = logratios / stream.lengths_B if loss.reads == "mean" else logratios
        losses = loss.function(read[0::2], read[1::2], beta=beta)
        metrics = preference_metrics(logps[0::2], logps[1::2], logratios[0::2], logratios[1::2], beta=beta)
        return losses, {"loss": losses} | metrics

    return objective


def sft_objective(policy: Transformer, stream: Stream) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of every response token, nats; its mean over tokens is the loss."""
    losses = -token_logps(policy, stream)
    return losses, {"loss": losses}


def evaluate(policy: Transformer, objective: Objective, rows: Sequence[Encoded], batch_size: int) -> dict[str, float]:
    """Means over all rows, under `eval_` names; `eval_runtime` is in seconds."""
    start = time.perf_counter()
    means = Means()
    policy.eval()
    # By length: rows of one batch then share their attention's padding. The order cannot change a mean.
    ordered = sorted(rows, key=lambda row: row.tokens)
    with torch.no_grad():
        for i in range(0, len(ordered), batch_size):
            _, metrics = objective(policy, to_stream(ordered[i : i + batch_size], policy.device))
            means.add(metrics)
    return means.means("eval_") | {"eval_runtime": round(time.perf_counter() - start, 3)}


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
        self, cfg: DictConfig, policy: Transformer, reference: Reference | None,
        train_rows: Sequence[Encoded], eval_rows: Sequence[Encoded], run_dir: RunDir, source_dir: Path,
    ):  # fmt: skip
        self.cfg = cfg
        self.policy = policy
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.run_dir = run_dir
        self.objective = (
            sft_objective if reference is None
            else preference_objective(reference, PREF_LOSSES[cfg.pref_loss], cfg.pref_beta)
        )  # fmt: skip
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
        state = load_checkpoint(source, self.policy, self.optimizer)
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
        # Dropout is a function of seed and step too.
        torch.manual_seed(self.plan.seed * 1_000_003 + self.step)
        units = len(batch) if self.cfg.stage == "dpo" else sum(len(r) for row in batch for r in row.response_ids)
        for rows in self._micro_batches(batch):
            stream = to_stream(rows, self.policy.device)
            losses, metrics = self.objective(self.policy, stream)
            if not torch.isfinite(losses).all():
                raise ValueError(
                    f"step {self.step + 1}: the loss is not finite (rows {rows[0].example.source} ...); with fp16 try "
                    "bf16, else lower learning_rate or raise pref_beta"
                )
            (losses.sum() / units * self.loss_scale.scale).backward()
            self.window.add(metrics)
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
        return rate, norm

    @property
    def warmup_steps(self) -> int:
        return self.cfg.warmup_steps or math.ceil(self.plan.total_steps * self.cfg.warmup_ratio)

    def _micro_batches(self, batch: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
        size = self.cfg.per_device_train_batch_size
        return (batch[i : i + size] for i in range(0, len(batch), size))

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
        save_checkpoint(target, self.policy, self.optimizer, state, **self.result)


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

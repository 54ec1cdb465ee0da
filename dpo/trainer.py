"""The training loop: logical batches, one update each, metrics, evaluations, checkpoints.

One step: take the logical batch (per_device_train_batch_size x gradient_accumulation_steps rows) that seed and step
determine; for each micro-batch pack a stream, get reference and policy log-probabilities, add the gradient of its share
of the mean loss; clip; update. Every loss is divided by the whole batch's pairs (SFT: response tokens), so how the
batch is cut into micro-batches does not show in the result.

Shapes: P pairs, R response tokens of a micro-batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from dpo.checkpoint import (
    NotFinite,
    TrainerState,
    keep_newest,
    load_checkpoint,
    load_weights,
    put_aside_after,
    save_checkpoint,
    trainable,
)
from dpo.coupled import Measured, joined, logp_gradients, with_gradients
from dpo.diagnostics import Facts
from dpo.durable import damage
from dpo.metrics import Means, one_line
from dpo.objective import Objective, evaluate, to_stream
from dpo.optim import LossScale, build_optimizer, clip_gradients, learning_rate_at
from dpo.plan import Plan, micro_batches
from dpo.postmortem import write_postmortem
from dpo.run import RunDir, is_evaluation
from dpo.signals import StopRequest
from dpo.tokens import Encoded
from dpo.watch import Watch
from models.transformer import Transformer

Probe = Callable[[Transformer, int], dict[str, float]]
"""(policy, updates made) -> numbers under `eval_` names, without changing the policy."""

MOST_SKIPPED = 3
MOST_FAILED_SAVES = 3


class Interrupted(Exception):
    """A signal came between two micro-batches."""


class NonFinite(Exception):
    """A loss or gradient that is infinite or no number."""

    def __init__(self, what: str, rows: Sequence[Encoded]):
        self.what, self.rows = what, rows


class Trainer:
    """The state of one run: policy, optimiser, position. `train` makes the updates that the plan has left."""

    def __init__(
        self, cfg: DictConfig, policy: Transformer, objective: Objective,
        train_rows: Sequence[Encoded], eval_rows: Sequence[Encoded], run_dir: RunDir, source_dir: Path,
        probes: Sequence[Probe] = (), facts: Facts | None = None,
    ):  # fmt: skip
        """probes: measured of the policy at every evaluation and before the first update; facts: see dpo.watch."""
        self.cfg = cfg
        self.policy = policy
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.run_dir = run_dir
        self.objective = objective
        self.plan = Plan.of(cfg, len(train_rows))
        self.parameters = list(trainable(policy).values())
        self.optimizer = build_optimizer(cfg.optim, trainable(policy).items(), weight_decay=cfg.weight_decay)
        self.loss_scale = LossScale(policy.dtype)
        self.result = {
            "base_model": str(source_dir) if cfg.model_name_or_path == "world" else cfg.model_name_or_path,
            "source_dir": source_dir, "lora_dropout": cfg.lora_dropout,
        }  # fmt: skip
        self.state = TrainerState(0, self.loss_scale.scale, 0, {})
        self.watch = Watch(run_dir, facts)
        self.probes = probes
        self.measured_at: int | None = None
        """the step of the newest evaluation."""
        self.failed_saves = 0
        self.last: dict[str, float] = {}
        self.last_evaluation: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Updates made."""
        return self.state.step

    @property
    def result_step(self) -> int:
        """The updates that the result has seen."""
        return self.state.best_step if self.cfg.load_best_model_at_end and self.state.best_step else self.step

    def resume(self, source: Path) -> None:
        """Continue from a checkpoint-N directory."""
        self.state = load_checkpoint(source, self.policy, self.optimizer, self.objective.state)
        self.loss_scale.scale, self.loss_scale.good_steps = self.state.loss_scale, self.state.good_steps
        self.run_dir.forget_after(self.step)
        self.watch.resume(self.state.window)
        put_aside_after(self.run_dir.path, self.step)
        self.last, self.last_evaluation = self.run_dir.last_metrics()
        self.measured_at = max((int(row["step"]) for row in self.run_dir.logged() if is_evaluation(row)), default=None)
        best = self._checkpoint_dir(self.state.best_step)
        if self.cfg.load_best_model_at_end and self.state.best_step and (fault := damage(best)):
            print(f"warning: {best}, the best so far, cannot be used ({fault})")
            self.state.best, self.state.best_step = None, 0
        self._remove_old_checkpoints()  # of a run that was killed before it could

    def train(self, stop: StopRequest | None = None) -> dict[str, float]:
        """Make the updates that are left; returns the last logged training metrics and the last evaluation.

        SystemExit with the signal's exit status, after a checkpoint, where `stop` heard one.
        """
        last = self.last
        clock = _Clock()
        total = self.plan.total_steps
        if self.step == 0:
            self._begin()
        with tqdm(total=total, initial=self.step, disable=None, unit="step", dynamic_ncols=True) as bar:
            while self.step < total and not self._patience_is_over():
                batch = [self.train_rows[i] for i in self.plan.indices(self.step)]
                try:
                    with clock:
                        rate, norm = self.update(batch, clock, stop)
                except Interrupted:
                    break
                self.state.step += 1
                bar.update()
                if self._due(self.cfg.logging_steps) or self.step == total:
                    last = self._log(rate, norm, clock, bar)
                    clock = _Clock()
                improved, before = False, (self.state.best, self.state.best_step)
                measures = bool(self.eval_rows or self.probes)
                if measures and self._scheduled(self.cfg.eval_strategy, self.cfg.eval_steps, at_end=True):
                    metrics = self.evaluate()
                    if self.cfg.load_best_model_at_end or self.cfg.early_stopping_steps:
                        improved = self._compare_with_best(metrics)
                save_best = improved and self.cfg.load_best_model_at_end
                scheduled = self._scheduled(self.cfg.save_strategy, self.cfg.save_steps, at_end=False)
                saved = (save_best or scheduled) and self.save_checkpoint()
                if save_best and not saved:  # what is not there cannot be gone back to
                    self.state.best, self.state.best_step = before
                if stop is not None and stop.signal:
                    break
        if stop is not None and stop.signal and self.step < total:
            self._leave(stop)
        if self._patience_is_over():
            print(f"early stop after step {self.step}: {self._best()}")
        if self.result_step != self.step:
            load_weights(self._checkpoint_dir(self.state.best_step), self.policy)
            print(f"the result is the policy after step {self.state.best_step}: {self._best()}")
            # The metrics of a run are its result's.
            then = [row for row in self.run_dir.logged() if is_evaluation(row) and row["step"] == self.state.best_step]
            probed = {k: v for k, v in then[-1].items() if k.startswith("eval_")} if then else {}
            self.last_evaluation = probed | evaluate(
                self.policy, self.objective, self.eval_rows, self.cfg.per_device_eval_batch_size
            )
        elif self.probes and self.measured_at != self.step:
            self._log_evaluation({}, self._probe())
        return last | self.last_evaluation

    def _begin(self) -> None:
        """What is measured of the policy before the first update."""
        if self.cfg.eval_on_start and self.eval_rows:
            self.evaluate()
        elif self.probes:
            self._log_evaluation({}, self._probe())

    def _leave(self, stop: StopRequest) -> None:
        """Save and exit, as the signal asks."""
        assert stop.signal is not None
        kept = "nothing of it is kept"
        if self.step and self.save_checkpoint():
            kept = f"{self._checkpoint_dir(self.step)} holds it; resume_from_checkpoint=true continues"
        print(f"stopped by {stop.signal.name} after step {self.step}/{self.plan.total_steps}: {kept}", flush=True)
        raise SystemExit(stop.exit_status)

    def update(
        self, batch: Sequence[Encoded], clock: "_Clock", stop: StopRequest | None = None
    ) -> tuple[float, Tensor]:
        """One update from one logical batch; returns the learning rate used and the gradient norm before clipping.

        What is not finite is not learned from: the update is skipped and counted, and three in a row are an error.
        Interrupted where `stop` heard a signal between two micro-batches: nothing has changed then.
        """
        rate = learning_rate_at(
            self.step, learning_rate=self.cfg.learning_rate, lr_scheduler_type=self.cfg.lr_scheduler_type,
            warmup_steps=self.warmup_steps, total_steps=self.plan.total_steps,
        )  # fmt: skip
        mark = self.watch.mark()
        try:
            self._accumulate(batch, clock, stop)
            usable = self.loss_scale.unscale(self.parameters)
            norm = clip_gradients(self.parameters, self.cfg.max_grad_norm)
            if usable and not torch.isfinite(norm):
                raise NonFinite("gradient", self._with_bad_gradients(batch))
        except NonFinite as fault:
            self.watch.back_to(mark)
            self._skip(fault, batch)
            return rate, torch.tensor(math.nan)
        except Interrupted:
            self.watch.back_to(mark)
            self.optimizer.zero_grad()
            raise
        if usable:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.updated(self.step + 1)
        self.state.skipped_in_a_row = 0
        return rate, norm

    def _accumulate(self, batch: Sequence[Encoded], clock: "_Clock", stop: StopRequest | None) -> None:
        """The gradient of the batch's mean loss, micro-batch by micro-batch."""
        self.policy.train()
        torch.manual_seed(self._dropout_seed)
        parts = micro_batches(self.cfg, batch)
        coupled = self.objective.couples and len(parts) > 1
        gradients = self._coupled_gradients(batch, parts) if coupled else None
        start = 0
        for rows in parts:
            if stop is not None and stop.signal:
                raise Interrupted
            stream = to_stream(rows, self.policy.device)
            measured = self.objective.measure(self.policy, stream, rows, batch)
            if gradients is None:
                total = self._share_of_loss(measured, rows, batch)
            else:
                total = with_gradients(measured, gradients, start)
            (total * self.loss_scale.scale).backward()
            start += len(rows)
            clock.count(len(rows), len(stream.input_ids_T))

    def _with_bad_gradients(self, batch: Sequence[Encoded]) -> Sequence[Encoded]:
        """The rows whose gradient is not finite when each is measured alone; all of them where none or no one is."""
        if self.objective.couples:
            return batch
        bad = []
        for row in batch:
            measured = self.objective.measure(self.policy, to_stream([row], self.policy.device), [row], batch)
            loss = self.objective.losses(measured).sum() / self.objective.units(batch) * self.loss_scale.scale
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            if not all(gradient.isfinite().all() for gradient in gradients if gradient is not None):
                bad.append(row)
        return bad or batch

    def _skip(self, fault: "NonFinite", batch: Sequence[Encoded]) -> None:
        """Leave an update out, and say which rows; ValueError, and a bundle to look at, at the third in a row."""
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        in_a_row = self.state.skipped_in_a_row
        sources = [row.example.source for row in fault.rows]
        shown = ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if len(sources) > 4 else "")
        said = f"step {self.step + 1}: the {fault.what} is not finite ({shown})"
        if in_a_row < MOST_SKIPPED:
            self.optimizer.zero_grad()
            tqdm.write(f"warning: {said}; the update is skipped, {in_a_row} in a row")
            return
        self.watch.flush()
        bundle = self.run_dir.path / f"postmortem-{self.step + 1}.json"
        write_postmortem(
            bundle, step=self.step + 1, what=fault.what, rows=fault.rows, batch=batch, policy=self.policy,
            objective=self.objective, metrics=self.watch.window.means(),
        )  # fmt: skip
        self.optimizer.zero_grad()
        raise ValueError(
            f"{said}, in the third update in a row; lower learning_rate, raise pref_beta or lower max_grad_norm, with "
            f"fp16 try bf16; {bundle} says more"
        )

    def _share_of_loss(self, measured: Any, rows: Sequence[Encoded], batch: Sequence[Encoded]) -> Tensor:
        """What `rows` contribute to the mean loss of their batch; logged."""
        losses = self.objective.losses(measured)
        finite = torch.isfinite(losses)
        if not finite.all():
            # A loss per token, as SFT's, does not say which row.
            per_row = len(losses) == len(rows)
            raise NonFinite("loss", [row for row, ok in zip(rows, finite, strict=True) if not ok] if per_row else rows)
        self.watch.window.add(self.objective.metrics(measured, losses))
        self.watch.saw(self.step + 1, "train", rows, losses, self.objective.margins(measured))
        return losses.sum() / self.objective.units(batch)

    def _coupled_gradients(self, batch: Sequence[Encoded], micro_batches: Sequence[Sequence[Encoded]]) -> Measured:
        """d mean loss / d log-probability of the whole batch, for a loss that couples its rows; see dpo.coupled."""
        with torch.no_grad():
            parts = [
                self.objective.measure(self.policy, to_stream(r, self.policy.device), r, batch) for r in micro_batches
            ]
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
        means = self.watch.window.means()
        # Every update of the window may have been skipped.
        loss = means.pop("loss", math.nan)
        metrics = self._position() | {"loss": loss, "learning_rate": rate, "grad_norm": float(norm)}
        metrics |= ({"skipped_steps": self.state.skipped} if self.state.skipped else {}) | means | clock.rates()
        self.watch.window = Means()
        shown = ("loss", "rewards/accuracies", "rewards/margins", "pairs_per_second")
        bar.set_postfix_str(one_line({k: v for k, v in metrics.items() if k in shown}))
        if bar.disable:
            left = clock.seconds / clock.updates * (self.plan.total_steps - self.step)
            print(f"{self._place()}  {one_line(metrics)}  time_left {tqdm.format_interval(left)}", flush=True)
        self.watch.log(metrics, tqdm.write)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows and of the probes, logged."""
        metrics: dict[str, float] = {}
        if self.eval_rows:
            saw = partial(self.watch.saw, self.step, "eval")
            metrics = evaluate(self.policy, self.objective, self.eval_rows, self.cfg.per_device_eval_batch_size, saw)
        return self._log_evaluation(metrics, self._probe())

    def _probe(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for probe in self.probes:
            try:
                metrics |= probe(self.policy, self.step)
            except ValueError as error:  # a policy whose numbers overflow writes nothing, but may recover
                tqdm.write(f"warning: {self._place()}: {error}")
        return metrics

    def _log_evaluation(self, of_rows: dict[str, float], of_probes: dict[str, float]) -> dict[str, float]:
        for metrics in filter(None, (of_rows, of_probes)):
            tqdm.write(f"{self._place()}  {one_line(metrics)}")
        metrics = of_rows | of_probes
        self.watch.log(self._position() | metrics, tqdm.write)
        self.last_evaluation, self.measured_at = metrics, self.step
        return metrics

    def _place(self) -> str:
        return f"step {self.step}/{self.plan.total_steps}"

    def _compare_with_best(self, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far, which is remembered."""
        name = self.cfg.metric_for_best_model.removeprefix("eval_")
        if f"eval_{name}" not in metrics:
            known = ", ".join(key.removeprefix("eval_") for key in metrics)
            raise ValueError(f"metric_for_best_model={name}: an evaluation gives {known}; name one of these")
        value, greater = metrics[f"eval_{name}"], self.cfg.greater_is_better
        greater = not name.endswith("loss") if greater is None else greater
        best = self.state.best
        if math.isfinite(value) and (best is None or (value > best if greater else value < best)):
            self.state.best, self.state.best_step, self.state.evaluations_since_best = value, self.step, 0
            return True
        self.state.evaluations_since_best += 1
        return False

    def _patience_is_over(self) -> bool:
        patience = self.cfg.early_stopping_steps
        return patience is not None and self.state.evaluations_since_best >= patience

    def _best(self) -> str:
        name = self.cfg.metric_for_best_model.removeprefix("eval_")
        if self.state.best is None:
            return f"eval_{name} was never finite"
        return f"eval_{name} was best, {self.state.best:.4g}, after step {self.state.best_step}"

    def _checkpoint_dir(self, step: int) -> Path:
        return self.run_dir.path / f"checkpoint-{step}"

    def save_checkpoint(self) -> bool:
        """Write checkpoint-N, and remove what save_total_limit is too small for; whether it was written.

        A disk that is full or gone is said, and training goes on: the third time in a row is an error.
        """
        self.watch.flush()
        self.state.window = self.watch.window.state()
        self.state.loss_scale, self.state.good_steps = self.loss_scale.scale, self.loss_scale.good_steps
        target = self._checkpoint_dir(self.step)
        try:
            self.run_dir.sync()
            save_checkpoint(target, self.policy, self.optimizer, self.objective.state, self.state, **self.result)
        except NotFinite as error:
            tqdm.write(f"warning: {error}")
            return False
        except OSError as error:
            self.failed_saves += 1
            if self.failed_saves == MOST_FAILED_SAVES:
                raise
            tqdm.write(f"warning: {target} could not be written ({error}); the one before it is the last good one")
            return False
        self.failed_saves = 0
        self._remove_old_checkpoints()
        return True

    def _remove_old_checkpoints(self) -> None:
        if self.cfg.save_total_limit is not None:
            best = self._checkpoint_dir(self.state.best_step) if self.cfg.load_best_model_at_end else None
            keep_newest(self.run_dir.path, self.cfg.save_total_limit, keep=best)


class _Clock:
    """Pairs and tokens per second of updates since the last log; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.seconds, self.updates, self.pairs, self.tokens = 0.0, 0, 0, 0

    def __enter__(self) -> None:
        self.start = time.perf_counter()
        self.updates += 1

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

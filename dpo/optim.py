"""What an optimiser is told: which weights decay, the learning rate's schedule, clipping, fp16's loss scale.

Schedules are Hugging Face's, step for step: a linear warm-up from 0 (the first step of a warm-up has rate 0), then
constant, linear to 0, or half a cosine to 0. One deviation: a step that fp16 skips counts for the schedule too.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpo.optimizers import OPTIMIZERS, Optimizer

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def build_optimizer(
    name: str, named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> Optimizer:
    """The optimiser of OPTIMIZERS; biases and norm weights are not decayed. The rate is set before every update."""
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    exempt = [p for name, p in trained if name.endswith("bias") or "norm" in name]
    decayed = [p for name, p in trained if not (name.endswith("bias") or "norm" in name)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return OPTIMIZERS[name]([g for g in groups if g["params"]])


def learning_rate_at(
    step: int, *, learning_rate: float, lr_scheduler_type: str, warmup_steps: int, total_steps: int
) -> float:
    """The rate of update number `step`, counted from 0."""
    if lr_scheduler_type == "constant":
        return learning_rate
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    shape = {
        "constant_with_warmup": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[lr_scheduler_type]
    return learning_rate * max(0.0, shape)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients to a joint norm of at most max_norm (0: leave them); returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


INITIAL_SCALE = 2.0**16


class LossScale:
    """fp16's smallest normal number is 6e-5; gradients below it vanish unless the loss is scaled up before backward.

    The scale starts at 2^16, halves when a gradient overflows (that step is skipped) and doubles after 2,000 steps
    without (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2). Other dtypes keep a scale of 1.
    """

    def __init__(self, dtype: torch.dtype):
        self.active = dtype == torch.float16
        self.scale = INITIAL_SCALE if self.active else 1.0
        self.good_steps = 0

    def unscale(self, parameters: list[nn.Parameter]) -> bool:
        """Divide the gradients by the scale; False where one overflowed and the step must be skipped."""
        if not self.active:
            return True
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient /= self.scale
        # One answer for all: each would wait for the device.
        if gradients and not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            self.scale, self.good_steps = self.scale / 2, 0
            if self.scale < 1:
                raise ValueError("fp16: gradients overflow at any loss scale; use bf16=true, or lower learning_rate")
            return False
        self.good_steps += 1
        if self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0
        return True

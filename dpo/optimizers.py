"""The optimisers, with PyTorch's results to the bit; its own classes import its compiler, a second of every start.

    AdamW     m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
              w <- w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    RMSprop   g <- g + decay w            v <- a v + (1 - a) g^2        w <- w - lr g / (sqrt(v) + eps)
    SGD       g <- g + decay w            w <- w - lr g

AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2. RMSprop is the DPO paper's (arXiv:2305.18290, App. B).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Optimizer:
    """param_groups, state, step and zero_grad are what they are in torch.optim; the rate is 0 until it is set."""

    keeps: tuple[str, ...] = ()
    """of every weight, from one update to the next: `step`, a number, and tensors of the weight's shape."""

    def __init__(self, groups: Sequence[dict[str, Any]]):
        """groups: each with `params` and `weight_decay`."""
        self.param_groups = [{"lr": 0.0, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """An update of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self.update(weights, [p.grad for p in weights], group["lr"], group["weight_decay"])

    def update(self, weights: list[Tensor], gradients: list[Tensor], lr: float, decay: float) -> None:
        raise NotImplementedError

    def state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """What is kept of a weight: zeros, as it begins, where there was no gradient yet."""
        state = self.state[weight]
        for name in self.keeps:
            if name not in state:
                # AdamW's kernel wants the step beside the weight, in float32.
                start = torch.zeros((), dtype=torch.float32, device=weight.device)
                state[name] = start if name == "step" else torch.zeros_like(weight, requires_grad=False)
        return state


class AdamW(Optimizer):
    keeps = ("exp_avg", "exp_avg_sq", "step")

    def update(self, weights: list[Tensor], gradients: list[Tensor], lr: float, decay: float) -> None:
        states = [self.state_of(weight) for weight in weights]
        m, v, t = ([state[name] for state in states] for name in self.keeps)
        torch._foreach_add_(t, 1)
        # One pass over memory; betas and epsilon are Hugging Face's.
        torch._fused_adamw_(
            weights, gradients, m, v, [], t, lr=lr, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip


class RMSprop(Optimizer):
    keeps = ("square_avg",)

    def update(self, weights: list[Tensor], gradients: list[Tensor], lr: float, decay: float) -> None:
        for w, g in zip(weights, gradients, strict=True):
            v = self.state_of(w)["square_avg"]
            g = g.add(w, alpha=decay) if decay else g
            v.mul_(0.99).addcmul_(g, g, value=1 - 0.99)
            w.addcdiv_(g, v.sqrt().add_(1e-8), value=-lr)


class SGD(Optimizer):
    def update(self, weights: list[Tensor], gradients: list[Tensor], lr: float, decay: float) -> None:
        for w, g in zip(weights, gradients, strict=True):
            w.add_(g.add(w, alpha=decay) if decay else g, alpha=-lr)


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw_torch": AdamW, "rmsprop": RMSprop, "sgd": SGD}
"""By the names of Hugging Face's `optim`."""

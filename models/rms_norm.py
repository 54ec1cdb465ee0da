"""RMSNorm with its gradient by hand: fewer passes over memory, and less of it kept, than autograd's chain.

    n = x r    r = 1 / sqrt(mean(x^2) + eps)    y = n w              Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4
    g = dy w   dx = r (g - n mean(g n))         dw = sum over vectors of dy n

Computed in float32 at least, as checkpoints were trained, and rounded to the dtype of x before the weight multiplies.
For the backward pass x stays in its own dtype, beside one number per vector. `rms_norm_twin` is the obvious twin.

Shapes: ... vectors of D numbers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x; differentiable in x and weight."""
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same, by autograd."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        return (wide * r).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, r, weight = ctx.saved_tensors
        (dy,) = grads
        n = _wide(x) * r
        dweight = None
        if ctx.needs_input_grad[1]:
            products = dy * n.to(x.dtype)
            dweight = products.flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        g = _wide(dy * weight.to(dy.dtype))
        share = (g * n).mean(-1, keepdim=True)
        return torch.addcmul(g, n, share, value=-1).mul_(r).to(x.dtype), dweight, None

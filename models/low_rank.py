"""Linear layers that read one input, each with a low-rank product, as one operation with its gradient by hand.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T                               W_i and b_i frozen
    u = x A^T            A: all A_i, one above the other: one product of a useful width in place of several thin ones
    g_i = s_i dy_i B_i   dA_i = g_i^T x   dB_i = s_i dy_i^T u_i   dx = sum_i dy_i W_i + g A

The low-rank products are added where the large ones are written, by the matrix product itself: autograd's chain would
go over each output three times (product, scale, add) and over dx once more for every layer. `LoRALinear.adapt` is the
slow twin; the sums are the same in another order, and bfloat16 rounds less often.

Shapes: T tokens, I inputs, O outputs of a layer, R rank, U ranks of all layers together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank_linear(
    x_TI: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor],
    Bs: Sequence[Tensor], scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """[(T, O) of each layer]; differentiable in x, As (R, I) and Bs (O, R), which may be wider than x."""
    outputs = _LowRankLinear.apply(x_TI, tuple(scalings), *weights, *biases, *As, *Bs)
    return list(outputs)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, scalings: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        n = len(scalings)
        weights, biases, As, Bs = (tensors[i * n : (i + 1) * n] for i in range(4))
        u_TU = x_TI @ _stacked(As, x_TI).T
        outputs = []
        parts = u_TU.split([len(A) for A in As], dim=1)
        for weight, bias, B, u_TR, scaling in zip(weights, biases, Bs, parts, scalings, strict=True):
            y_TO = torch.nn.functional.linear(x_TI, weight, bias)
            outputs.append(y_TO.addmm_(u_TR, B.to(x_TI.dtype).T, alpha=scaling))
        ctx.scalings = scalings
        ctx.save_for_backward(x_TI, u_TU, *weights, *As, *Bs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.scalings)
        x_TI, u_TU, *rest = ctx.saved_tensors
        weights, As, Bs = (rest[i * n : (i + 1) * n] for i in range(3))
        sizes = [len(A) for A in As]
        gs, grad_Bs = [], []
        for dy_TO, B, u_TR, s in zip(grads, Bs, u_TU.split(sizes, 1), ctx.scalings, strict=True):
            gs.append((dy_TO @ B.to(dy_TO.dtype)).mul_(s))
            grad_Bs.append((dy_TO.T @ u_TR).to(B.dtype).mul_(s))
        g_TU = torch.cat(gs, dim=1)
        grad_As = (g_TU.T @ x_TI).split(sizes)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = g_TU @ _stacked(As, x_TI)
            for dy_TO, weight in zip(grads, weights, strict=True):
                dx_TI.addmm_(dy_TO, weight)
        nothing = [None] * (2 * n)
        return (dx_TI, None, *nothing, *(dA.to(A.dtype) for dA, A in zip(grad_As, As, strict=True)), *grad_Bs)


def _stacked(As: Sequence[Tensor], like: Tensor) -> Tensor:
    """(U, I) in the dtype of the computation."""
    return torch.cat([A.to(like.dtype) for A in As]) if len(As) > 1 else As[0].to(like.dtype)

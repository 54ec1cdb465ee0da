"""SwiGLU's product with its gradient by hand: one of the four tensors that autograd would keep is computed again.

    y = silu(a) b       da = dy b silu'(a)       db = dy silu(a)                  Shazeer 2020, arXiv:2002.05202, Eq. 6

Autograd keeps a, b and silu(a); this keeps a and b. silu costs little beside the matrix products around it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; differentiable in both."""
    return _SwiGLU.apply(gate, up)


def swiglu_twin(gate: Tensor, up: Tensor) -> Tensor:
    """The same, by autograd."""
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (dy,) = grads
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)

"""Weights made ready for decoding: in the layout of the CPU's matrix kernel, side by side where they share an input.

A step of decoding multiplies a few rows with every weight, so reading weights is what it costs. oneDNN reads its own
blocked layout up to twice as fast as a row-major matrix, and one product for q, k and v is faster than three. The
outputs are those of `Linear` to rounding: the same sums in another order. Adapters stay apart, in their own precision,
because a small update that is added to a bfloat16 weight is rounded away.

The copy costs the model's size while it lives. Originals that are mapped from their file need not stay in memory
meanwhile. Nothing is packed on other devices than the CPU, and where oneDNN is missing or has no kernel for the dtype.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from models.transformer import MLP, Attention, Linear, Transformer


class Packed:
    """x -> [x W^T + b for every W and b], as one product."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype):
        self.sizes = [len(weight) for weight in weights]
        self.bias = torch.cat([bias.detach().to(dtype) for bias in biases]) if biases else None
        # What PyTorch's own compiler calls for a frozen weight on the CPU; it is not in the public interface.
        joint = torch.cat([weight.detach().to(dtype) for weight in weights])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(joint, None)

    def __call__(self, x: Tensor) -> list[Tensor]:
        joint = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return list(joint.split(self.sizes, dim=-1))


@contextmanager
def packed(model: Transformer) -> Iterator[None]:
    """Within the block, products with the model's weights, as they are at its start, are faster. Without gradients."""
    if model.packed_head is not None or model.device.type != "cpu" or not _has_kernel(model.dtype):
        yield  # an outer block has packed it, or there is no kernel for it
        return
    groups = list(_sharing_an_input(model))
    try:
        for layers in groups:
            biases = [layer.bias for layer in layers if layer.bias is not None]
            layers[0].packed = Packed([layer.weight for layer in layers], biases, model.dtype)
        model.packed_head = Packed([model.head_weight_VD], [], model.dtype)
        yield
    finally:
        for layers in groups:
            layers[0].packed = None
        model.packed_head = None


def _has_kernel(dtype: torch.dtype) -> bool:
    """By trial: float64 has none, float16 none before the newest CPUs, bfloat16 none on old ones."""
    try:
        Packed([torch.zeros(1, 1)], [], dtype)(torch.zeros(1, 1, dtype=dtype))
    except (AttributeError, RuntimeError):  # the first where PyTorch lacks these functions
        return False
    return True


def _sharing_an_input(model: Transformer) -> Iterator[list[Linear]]:
    """The layers that are computed by one call of `project`."""
    for module in model.modules():
        if isinstance(module, Attention):
            yield [module.q_proj, module.k_proj, module.v_proj]
            yield [module.o_proj]
        elif isinstance(module, MLP):
            yield [module.gate_proj, module.up_proj]
            yield [module.down_proj]

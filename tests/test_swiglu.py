"""SwiGLU's product by hand equals its twin by autograd, in value and gradient."""

import pytest
import torch

from models.swiglu import swiglu, swiglu_twin


def drawn(dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(4, 5, generator=draw, dtype=torch.float64)).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_the_twins(dtype):
    gate, up, dy = drawn(dtype)
    inputs = [t.requires_grad_() for t in (gate, up)]
    one, other = swiglu(*inputs), swiglu_twin(*inputs)
    assert torch.equal(one, other)
    found, expected = (torch.autograd.grad(y, inputs, dy) for y in (one, other))
    assert all(map(torch.equal, found, expected))


def test_its_gradient_is_the_difference_quotient():
    gate, up, _ = drawn(torch.float64)
    assert torch.autograd.gradcheck(swiglu, (gate.requires_grad_(), up.requires_grad_()))

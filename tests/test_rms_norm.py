"""RMSNorm by hand equals its twin by autograd, in value and gradient."""

import pytest
import torch

from models.rms_norm import rms_norm, rms_norm_twin

EPS = 1e-5


def drawn(dtype: torch.dtype, wide: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(s, generator=draw, dtype=torch.float64) for s in (shape, shape[-1:], shape))
    return x.to(dtype).requires_grad_(), weight.to(wide).requires_grad_(), dy.to(dtype)


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8)])
def test_value_and_gradient_are_the_twins(shape):
    x, weight, dy = drawn(torch.float64, torch.float64, *shape)
    one, other = rms_norm(x, weight, EPS), rms_norm_twin(x, weight, EPS)
    assert torch.equal(one, other)
    for found, expected in zip(
        torch.autograd.grad(one, (x, weight), dy), torch.autograd.grad(other, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_its_gradient_is_the_difference_quotient():
    x, weight, _ = drawn(torch.float64, torch.float64, 4, 6)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32])
def test_in_bfloat16_the_value_is_the_twins_to_the_bit_and_the_gradient_as_near_to_the_truth(wide):
    """The truth is float64's; a rounding is 2^-9 of the number, and the twin's error is the yardstick."""
    x, weight, dy = drawn(torch.bfloat16, wide, 64, 32)
    exact = tuple(t.detach().double().requires_grad_() for t in (x, weight))
    truth = torch.autograd.grad(rms_norm_twin(*exact, EPS), exact, dy.double())
    errors = []
    for function in (rms_norm, rms_norm_twin):
        gradients = torch.autograd.grad(function(x, weight, EPS), (x, weight), dy)
        assert [g.dtype for g in gradients] == [torch.bfloat16, wide]
        errors.append([float((g.double() - t).norm() / t.norm()) for g, t in zip(gradients, truth, strict=True)])
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_twin(x, weight, EPS))
    assert all(ours < 1.1 * twins + 2**-9 for ours, twins in zip(*errors, strict=True))


def test_a_frozen_weight_or_input_gets_no_gradient():
    x, weight, dy = drawn(torch.float64, torch.float64, 4, 6)
    rms_norm(x, weight.detach(), EPS).backward(dy)
    rms_norm(x.detach(), weight, EPS).backward(dy)
    expected = torch.autograd.grad(rms_norm_twin(x, weight, EPS), (x, weight), dy)
    torch.testing.assert_close((x.grad, weight.grad), expected, rtol=1e-12, atol=1e-12)

"""The low-rank operation equals its slow twin, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.low_rank import low_rank_linear

T, I = 7, 5  # noqa: E741 (the shapes' letters)
LAYERS = [(4, 2, 0.5, True), (6, 3, 2.0, False), (3, 1, 1.0, True)]
"""(outputs, rank, scaling, bias) of layers that read one input."""


def parts(layers: list[tuple[int, int, float, bool]], dtype: torch.dtype, wide: torch.dtype) -> dict[str, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return {
        "x": [normal(T, I).requires_grad_()],
        "W": [normal(outputs, I) for outputs, *_ in layers],
        "b": [normal(outputs) if bias else None for outputs, _, _, bias in layers],
        "A": [normal(rank, I, dtype=wide).requires_grad_() for _, rank, *_ in layers],
        "B": [normal(outputs, rank, dtype=wide).requires_grad_() for outputs, rank, *_ in layers],
        "dy": [normal(T, outputs) for outputs, *_ in layers],
    }


def slow(x: Tensor, p: dict, scalings: list[float]) -> list[Tensor]:
    return [
        F.linear(x, W, b) + s * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
        for W, b, A, B, s in zip(p["W"], p["b"], p["A"], p["B"], scalings, strict=True)
    ]


def values_and_gradients(p: dict, outputs: list[Tensor]) -> list[Tensor]:
    wanted = [*p["x"], *p["A"], *p["B"]]
    return [*outputs, *torch.autograd.grad(outputs, wanted, p["dy"])]


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[:1], LAYERS[1:2]])
def test_it_equals_the_plain_products(layers):
    p, scalings = parts(layers, torch.float64, torch.float64), [s for _, _, s, _ in layers]
    fast = values_and_gradients(p, low_rank_linear(p["x"][0], p["W"], p["b"], p["A"], p["B"], scalings))
    for found, expected in zip(fast, values_and_gradients(p, slow(p["x"][0], p, scalings)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_its_gradient_is_the_difference_quotient():
    p, scalings = parts(LAYERS, torch.float64, torch.float64), [s for _, _, s, _ in LAYERS]
    inputs = (*p["x"], *p["A"], *p["B"])

    def outputs(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        n = len(LAYERS)
        return tuple(low_rank_linear(x, p["W"], p["b"], adapters[:n], adapters[n:], scalings))

    assert torch.autograd.gradcheck(outputs, inputs)


def test_float32_adapters_of_a_bfloat16_model_have_float32_gradients():
    """Against float64: a sum of a few bfloat16 products, each off by 2^-9 of itself, of numbers of size 1 to 10."""
    p, scalings = parts(LAYERS, torch.bfloat16, torch.float32), [s for _, _, s, _ in LAYERS]
    fast = values_and_gradients(p, low_rank_linear(p["x"][0], p["W"], p["b"], p["A"], p["B"], scalings))
    exact = {
        name: [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        for name, tensors in p.items()
    }
    for found, expected in zip(fast, values_and_gradients(exact, slow(exact["x"][0], exact, scalings)), strict=True):
        assert (found.double() - expected).norm() < 0.02 * expected.norm()
    assert [t.dtype for t in fast[len(LAYERS) :]] == [torch.bfloat16] + [torch.float32] * 2 * len(LAYERS)


def test_an_input_without_gradient_gets_none_and_the_adapters_theirs():
    p, scalings = parts(LAYERS, torch.float64, torch.float64), [s for _, _, s, _ in LAYERS]
    x = p["x"][0].detach()
    wanted = [*p["A"], *p["B"]]
    fast = torch.autograd.grad(low_rank_linear(x, p["W"], p["b"], p["A"], p["B"], scalings), wanted, p["dy"])
    for found, expected in zip(fast, torch.autograd.grad(slow(x, p, scalings), wanted, p["dy"]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

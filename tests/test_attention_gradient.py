"""Attention's backward pass by matrix products equals the kernel's, within bfloat16.

Shapes: N rows, H query heads, G key-value heads, E head dim, Q queries, K keys of a row.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models.attention
from models.attention import attention
from models.attention_gradient import BLOCK, attention_with_gradient
from models.stream import pack


def drawn(n: int, queries: int, keys: int, head_dim: int = 16, spread: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """(q of 6 heads, k and v of 2), scores as wide as spread^2, and the gradient of the output; bfloat16."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((6, queries, spread), (2, keys, spread), (2, keys, 1.0), (6, queries, 1.0))
    *qkv, do_NHQE = (s * torch.randn(n, heads, t, head_dim, generator=draw) for heads, t, s in sizes)
    return [x.bfloat16().requires_grad_() for x in qkv], do_NHQE.bfloat16()


def kernel(q_NHQE: Tensor, k_NGKE: Tensor, v_NGKE: Tensor, mask_NQK: Tensor | None) -> Tensor:
    mask_N1QK = None if mask_NQK is None else mask_NQK[:, None]
    return F.scaled_dot_product_attention(
        q_NHQE, k_NGKE, v_NGKE, attn_mask=mask_N1QK, is_causal=mask_NQK is None, enable_gqa=True
    )


def after_trunks(queries: int, keys: int, *trunks: int) -> Tensor:
    """(N, Q, K): query i of a row sees the keys 0 .. trunk + i."""
    return torch.arange(keys) <= torch.tensor(trunks)[:, None, None] + torch.arange(queries)[:, None]


CAUSAL = [(2, n, n, None) for n in (1, 2, 40, BLOCK, BLOCK + 1, 2 * BLOCK + 7)]
MASKED = [
    (2, 9, 20, after_trunks(9, 20, 11, 4)),
    (2, BLOCK + 5, BLOCK + 70, after_trunks(BLOCK + 5, BLOCK + 70, 65, 1)),
]


@pytest.mark.parametrize("head_dim", [16, 20, 128])
@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("case", range(len(CAUSAL + MASKED)))
def test_value_is_the_kernels_and_the_gradient_as_near_to_float64(case, spread, head_dim):
    """Of the gradients' norm, 3 roundings of 2^-9 may be wrong more than in the kernel, which keeps p in float32."""
    n, queries, keys, mask_NQK = (CAUSAL + MASKED)[case]
    qkv, do_NHQE = drawn(n, queries, keys, head_dim, spread)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = torch.autograd.grad(kernel(*exact, mask_NQK), exact, do_NHQE.double())
    ours_NHQE, kernels_NHQE = attention_with_gradient(*qkv, mask_NQK), kernel(*qkv, mask_NQK)
    assert torch.equal(ours_NHQE, kernels_NHQE)
    ours, kernels = (torch.autograd.grad(out_NHQE, qkv, do_NHQE) for out_NHQE in (ours_NHQE, kernels_NHQE))
    for found, yardstick, expected in zip(ours, kernels, truth, strict=True):
        if queries == 1 and keys == 1 and not expected.any():  # softmax of one score: no gradient
            assert found.norm() <= 2**-7 * do_NHQE.norm()
            continue
        error, allowed = ((x.double() - expected).norm() / expected.norm() for x in (found, yardstick))
        assert error <= allowed + 3 * 2**-9


def test_a_large_score_that_may_not_be_seen_gives_no_infinity_times_zero():
    """The last key would score 30 * 30 * 16 / 4 = 3,600 with any query; none sees it."""
    mask_NQK = after_trunks(4, 9, 3)
    qkv, do_NHQE = drawn(1, 4, 9)
    with torch.no_grad():
        qkv[0].fill_(30)
        qkv[1][:, :, 8] = 30
    dq_NHQE, dk_NGKE, dv_NGKE = torch.autograd.grad(attention_with_gradient(*qkv, mask_NQK), qkv, do_NHQE)
    assert all(gradient.isfinite().all() for gradient in (dq_NHQE, dk_NGKE, dv_NGKE))
    assert not dk_NGKE[:, :, 8].any() and not dv_NGKE[:, :, 8].any()


def test_a_query_that_sees_nothing_leaves_the_others_their_gradients():
    """Padding may, under a sliding window; its output is used by nobody, so its gradient is zero."""
    mask_NQK = after_trunks(4, 8, 3)
    qkv, do_NHQE = drawn(1, 4, 8)
    do_NHQE[:, :, 2] = 0
    expected = torch.autograd.grad(attention_with_gradient(*qkv, mask_NQK), qkv, do_NHQE)
    blind_NQK = mask_NQK.clone()
    blind_NQK[:, 2] = False
    found = torch.autograd.grad(attention_with_gradient(*qkv, blind_NQK), qkv, do_NHQE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("window", [None, 5])
def test_a_stream_that_trains_in_bfloat16_takes_it(window, monkeypatch):
    """Branches of unlike length, so that rows are padded. Held to float64's attention, which takes the kernel."""
    calls = []
    monkeypatch.setattr(
        models.attention, "attention_with_gradient", lambda *x: calls.append(x) or attention_with_gradient(*x)
    )
    stream = pack([[1] * 9, [2] * 3, [3] * 20], [[[4] * 5, [5] * 12], [[6], [7] * 2, [8] * 4], [[9] * 30, [10] * 7]])
    rows, do_NHQE = drawn(1, len(stream.input_ids_T), len(stream.input_ids_T))
    qkv = [x[0].transpose(0, 1).detach().requires_grad_() for x in rows]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    do_THE = do_NHQE[0].transpose(0, 1)
    truth = torch.autograd.grad(attention(*exact, stream, window), exact, do_THE.double())
    assert not calls
    found = torch.autograd.grad(attention(*qkv, stream, window), qkv, do_THE)
    assert len(calls) == len(stream.rows)
    for gradient, expected in zip(found, truth, strict=True):
        assert (gradient.double() - expected).norm() <= 2**-6 * expected.norm()
    with torch.no_grad():
        attention(*qkv, stream, window)
    assert len(calls) == len(stream.rows)  # where nothing is trained the kernel is enough

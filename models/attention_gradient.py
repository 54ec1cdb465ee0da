"""Attention whose backward pass is matrix products, for bfloat16 on the CPU: there PyTorch's kernel takes two to four
times as long for short rows and a third longer for rows of thousands of tokens.

    p = exp(s q k^T - L)           L = logsumexp(s q k^T), kept by the forward kernel; s = 1 / sqrt(E)
    dv = p^T do                    ds = p (do v^T - d), d = sum_e do out
    dq = s ds k,  dk = s ds^T q    Dao 2023, arXiv:2307.08691, Algorithm 2

Queries go a block at a time, so the largest intermediate is a block's queries by its keys, and a causal row's block is
spared the keys behind it. Every product is of bfloat16 numbers and sums in float32, but leaves rounded; so what would
lose its digits by rounding before a subtraction is subtracted within the product: q is lengthened by -L / s, in two
bfloat16 parts, and k by ones, likewise do by -d and v by ones. What is rounded then is an exponent near zero wherever
p matters. `F.scaled_dot_product_attention` is the twin.

Shapes: N rows, H query heads, G key-value heads, S = H / G of them per key, E head dim, Q queries, K keys of a row; C
queries of a block in all S heads, W = E + 2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries of a block: enough for the products to run at full speed, few enough to spare keys."""


def attention_with_gradient(q_NHQE: Tensor, k_NGKE: Tensor, v_NGKE: Tensor, mask_NQK: Tensor | None) -> Tensor:
    """(N, H, Q, E): softmax(q k^T / sqrt(E)) v over the keys that mask allows; None: causal, Q == K."""
    return _Attention.apply(q_NHQE, k_NGKE, v_NGKE, mask_NQK)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHQE: Tensor, k_NGKE: Tensor, v_NGKE: Tensor, mask_NQK: Tensor | None) -> Tensor:
        out_NHQE, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_NHQE, k_NGKE, v_NGKE, 0.0, mask_NQK is None, attn_mask=_added(mask_NQK, q_NHQE.dtype)
        )
        ctx.save_for_backward(q_NHQE, k_NGKE, v_NGKE, mask_NQK, out_NHQE, lse)
        return out_NHQE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHQE, k_NGKE, v_NGKE, mask_NQK, out_NHQE, lse_NHQ = ctx.saved_tensors
        (do_NHQE,) = grads
        (N, H, Q, E), (G, K), dtype = q_NHQE.shape, k_NGKE.shape[1:3], q_NHQE.dtype
        scale = E**-0.5
        k_MKW, v_MKW = (torch.nn.functional.pad(x.flatten(0, 1), (0, 2), value=1.0) for x in (k_NGKE, v_NGKE))
        added_N1QK = _added(mask_NQK, dtype)
        dq_NHQE = torch.empty_like(q_NHQE)
        dk_MKE, dv_MKE = (torch.zeros(N * G, K, E) for _ in range(2))
        for start in range(0, Q, BLOCK):
            block = slice(start, min(start + BLOCK, Q))
            seen = K if added_N1QK is not None else block.stop
            q_NHBE, do_NHBE = q_NHQE[:, :, block], do_NHQE[:, :, block]
            d_NHB = (do_NHBE.float() * out_NHQE[:, :, block]).sum(-1)
            q_MCW = _lengthened(q_NHBE, lse_NHQ[:, :, block] / -scale).view(N * G, -1, E + 2)
            do_MCW = _lengthened(do_NHBE, -d_NHB).view(N * G, -1, E + 2)
            k_MLW, v_MLW = k_MKW[:, :seen], v_MKW[:, :seen]
            p_MCL = torch.baddbmm(q_MCW.new_empty(()), q_MCW, k_MLW.mT, beta=0, alpha=scale)
            p_NHBL = p_MCL.view(N, H, -1, seen)
            if added_N1QK is not None:
                p_NHBL += added_N1QK[:, :, block]
            p_MCL.exp_()
            if added_N1QK is None:
                p_NHBL[..., block].tril_()
            dv_MKE[:, :seen] += p_MCL.mT @ do_MCW[..., :E]
            ds_MCL = torch.bmm(do_MCW, v_MLW.mT).mul_(p_MCL)
            dk_MKE[:, :seen] += ds_MCL.mT @ q_MCW[..., :E]
            dq_NHQE[:, :, block] = (ds_MCL @ k_MLW[..., :E]).view(N, H, -1, E)
        dk_NGKE, dv_NGKE = (x.to(dtype).view_as(k_NGKE) for x in (dk_MKE.mul_(scale), dv_MKE))
        return dq_NHQE.mul_(scale), dk_NGKE, dv_NGKE, None


def _added(mask_NQK: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(N, 1, Q, K): 0 where a key is seen, else -inf."""
    if mask_NQK is None:
        return None
    return torch.zeros(mask_NQK.shape, dtype=dtype).masked_fill_(~mask_NQK, -torch.inf)[:, None]


def _lengthened(x_NHQE: Tensor, last_NHQ: Tensor) -> Tensor:
    """(N, H, Q, E + 2): x, and a float32 number in two parts of x's dtype."""
    high_NHQ = last_NHQ.to(x_NHQE.dtype)
    return torch.cat([x_NHQE, high_NHQ[..., None], (last_NHQ - high_NHQ).to(x_NHQE.dtype)[..., None]], -1)

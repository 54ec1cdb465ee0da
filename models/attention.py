"""Softmax attention over a packed stream: softmax(q k^T / sqrt(E)) v, each token over what it may see.

`attention` computes it row by row with PyTorch's fused kernel on CPU and CUDA, whose backward pass bfloat16 on the CPU
replaces (models.attention_gradient); `dense_attention` is its obvious twin over a (T, T) visibility matrix, the oracle
of the tests. Grouped-query attention: H query heads share G key-value
heads (Ainslie et al. 2023, arXiv:2305.13245). With a sliding window a token sees itself and the window - 1 positions
before it (Mistral: Jiang et al. 2023, arXiv:2310.06825).

Shapes: T tokens, H query heads, G key-value heads, E head dim, N rows, Q queries, K keys of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention_gradient import attention_with_gradient
from models.stream import AttentionRows, Stream


def attention(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, stream: Stream, window: int | None) -> Tensor:
    """(T, H, E): every token's attention over its trunk and its own branch; window: at most so many tokens back."""
    outputs = []
    for rows in stream.rows:
        q_NHQE, k_NGKE, v_NGKE = (
            _gather(x, index) for x, index in ((q_THE, rows.query_NQ), (k_TGE, rows.key_NK), (v_TGE, rows.key_NK))
        )
        mask_NQK = rows.mask_NQK
        if window is not None and rows.key_NK.shape[1] > window:
            mask_NQK = _within(window, rows, stream.positions_T)
        if by_products(q_NHQE.device, q_NHQE.dtype) and torch.is_grad_enabled():
            out_NHQE = attention_with_gradient(q_NHQE, k_NGKE, v_NGKE, mask_NQK)
        else:
            out_NHQE = F.scaled_dot_product_attention(
                q_NHQE, k_NGKE, v_NGKE, attn_mask=None if mask_NQK is None else mask_NQK[:, None],
                is_causal=mask_NQK is None, enable_gqa=True,
            )  # fmt: skip
        outputs.append(out_NHQE.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, stream.slot_T)


def by_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether models.attention_gradient is faster: in bfloat16 on the CPU; in float32 the kernel is as fast."""
    return device.type == "cpu" and dtype == torch.bfloat16


def _within(window: int, rows: AttentionRows, positions_T: Tensor) -> Tensor:
    """(N, Q, K): the rows' mask without the keys that lie `window` positions or more behind the query."""
    near_NQK = positions_T[rows.query_NQ][:, :, None] - positions_T[rows.key_NK][:, None] < window
    causal_NQK = torch.ones_like(near_NQK).tril() if rows.mask_NQK is None else rows.mask_NQK
    return near_NQK & causal_NQK


def _gather(x_THE: Tensor, index_NK: Tensor) -> Tensor:
    """(N, H, K, E) rows of x. index_select, because its backward is several times faster than that of x[index]."""
    n, k = index_NK.shape
    return x_THE.index_select(0, index_NK.flatten()).unflatten(0, (n, k)).transpose(1, 2)


def dense_attention(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, visible_TT: Tensor) -> Tensor:
    """(T, H, E): attention[i] over the keys j with visible_TT[i, j]; the textbook formula, quadratic in memory."""
    share = q_THE.shape[1] // k_TGE.shape[1]
    k_THE, v_THE = k_TGE.repeat_interleave(share, dim=1), v_TGE.repeat_interleave(share, dim=1)
    scores_HTT = torch.einsum("ihe,jhe->hij", q_THE, k_THE) / q_THE.shape[-1] ** 0.5
    weights_HTT = scores_HTT.masked_fill(~visible_TT, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhe->ihe", weights_HTT, v_THE)

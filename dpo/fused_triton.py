"""What dpo.fused computes of one chunk of logits, as a Triton kernel: two passes over it, and nothing beside it.

    m = max_v z_v     s = sum_v exp(z_v - m)     q = sum_v exp(z_v - m)^2
    log p_y = z_y - m - log s        log sum_v p_v^2 = log q - 2 log s        z_v <- onehot(y)_v - p_v

The first pass is online (Milakov & Gimelshein 2018, arXiv:1805.02867, Alg. 3): where a block of logits raises m to m',
s is scaled by exp(m - m') and q by its square. The second writes the residual over the logits. Everything between is
float32, and a row's result does not depend on how many others there are. dpo.fused has the same in PyTorch's words.

It runs on CUDA, or anywhere in Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported).

Shapes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""logits of a row that are looked at together."""
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # below every logit but -inf, whose difference to itself is NaN


def log_softmax_of_target(
    logits_CV: Tensor, target_C: Tensor, *, sum_sq: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log p of each target, the log-sum-exp, log sum p^2 if asked for), each (C,) float32.

    residual: overwrite the logits with onehot - softmax, in their own dtype.
    """
    logps_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    lse_C = torch.empty_like(logps_C)
    log_sum_sq_C = torch.empty_like(logps_C) if sum_sq else None
    rows, vocabulary = logits_CV.shape
    if rows:
        _kernel[(rows,)](
            logits_CV, target_C, logps_C, lse_C, log_sum_sq_C, logits_CV.stride(0), vocabulary,
            RESIDUAL=residual, BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return logps_C, lse_C, log_sum_sq_C


@triton.jit
def _kernel(logits, target, logps, lse, log_sum_sq, stride, vocabulary, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """One row of the chunk; log_sum_sq may be None."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    y = tl.load(target + row)
    z_y = tl.load(logits + y).to(tl.float32)  # before it is overwritten
    m, s, q = tl.full((), LOWEST, tl.float32), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(logits + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(z))
        shrink, e = tl.exp(m - higher), tl.exp(z - higher)
        m, s, q = higher, s * shrink + tl.sum(e), q * shrink * shrink + tl.sum(e * e)
    log_s = tl.log(s)
    tl.store(logps + row, z_y - m - log_s)
    tl.store(lse + row, m + log_s)
    if log_sum_sq is not None:
        tl.store(log_sum_sq + row, tl.log(q) - 2 * log_s)
    if RESIDUAL:
        tl.debug_barrier()  # every warp has read what is overwritten now
        for start in range(0, vocabulary, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(logits + v, mask=v < vocabulary).to(tl.float32)
            p = tl.exp(z - m - log_s)
            residual = tl.where(v == y, 1.0, 0.0) - p
            tl.store(logits + v, residual.to(logits.dtype.element_ty), mask=v < vocabulary)

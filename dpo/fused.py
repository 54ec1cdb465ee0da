"""The fused masked log-softmax: log pi of the target tokens without the (R, V) logits.

    logp_t = h_t . W[y_t] - logsumexp_v(h_t . W[v])          d logp_t / d h_t = (onehot(y_t) - softmax(h_t W^T)) W

Rows go through the head a chunk at a time, so the largest intermediate is (C, V), in the weights' dtype. With a frozen
head (LoRA) the gradient of each log-probability with respect to its hidden state is finished in the forward pass, while
the chunk's softmax is at hand, and the backward pass is one multiplication. A trained head's own gradient needs the
loss's weight on every token. Where all tokens are one chunk, onehot - softmax is kept for it. Where they are not, the
backward pass computes it again from the log-sum-exp, a block of the vocabulary for all tokens at a time: then each row
of the head's gradient is one product, and no second (V, D) sum is there.

log sum_v p_v^2 can be had beside it, without gradient, from the softmax that is at hand.

On CUDA one kernel makes these of a chunk's logits: dpo.fused_triton, whose slow twin is `_log_softmax` here.

The softmax is float32 at least. onehot - softmax is formed before it is rounded to the weights' dtype: for a confident
token both are near one, and their difference is the gradient. What is summed over blocks is summed in float32.

Shapes: R response tokens, C of them in a chunk, D width, V vocabulary; B rows or B columns of a block, which is the
part of a chunk that one pass of the processor's cache holds.
"""

import shutil
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Elements of one chunk's logits: 32 MiB in bfloat16. Large enough that the matrix product runs at full speed.
CHUNK_ELEMENTS = 1 << 24
# Elements of a block on the CPU: 8 MiB in float32, which stays in the cache; larger ones take up to five times as long.
BLOCK_ELEMENTS = 1 << 21


def fused_logps(hidden_RD: Tensor, head_weight_VD: Tensor, target_R: Tensor, chunk: int | None = None) -> Tensor:
    """(R,) log softmax(hidden W^T)[target] in nats, as dpo.logprobs.gather_logps; differentiable in both arguments.

    chunk: rows per chunk; by default as many as CHUNK_ELEMENTS allows.
    """
    return _fused(hidden_RD, head_weight_VD, target_R, chunk, False)[0]


def fused_logps_and_log_sum_sq(
    hidden_RD: Tensor, head_weight_VD: Tensor, target_R: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """fused_logps, and (R,) log sum_v softmax(hidden W^T)[v]^2 without gradient, as dpo.logprobs.gather_log_sum_sq."""
    return _fused(hidden_RD, head_weight_VD, target_R, chunk, True)


def _fused(hidden_RD: Tensor, head_weight_VD: Tensor, target_R: Tensor, chunk: int | None, sum_sq: bool) -> Any:
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // head_weight_VD.shape[0])
    return _FusedLogps.apply(hidden_RD, head_weight_VD, target_R, chunk, sum_sq)


class _FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, head_weight_VD: Tensor, target_R: Tensor, chunk: int, sum_sq: bool
    ) -> tuple[Tensor, Tensor | None]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        weight_VD = head_weight_VD.to(hidden_RD.dtype)
        rows, vocabulary = len(hidden_RD), len(weight_VD)
        finish, keep = wants_hidden and not wants_head, wants_head and rows <= chunk
        logps_R = torch.empty(rows, dtype=_wide(hidden_RD.dtype), device=hidden_RD.device)
        lse_R = torch.empty_like(logps_R)
        log_sum_sq_R = torch.empty_like(logps_R) if sum_sq else None
        slope_RD = torch.empty_like(hidden_RD) if finish else None
        # One for all chunks: fresh memory costs page faults.
        chunk_CV = hidden_RD.new_empty(min(chunk, rows), vocabulary)
        for part in _chunks(rows, chunk):
            logits_CV = torch.mm(hidden_RD[part], weight_VD.T, out=chunk_CV[: part.stop - part.start])
            results = _log_softmax(logits_CV, target_R[part], sum_sq=sum_sq, residual=finish or keep)
            for whole_R, result_C in zip((logps_R, lse_R, log_sum_sq_R), results, strict=True):
                if whole_R is not None and result_C is not None:
                    whole_R[part] = result_C
            if slope_RD is not None:
                torch.mm(logits_CV, weight_VD, out=slope_RD[part])
        ctx.kept, ctx.block = keep, _block(chunk * vocabulary, logps_R) // max(1, rows)
        recompute = (target_R, logps_R, lse_R)
        kept = (slope_RD,) if finish else (hidden_RD, head_weight_VD, *((chunk_CV,) if keep else recompute))
        ctx.save_for_backward(*kept)
        if log_sum_sq_R is not None:
            ctx.mark_non_differentiable(log_sum_sq_R)
        return logps_R, log_sum_sq_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_R = grads[0]
        if len(ctx.saved_tensors) == 1:
            (slope_RD,) = ctx.saved_tensors
            return (grad_R[:, None] * slope_RD).to(slope_RD.dtype), None, None, None, None
        hidden_RD, head_weight_VD, *rest = ctx.saved_tensors
        weight_VD = head_weight_VD.to(hidden_RD.dtype)
        grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=grad_R.dtype)
        grad_head_VD = torch.empty_like(head_weight_VD)
        for part in _chunks(len(weight_VD), max(1, ctx.block)):
            if ctx.kept:
                residual_RB = rest[0][:, part].to(grad_R.dtype, copy=True)
            else:
                residual_RB = _residual((hidden_RD @ weight_VD[part].T).to(grad_R.dtype), part, *rest)
            residual_RB = residual_RB.mul_(grad_R[:, None]).to(weight_VD.dtype)
            grad_hidden_RD += residual_RB @ weight_VD[part]
            grad_head_VD[part] = residual_RB.T @ hidden_RD
        return grad_hidden_RD.to(hidden_RD.dtype), grad_head_VD, None, None, None


def _log_softmax(
    logits_CV: Tensor, target_C: Tensor, *, sum_sq: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log softmax[target], the log-sum-exp, log sum p^2 if asked for), each (C,), float32 at least.

    residual: onehot(target) - softmax takes the place of the logits.
    """
    if (kernel := kernel_of(logits_CV.device, logits_CV.dtype)) is not None:
        return kernel.log_softmax_of_target(logits_CV, target_C, sum_sq=sum_sq, residual=residual)
    log_sum_sq_C = _log_sum_sq(logits_CV) if sum_sq else None
    logps_C = torch.empty(len(logits_CV), dtype=_wide(logits_CV.dtype), device=logits_CV.device)
    lse_C = torch.empty_like(logps_C)
    for part in _chunks(len(logits_CV), max(1, _block(logits_CV.numel(), logps_C) // logits_CV.shape[1])):
        softmax_BV = logits_CV[part].to(logps_C.dtype, copy=True)
        target_logits_B = softmax_BV.gather(-1, target_C[part, None])[:, 0]
        top_B = softmax_BV.amax(-1)
        sum_B = softmax_BV.sub_(top_B[:, None]).exp_().sum(-1)
        lse_C[part] = top_B + sum_B.log()
        logps_C[part] = target_logits_B - top_B - sum_B.log()
        if residual:
            logits_CV[part] = softmax_BV.div_(-sum_B[:, None])
    if residual:
        row_C = torch.arange(len(target_C), device=target_C.device)
        logits_CV[row_C, target_C] = _one_minus_p(logps_C).to(logits_CV.dtype)
    return logps_C, lse_C, log_sum_sq_C


def kernel_of(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """dpo.fused_triton: on CUDA, where Triton is; it has no float64."""
    return _triton() if device.type == "cuda" and dtype != torch.float64 else None


@cache
def _triton() -> ModuleType | None:
    if shutil.which("gcc") is None and shutil.which("clang") is None:  # with which Triton compiles what calls a kernel
        return None
    try:
        from dpo import fused_triton
    except ImportError:
        return None
    return fused_triton


def _residual(logits_RB: Tensor, part: slice, target_R: Tensor, logps_R: Tensor, lse_R: Tensor) -> Tensor:
    """onehot(target) - softmax of a part of the vocabulary, in place of its logits."""
    residual_RB = logits_RB.sub_(lse_R[:, None]).exp_().neg_()
    (row,) = torch.where((part.start <= target_R) & (target_R < part.stop))
    residual_RB[row, target_R[row] - part.start] = _one_minus_p(logps_R[row])
    return residual_RB


def _one_minus_p(logps: Tensor) -> Tensor:
    return -logps.expm1()


def _log_sum_sq(logits_CV: Tensor) -> Tensor:
    """log sum_v softmax_v^2."""
    parts = _chunks(len(logits_CV), max(1, _block(logits_CV.numel(), logits_CV) // logits_CV.shape[1]))
    logps = (logits_CV[part].to(_wide(logits_CV.dtype)).log_softmax(-1) for part in parts)
    return torch.cat([(2 * logps_BV).logsumexp(-1) for logps_BV in logps])


def _block(elements: int, like: Tensor) -> int:
    """Elements of a block, of a chunk of so many."""
    return min(elements, BLOCK_ELEMENTS) if like.device.type == "cpu" else elements


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk))

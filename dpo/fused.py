"""The fused masked log-softmax: log pi of the target tokens without the (R, V) logits.

    logp_t = h_t . W[y_t] - logsumexp_v(h_t . W[v])          d logp_t / d h_t = (onehot(y_t) - softmax(h_t W^T)) W

Rows go through the head a chunk at a time, so the largest intermediate is (C, V). With a frozen head (LoRA) the
gradient of each log-probability with respect to its hidden state is finished in the forward pass, while the chunk's
softmax is at hand, and the backward pass is one multiplication. A trained head recomputes each chunk instead, because
its own gradient needs the loss's weight on every token.

log sum_v p_v^2 can be had beside it, without gradient, from the softmax that is at hand.

On CUDA one kernel does all of it in place of the logits: dpo.fused_triton, whose slow twin stands here.

The softmax is float32 at least. onehot - softmax is formed before it is rounded to the weights' dtype: for a confident
token both are near one, and their difference is the gradient. The head's gradient is accumulated in float32.

Shapes: R response tokens, C of them in a chunk, D width, V vocabulary.
"""

import shutil
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Elements of one chunk's logits: 64 MiB in float32. Large enough that the matrix product runs at full speed.
CHUNK_ELEMENTS = 1 << 24


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
        ctx.chunk = chunk
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        weight_VD = head_weight_VD.to(hidden_RD.dtype)
        finish = wants_hidden and not wants_head
        logps_R = torch.empty(len(hidden_RD), dtype=_wide(hidden_RD.dtype), device=hidden_RD.device)
        log_sum_sq_R = torch.empty_like(logps_R) if sum_sq else None
        slope_RD = torch.empty_like(hidden_RD) if finish else None
        for part in _chunks(len(hidden_RD), chunk):
            logps_R[part], log_sum_sq_C, residual_CV = _of_chunk(
                hidden_RD[part], weight_VD, target_R[part], sum_sq=sum_sq, residual=finish
            )
            if log_sum_sq_R is not None:
                log_sum_sq_R[part] = log_sum_sq_C
            if slope_RD is not None:
                slope_RD[part] = residual_CV @ weight_VD
        ctx.save_for_backward(*((slope_RD,) if finish else (hidden_RD, head_weight_VD, target_R)))
        if log_sum_sq_R is not None:
            ctx.mark_non_differentiable(log_sum_sq_R)
        return logps_R, log_sum_sq_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_R = grads[0]
        if len(ctx.saved_tensors) == 1:
            (slope_RD,) = ctx.saved_tensors
            return (grad_R[:, None] * slope_RD).to(slope_RD.dtype), None, None, None, None
        hidden_RD, head_weight_VD, target_R = ctx.saved_tensors
        weight_VD = head_weight_VD.to(hidden_RD.dtype)
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_head_VD = torch.zeros(head_weight_VD.shape, dtype=_wide(weight_VD.dtype), device=weight_VD.device)
        for part in _chunks(len(hidden_RD), ctx.chunk):
            _, _, residual_CV = _of_chunk(
                hidden_RD[part], weight_VD, target_R[part], sum_sq=False, residual=True, times_C=grad_R[part]
            )
            grad_hidden_RD[part] = residual_CV @ weight_VD
            grad_head_VD += residual_CV.T @ hidden_RD[part]
        return grad_hidden_RD, grad_head_VD.to(head_weight_VD.dtype), None, None, None


def _of_chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, *, sum_sq: bool, residual: bool,
    times_C: Tensor | None = None,
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """(log p of each target, log sum p^2, times_C (onehot - softmax) in the weights' dtype); two only if asked for."""
    logits_CV = hidden_CD @ weight_VD.T
    if (kernel := kernel_of(logits_CV.device, logits_CV.dtype)) is not None:
        given = {"sum_sq": sum_sq, "residual": residual, "times_C": times_C}
        return *kernel.log_softmax_of_target(logits_CV, target_C, **given), logits_CV
    logps_CV = logits_CV.to(_wide(logits_CV.dtype)).log_softmax(-1)
    logps_C = logps_CV.gather(-1, target_C[:, None])[:, 0]
    log_sum_sq_C = (2 * logps_CV).logsumexp(-1) if sum_sq else None
    if not residual:
        return logps_C, log_sum_sq_C, None
    residual_CV = _residual(logps_CV, target_C)
    if times_C is not None:
        residual_CV *= times_C[:, None]
    return logps_C, log_sum_sq_C, residual_CV.to(logits_CV.dtype)


def kernel_of(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """dpo.fused_triton, which does the same in place of the logits: on CUDA, where Triton is; it has no float64."""
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


def _residual(logps_CV: Tensor, target_C: Tensor) -> Tensor:
    """onehot(target) - softmax, in place of the log-probabilities."""
    residual_CV = logps_CV.exp_().neg_()
    residual_CV[torch.arange(len(target_C), device=target_C.device), target_C] += 1
    return residual_CV


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk))

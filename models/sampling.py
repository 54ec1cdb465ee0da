"""Sampling: from next-token logits to a token, greedy or drawn, with the usual ways to cut the tail off.

    p = softmax(logits / temperature), cut by top-k, then top-p, then min-p, each on what the one before has left

A draw is the inverse of the cumulative distribution at one uniform number, so a sample is a function of its logits and
of its own numbers, whatever else is in the batch.

Sources: top-k, Fan et al. 2018, arXiv:1805.04833; top-p, Holtzman et al. 2020, arXiv:1904.09751, Sec. 3.1; min-p,
Nguyen et al. 2024, arXiv:2407.01082. The order is transformers'; of tokens that are equally probable all stay or none.

Shapes: N samples, V vocabulary, K of its most probable tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 takes the most likely token; top_k 0, top_p 1 and min_p 0 cut nothing."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def __post_init__(self) -> None:
        t = self.temperature
        for name, rule, holds in (
            # In float32 a smaller one may be 0.
            ("temperature", "must be 0, which is greedy, or 1e-6 or more", t == 0 or 1e-6 <= t < float("inf")),
            ("top_k", "must not be negative; 0 keeps every token", self.top_k >= 0),
            ("top_p", "must be above 0 and at most 1, which keeps every token", 0 < self.top_p <= 1),
            ("min_p", "must be at least 0, which keeps every token, and at most 1", 0 <= self.min_p <= 1),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
DRAWN = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
"""From the model's own distribution, uncut."""


def choose(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Tensor:
    """(N,) token ids; uniform_N in [0, 1) decides each draw. Raises ValueError for logits that are no distribution."""
    largest_N, likeliest_N = logits_NV.max(-1)
    if not largest_N.isfinite().all():
        raise ValueError(
            "next-token logits whose largest is NaN or infinite: nothing can be chosen by them; are the weights sound, "
            "and does the model overflow in float16 (bf16=true does not)?"
        )
    if sampling.temperature == 0:
        return likeliest_N
    p_NV = probabilities(logits_NV, sampling)
    # float64, or fifty thousand small terms would lose the tail. The last step guards against a total just below u.
    cumulative_NV = p_NV.cumsum(-1, dtype=torch.float64)
    drawn_N1 = torch.searchsorted(cumulative_NV, uniform_N.double()[:, None] * cumulative_NV[:, -1:], right=True)
    return drawn_N1[:, 0]


def probabilities(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """(N, V) probabilities that are drawn from, at least float32."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if 0 < sampling.top_k < logits_NV.shape[-1]:
        least_N1 = wide_NV.topk(sampling.top_k, dim=-1).values[:, -1:]
        wide_NV = wide_NV.masked_fill(wide_NV < least_N1, -torch.inf)
    logits_NV = (wide_NV - wide_NV.amax(-1, keepdim=True)) / sampling.temperature  # so that none overflows
    p_NV = logits_NV.softmax(-1)
    if sampling.top_p < 1:
        p_NV = p_NV.masked_fill(p_NV < _least_of_nucleus(p_NV, sampling.top_p), 0)
    if sampling.min_p > 0:
        p_NV = p_NV.masked_fill(p_NV < sampling.min_p * p_NV.amax(-1, keepdim=True), 0)
    return p_NV / p_NV.sum(-1, keepdim=True)


def _least_of_nucleus(p_NV: Tensor, top_p: float) -> Tensor:
    """(N, 1) the smallest of the largest probabilities that together reach top_p; equal ones stay together."""
    # The nucleus is nearly always among the first thousand, and sorting the whole vocabulary costs more than the model.
    for k in (min(1024, p_NV.shape[-1]), p_NV.shape[-1]):
        top_NK = p_NV.topk(k, dim=-1).values
        if bool((top_NK.sum(-1) >= top_p).all()):
            break
    beyond_NK = top_NK.cumsum(-1) - top_NK >= top_p  # whom the more probable ones do not need
    beyond_NK[:, 0] = False
    return top_NK.masked_fill(beyond_NK, 1).amin(-1, keepdim=True)

"""Attention over a packed stream by PyTorch's FlexAttention: one kernel for all rows, nothing gathered, nothing padded.

    token i sees j:  j <= i,  both of one segment or j in the trunk that i's segment forks off,  t_i - t_j < window

A segment is a run of tokens whose positions t count up by one: a trunk with its first branch, or any other branch,
which forks off at its own first position. Blocks of tokens that see nothing of one another are skipped (Dong et al.
2024, arXiv:2412.05496). The alternative is models.attention, whose `dense_attention` is the slow twin of both.

Left out: the CPU, on which PyTorch computes it without a backward pass, and slowly.

Shapes: T tokens, H query heads, G key-value heads, E head dim.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from models.stream import Stream

SMALLEST_HEAD = 16
"""numbers of a head that the kernel needs: its matrix products are no smaller."""
_MASKS: WeakKeyDictionary[Stream, dict[int | None, Any]] = WeakKeyDictionary()
"""made once for a stream, which the reference passes through after the policy."""


def refuse_flex(device: torch.device, head_dim: int) -> None:
    """ValueError where a model cannot be trained with it."""
    given, otherwise = "attn_implementation=flex_attention", "pass attn_implementation=sdpa"
    if device.type != "cuda":
        raise ValueError(f"{given} with device={device}: PyTorch has its gradient on CUDA alone; {otherwise}")
    if head_dim < SMALLEST_HEAD:
        raise ValueError(f"{given}: heads of {head_dim} numbers, and it needs at least {SMALLEST_HEAD}; {otherwise}")


def flex_attends(stream: Stream, windows: Sequence[int | None]) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Each layer's attention, (q_THE, k_TGE, v_TGE) -> (T, H, E); windows: each layer's sliding window."""
    masks = _MASKS.setdefault(stream, {})
    for window in set(windows) - masks.keys():
        masks[window] = block_mask(stream, window)
    return [partial(flex, mask=masks[window]) for window in windows]


def flex(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, mask: Any) -> Tensor:
    """(T, H, E): every token's attention over what the mask lets it see."""
    heads_first = (x.transpose(0, 1)[None] for x in (q_THE, k_TGE, v_TGE))
    return _kernel(q_THE.device.type)(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@cache
def _kernel(device: str) -> Any:
    """Not imported above, because PyTorch's compiler comes with it."""
    from torch.nn.attention.flex_attention import flex_attention

    # Every stream has another length. Without the compiler it is a formula over all (T, T) scores: for tests.
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def block_mask(stream: Stream, window: int | None) -> Any:
    """FlexAttention's BlockMask of a stream."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = len(stream.positions_T)
    device = stream.positions_T.device.type
    return create_block_mask(sees(stream, window), B=None, H=None, Q_LEN=tokens, KV_LEN=tokens, device=device)


def sees(stream: Stream, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """(batch, head, i, j) -> whether token i sees token j; FlexAttention's mask_mod, of index tensors of any shape."""
    position_T = stream.positions_T
    index_T = torch.arange(len(position_T), device=position_T.device)
    follows_T = torch.nn.functional.pad(position_T[1:] == position_T[:-1] + 1, (1, 0))
    # Segments and trunks are called by the index of their first token, the latest one up to here.
    segment_T = index_T.masked_fill(follows_T, 0).cummax(0).values
    trunk_T = index_T.masked_fill(position_T > 0, 0).cummax(0).values
    fork_T = position_T[segment_T]

    def visible(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        in_trunk = (segment_T[j] == trunk_T[i]) & (position_T[j] < fork_T[i])
        return (j <= i) & ((segment_T[j] == segment_T[i]) | in_trunk)

    if window is None:
        return visible
    too_far_T = position_T - window

    return lambda batch, head, i, j: visible(batch, head, i, j) & (position_T[j] > too_far_T[i])

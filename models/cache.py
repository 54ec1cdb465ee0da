"""The key-value cache: what generated tokens see of their prompts and of themselves, so that nothing is computed twice.

It is the packed stream continued. A row holds one prompt and its n samples, which share the prompt's keys and values:

    slots   x1 x2 x3 .. | a1 b1 | a2 b2 | a3 ..      prompt (padded to the longest), then a slot per sample and step
    sees    a token of a sees all of x and the a's up to itself

So a step of all samples is one attention call per layer without a copy: the samples' query heads that share a key head
are the queries of one row, and what a sample must not see is masked. Prompts of different lengths need no padding on
the left, for positions are given and not counted.

Shapes: T tokens, P prompts, N = P n samples, H query heads, G key-value heads, E head dim, S slots, Q = n H/G queries.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.attention import attention
from models.stream import Stream
from models.transformer import Attend, Transformer


class Cache:
    """Keys and values of every layer for P prompts with n samples each."""

    def __init__(self, model: Transformer, lengths_P: Tensor, samples: int, steps: int):
        """lengths_P: tokens of each prompt. steps: tokens that each sample may add."""
        config, device = model.config, model.device
        self.windows, self.samples = model.windows, samples
        longest = int(lengths_P.max())
        self.filled = longest
        slots = longest + steps * samples
        # Zeros, because a masked slot that held a NaN would still make one.
        size = (len(lengths_P), config.num_key_value_heads, slots, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(size, dtype=model.dtype, device=device) for _ in self.windows] for _ in range(2)
        )
        slot_S = torch.arange(slots, device=device)
        step_S, sample_S = (slot_S - longest) // samples, (slot_S - longest) % samples
        in_prompt_S = slot_S < longest
        self.position_PS = torch.where(in_prompt_S, slot_S, lengths_P[:, None] + step_S)
        sample_Q = torch.arange(samples, device=device).repeat_interleave(
            config.num_attention_heads // config.num_key_value_heads
        )
        own_QS = ~in_prompt_S & (sample_S == sample_Q[:, None])
        self.visible_PQS = (slot_S < lengths_P[:, None])[:, None] | own_QS

    def prefill(self, stream: Stream) -> list[Attend]:
        """Each layer's attention over the prompts, a stream without branches, keeping their keys and values."""
        prompt_T = (stream.positions_T == 0).cumsum(0) - 1

        def attend(layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
            self.keys[layer][prompt_T, :, stream.positions_T] = k_TGE
            self.values[layer][prompt_T, :, stream.positions_T] = v_TGE
            return attention(q_THE, k_TGE, v_TGE, stream, self.windows[layer])

        return [partial(attend, layer) for layer in range(len(self.windows))]

    def step(self) -> tuple[Tensor, list[Attend]]:
        """((N,) positions of one new token per sample, each layer's attention of these tokens over their past)."""
        start, end = self.filled, self.filled + self.samples
        self.filled = end
        position_P = self.position_PS[:, start]
        visible_PQS = self.visible_PQS[:, :, :end]
        distance_PS = position_P[:, None] - self.position_PS[:, :end]
        masks = {
            window: visible_PQS if window is None else visible_PQS & (distance_PS < window)[:, None]
            for window in set(self.windows)
        }

        def attend(layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
            keys_PGSE, values_PGSE = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
            keys_PGSE[:, :, start:] = rearrange(k_TGE, "(p n) g e -> p g n e", n=self.samples)
            values_PGSE[:, :, start:] = rearrange(v_TGE, "(p n) g e -> p g n e", n=self.samples)
            groups = k_TGE.shape[1]
            q_PGQE = rearrange(q_THE, "(p n) (g h) e -> p g (n h) e", n=self.samples, g=groups)
            out_PGQE = F.scaled_dot_product_attention(
                q_PGQE, keys_PGSE, values_PGSE, attn_mask=masks[self.windows[layer]][:, None]
            )
            return rearrange(out_PGQE, "p g (n h) e -> (p n) (g h) e", n=self.samples)

        attends: list[Attend] = [partial(attend, layer) for layer in range(len(self.windows))]
        return position_P.repeat_interleave(self.samples), attends

    def keep(self, kept_P: Tensor) -> None:
        """Forget all prompts but these."""
        self.keys, self.values = ([layer[kept_P] for layer in part] for part in (self.keys, self.values))
        self.position_PS, self.visible_PQS = self.position_PS[kept_P], self.visible_PQS[kept_P]

"""The packed stream: every prompt once, its responses as branches, no padding.

For prompts x with responses y1..yk the stream holds `x y1 .. yk`, prompt after prompt, in one row of T tokens:

    tokens      x1 x2 x3 | a1 a2 | b1 b2 b3 | x1 x2 | a1 ...
    positions    0  1  2    3  4    3  4  5    0  1    2
    sees        a token sees its own trunk x up to itself and its own branch up to itself; no sibling, no other prompt

So a branch's log-probability is what it would be in a row of its own, while the prompt's share of the work is done
once (prefix sharing: Wang & Hegde 2024, arXiv:2410.20305). The last prompt token predicts the first token of every
branch. The same stream carries preference pairs (k = 2), SFT rows (k = 1) and enumerated responses (any k).

Attention works on rows gathered from the stream: the first branch continues its trunk in one causal row, every other
branch is a row of its own queries against trunk and branch keys. Rows of similar length are padded to one batch;
nothing but attention ever sees that padding.

Shapes: T tokens of the stream, R response tokens, B branches, N rows, Q queries of a row, K keys of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A batch of rows may be padded to this many times its real query-key area, or up to SMALL whatever its share:
# below that the cost of one more call is larger than the cost of the padding.
PADDING_LIMIT = 1.25
SMALL_AREA = 1 << 18

Row = tuple[Sequence[int], range]
"""What a row's queries see besides themselves (a branch's trunk, or nothing), and its queries; stream indices."""
NOTHING = range(0)


@dataclass(frozen=True)
class AttentionRows:
    """N rows of attention of one padded size; padding points at token 0 and is seen by padding alone."""

    query_NQ: Tensor
    """int64 stream index of every query."""
    key_NK: Tensor
    """int64 stream index of every key."""
    mask_NQK: Tensor | None
    """True where a query sees a key; None: causal, and Q == K."""


@dataclass(frozen=True, eq=False)  # a stream is itself alone: models.flex remembers what it made of one
class Stream:
    input_ids_T: Tensor
    positions_T: Tensor
    predictor_R: Tensor
    """stream index of the token whose hidden state predicts each response token."""
    target_R: Tensor
    """the response tokens themselves."""
    lengths_B: Tensor
    """response tokens of every branch, in order; they sum to R."""
    rows: tuple[AttentionRows, ...]
    slot_T: Tensor
    """where each token's output lies in the rows' flattened and concatenated outputs."""

    def to(self, device: torch.device) -> "Stream":
        def move(x: Any) -> Any:
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        rows = tuple(AttentionRows(**{name: move(x) for name, x in vars(row).items()}) for row in self.rows)
        return Stream(**{name: move(x) for name, x in vars(self).items()} | {"rows": rows})


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]) -> Stream:
    """The stream of prompts[p] with branches responses[p][j], all of them token ids.

    Every prompt needs a token (else nothing predicts the first response token); a response may be empty.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts with {len(responses)} response lists: expected as many, at least one")
    ids: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    target: list[int] = []
    lengths: list[int] = []
    rows: list[Row] = []
    for prompt, branches in zip(prompts, responses, strict=True):
        if not prompt:
            raise ValueError("an empty prompt: every prompt needs at least one token to predict a response from")
        trunk = range(len(ids), len(ids) + len(prompt))
        ids += prompt
        positions += range(len(prompt))
        for j, response in enumerate(branches):
            branch = range(len(ids), len(ids) + len(response))
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
            # Token s of a branch is predicted by token s - 1; its first by the last of the trunk.
            predictor += [trunk[-1], *branch[:-1]] if response else []
            target += response
            lengths.append(len(response))
            if j == 0:
                rows.append((NOTHING, range(trunk.start, branch.stop)))
            elif response:
                rows.append((trunk, branch))
        if not branches:
            rows.append((NOTHING, trunk))
    batches, slot_T = attention_rows(rows, len(ids))
    return Stream(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(predictor, dtype=torch.long),
        torch.tensor(target, dtype=torch.long), torch.tensor(lengths, dtype=torch.long), batches, slot_T,
    )  # fmt: skip


def attention_rows(rows: Sequence[Row], tokens: int) -> tuple[tuple[AttentionRows, ...], Tensor]:
    """Rows batched by length, and the (T,) slot of every token in their concatenated outputs."""
    batches: list[AttentionRows] = []
    slot_T = torch.empty(tokens, dtype=torch.long)
    offset = 0
    causal = [row for row in rows if not row[0]]
    branching = [row for row in rows if row[0]]
    for group in batch_by_length(causal) + batch_by_length(branching):
        queries = [query for _, query in group]
        keys = [[*context, *query] for context, query in group]
        width_q, width_k = max(map(len, queries)), max(map(len, keys))
        mask_NQK = None
        if group[0][0]:
            # Query i of a branch after a trunk of n tokens sees keys 0 .. n + i.
            trunk_N = torch.tensor([len(context) for context, _ in group])
            mask_NQK = torch.arange(width_k) <= trunk_N[:, None, None] + torch.arange(width_q)[:, None]
        batches.append(AttentionRows(_pad(queries, width_q), _pad(keys, width_k), mask_NQK))
        for n, query in enumerate(queries):
            start = offset + n * width_q
            slot_T[query.start : query.stop] = torch.arange(start, start + len(query))
        offset += len(group) * width_q
    return tuple(batches), slot_T


def batch_by_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups of rows of similar size; see PADDING_LIMIT."""
    groups: list[list[Row]] = []
    real, width = 0, (0, 0)
    for context, query in sorted(rows, key=lambda row: (len(row[1]), len(row[0]))):
        q, k = len(query), len(context) + len(query)
        wider = (max(width[0], q), max(width[1], k))
        padded = wider[0] * wider[1] * (len(groups[-1]) + 1) if groups else 0
        if groups and padded <= max(PADDING_LIMIT * (real + q * k), SMALL_AREA):
            groups[-1].append((context, query))
            real, width = real + q * k, wider
        else:
            groups.append([(context, query)])
            real, width = q * k, (q, k)
    return groups


def _pad(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])

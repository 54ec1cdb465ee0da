"""The packed stream and its attention: every branch is what it would be in a row of its own.

Shapes: T tokens, R response tokens, H query heads, G key-value heads, E head dim, N rows, Q queries, K keys of a row.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import models.stream
from models.attention import attention, dense_attention
from models.stream import PADDING_LIMIT, SMALL_AREA, Stream, pack

HEADS, KEY_HEADS, HEAD_DIM = 6, 3, 5

# A stream's shape: for every prompt its length and the lengths of its branches.
Shape = list[tuple[int, list[int]]]
SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), min_size=0, max_size=5)), min_size=1, max_size=5
)


def pack_shape(shape: Shape) -> Stream:
    """The stream of that shape in which every token is another: token i has the id i."""
    ids = iter(range(10**6))
    rows = [([next(ids) for _ in range(x)], [[next(ids) for _ in range(y)] for y in ys]) for x, ys in shape]
    return pack([prompt for prompt, _ in rows], [responses for _, responses in rows])


def owners(shape: Shape) -> list[tuple[int, int, int]]:
    """(prompt, branch, position) of every token of pack_shape's stream; the trunk is branch -1."""
    tokens = []
    for p, (x, ys) in enumerate(shape):
        tokens += [(p, -1, t) for t in range(x)]
        tokens += [(p, j, x + t) for j, y in enumerate(ys) for t in range(y)]
    return tokens


def visible(shape: Shape, window: int | None = None) -> Tensor:
    """(T, T): a token sees its trunk and its own branch up to itself and `window` back; by definition, one by one."""
    tokens, back = owners(shape), window or len(owners(shape))
    return torch.tensor([[p == q and k in (-1, j) and t - back < u <= t for q, k, u in tokens] for p, j, t in tokens])


def random_qkv(tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(tokens, h, HEAD_DIM, dtype=torch.float64, generator=generator) for h in heads]


# --- the stream ---


def test_stream_by_hand():
    """x1 x2 x3 | a1 a2 | b1 b2 b3 | x1 x2 | a1: the example of the module's docstring."""
    stream = pack([[11, 12, 13], [21, 22]], [[[14, 15], [16, 17, 18]], [[23]]])
    assert stream.input_ids_T.tolist() == [11, 12, 13, 14, 15, 16, 17, 18, 21, 22, 23]
    assert stream.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2]
    assert stream.predictor_R.tolist() == [2, 3, 2, 5, 6, 9]
    assert stream.target_R.tolist() == [14, 15, 16, 17, 18, 23]
    assert stream.lengths_B.tolist() == [2, 3, 1]


def test_empty_responses_count_as_branches_without_tokens():
    stream = pack([[1, 2]], [[[], [3], []]])
    assert stream.input_ids_T.tolist() == [1, 2, 3]
    assert stream.lengths_B.tolist() == [0, 1, 0]
    assert (stream.predictor_R.tolist(), stream.target_R.tolist()) == ([1], [3])


@settings(deadline=None, max_examples=100)
@given(shape=SHAPES)
def test_every_token_is_predicted_by_its_predecessor_in_a_row_of_its_own(shape):
    """A token's id is its index here, so the predictor of (prompt, branch, t) is the visible one at t - 1."""
    stream, tokens = pack_shape(shape), owners(shape)
    assert stream.positions_T.tolist() == [t for _, _, t in tokens]
    assert stream.target_R.tolist() == [i for i, (_, j, _) in enumerate(tokens) if j >= 0]
    assert stream.lengths_B.tolist() == [y for _, ys in shape for y in ys]
    for predictor, target in zip(stream.predictor_R.tolist(), stream.target_R.tolist(), strict=True):
        (p, j, t), (q, k, u) = tokens[target], tokens[predictor]
        assert (q, u) == (p, t - 1)
        assert k in (-1, j)


def test_to_moves_every_tensor():
    moved = pack_shape([(3, [2, 1]), (2, [])]).to(torch.device("meta"))
    tensors = [*vars(moved).values(), *(t for rows in moved.rows for t in vars(rows).values())]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    assert len(tensors) == 6 + 3 * len(moved.rows) - 1  # the causal rows have no mask
    assert {t.device.type for t in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([], [], "0 prompts with 0 response lists"),
        ([[1], [2]], [[[3]]], "2 prompts with 1 response lists: expected as many"),
        ([[1], []], [[[3]], [[4]]], "an empty prompt: every prompt needs at least one token"),
    ],
)
def test_a_stream_without_prompts_to_predict_from_is_refused(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, responses)


# --- attention ---


@settings(deadline=None, max_examples=150)
@given(
    shape=SHAPES,
    window=st.sampled_from([None, 1, 2, 3, 6, 50]),
    small_area=st.sampled_from([0, 30, SMALL_AREA]),
    seed=st.integers(0, 99),
)
def test_attention_equals_its_dense_twin_in_value_and_gradient(shape, window, small_area, seed):
    """small_area 0 and 30 cut even these short rows into many batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.stream, "SMALL_AREA", small_area)
        stream = pack_shape(shape)
    fast, slow = ([x.clone().requires_grad_() for x in random_qkv(len(owners(shape)), seed)] for _ in range(2))
    fast_THE, slow_THE = attention(*fast, stream, window), dense_attention(*slow, visible(shape, window))
    torch.testing.assert_close(fast_THE, slow_THE, rtol=0, atol=1e-12)
    weight_THE = random_qkv(len(slow_THE), seed + 1)[0]
    (fast_THE * weight_THE).sum().backward()
    (slow_THE * weight_THE).sum().backward()
    for ours, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("branches", [0, 1, 2, 5])
def test_attention_equals_its_dense_twin_for_each_number_of_branches(branches):
    shape = [(7, [4, 1, 0, 9, 3][:branches]), (1, [2, 2, 0, 0, 5][:branches]), (12, [0, 6, 1, 1, 2][:branches])]
    qkv = random_qkv(len(owners(shape)))
    expected_THE = dense_attention(*qkv, visible(shape))
    torch.testing.assert_close(attention(*qkv, pack_shape(shape), None), expected_THE, rtol=0, atol=1e-12)


def test_dense_attention_by_hand():
    """Two tokens, one head of size 4 with q.k / 2 = ln 3 for the past and 0 for itself: weights 3/4 and 1/4."""
    q_THE = torch.zeros(2, 1, 4, dtype=torch.float64)
    q_THE[1, 0, 0] = 1
    k_TGE = torch.zeros_like(q_THE)
    k_TGE[0, 0, 0] = 2 * torch.tensor(3.0, dtype=torch.float64).log()
    v_TGE = torch.tensor([[[4.0, 0, 0, 1]], [[0, 8.0, 0, 1]]], dtype=torch.float64)
    out_THE = dense_attention(q_THE, k_TGE, v_TGE, torch.ones(2, 2).tril().bool())
    expected_THE = torch.tensor([[[4.0, 0, 0, 1]], [[3.0, 2.0, 0, 1]]], dtype=torch.float64)
    torch.testing.assert_close(out_THE, expected_THE, rtol=0, atol=1e-15)


def test_query_heads_share_key_heads_in_blocks():
    """Head h of 6 reads key-value head h // 2 of 3, as grouped-query checkpoints lay them out."""
    shape = [(3, [2, 4])]
    q_THE, k_TGE, v_TGE = random_qkv(9)
    whole_THE = attention(q_THE, k_TGE, v_TGE, pack_shape(shape), None)
    for h in range(HEADS):
        g = h // 2
        one_T1E = attention(q_THE[:, h : h + 1], k_TGE[:, g : g + 1], v_TGE[:, g : g + 1], pack_shape(shape), None)
        torch.testing.assert_close(whole_THE[:, h : h + 1], one_T1E, rtol=0, atol=1e-12)


def test_a_branch_is_blind_to_its_siblings_and_to_other_prompts():
    """Every token of branch 1 of prompt 1 is the same bits whatever stands outside its trunk and itself."""
    shape = [(4, [3, 2]), (5, [6, 4, 1]), (2, [7])]
    tokens = owners(shape)
    own = torch.tensor([p == 1 and j in (-1, 1) for p, j, _ in tokens])
    branch = torch.tensor([(p, j) == (1, 1) for p, j, _ in tokens])
    stream, qkv, others = pack_shape(shape), random_qkv(len(tokens), 0), random_qkv(len(tokens), 1)
    mixed = [torch.where(own[:, None, None], x, 1e3 * y) for x, y in zip(qkv, others, strict=True)]
    before_THE, after_THE = attention(*qkv, stream, None), attention(*mixed, stream, None)
    assert torch.equal(before_THE[branch], after_THE[branch])
    assert not torch.isclose(before_THE[~own], after_THE[~own]).any()


def test_a_branch_sees_all_of_its_trunk_and_of_its_own_past():
    shape = [(3, [2, 4])]
    branch = range(5, 9)
    q_THE, k_TGE, v_TGE = random_qkv(9)
    before_THE = attention(q_THE, k_TGE, v_TGE, pack_shape(shape), None)
    for seen in (0, 1, 2, *branch):
        v_other_TGE = v_TGE.clone()
        v_other_TGE[seen] += 1
        after_THE = attention(q_THE, k_TGE, v_other_TGE, pack_shape(shape), None)
        changed = ~torch.isclose(after_THE, before_THE).all(-1).all(-1)
        assert [i for i in branch if changed[i]] == [i for i in branch if i >= seen]


# --- the rows behind it ---


def real_area(rows: models.stream.AttentionRows, queries_N: Tensor) -> int:
    """Query-key pairs without padding; the first query of a row sees its whole trunk and itself."""
    trunk_N = 0 if rows.mask_NQK is None else rows.mask_NQK[:, 0].sum(-1) - 1
    return int((queries_N * (trunk_N + queries_N)).sum())


LONG = st.lists(st.tuples(st.integers(1, 700), st.lists(st.integers(0, 500), max_size=3)), min_size=1, max_size=6)
# Short branches of long and short trunks by turns: a batch that is narrow in queries may be wide in keys.
UNEVEN = st.lists(st.tuples(st.sampled_from([1, 3, 300]), st.lists(st.integers(3, 9), max_size=4)), min_size=1)


@settings(deadline=None, max_examples=100)
@given(shape=st.one_of(LONG, UNEVEN), small_area=st.sampled_from([0, 5000, SMALL_AREA]))
def test_every_token_has_one_slot_and_padding_stays_within_its_limit(shape, small_area):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.stream, "SMALL_AREA", small_area)
        stream = pack_shape(shape)
    queries = torch.cat([rows.query_NQ.flatten() for rows in stream.rows])
    assert torch.equal(queries[stream.slot_T], torch.arange(len(stream.input_ids_T)))
    offset = 0
    for rows in stream.rows:
        n, q = rows.query_NQ.shape
        inside = (stream.slot_T >= offset) & (stream.slot_T < offset + n * q)
        queries_N = torch.bincount((stream.slot_T[inside] - offset) // q, minlength=n)
        area = n * q * rows.key_NK.shape[1]
        assert area <= max(PADDING_LIMIT * real_area(rows, queries_N), small_area)
        offset += n * q


def test_short_streams_take_two_calls_and_rows_of_one_length_no_padding():
    """One causal call for the first branches, one masked call for all others, whatever the number of prompts."""
    assert len(pack_shape([(x, [5, x, 2 * x]) for x in range(1, 20)]).rows) == 2
    causal, branching = pack_shape([(6, [4, 4, 4])] * 3).rows
    assert (causal.query_NQ.shape, causal.mask_NQK) == ((3, 10), None)
    assert (branching.query_NQ.shape, branching.key_NK.shape) == ((6, 4), (6, 10))

"""FlexAttention over the stream equals the dense formula, in value and gradient; which streams it sees as what.

Shapes: T tokens, H query heads, G key-value heads, E head dim.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from models.attention import dense_attention
from models.flex import block_mask, flex, flex_attends, refuse_flex, sees
from tests.test_stream import SHAPES, Shape, pack_shape, random_qkv, visible

WINDOWS = [None, 1, 2, 3, 6, 50]


def seen(shape: Shape, window: int | None = None) -> torch.Tensor:
    """(T, T) of what the mask function says."""
    stream = pack_shape(shape)
    index_T = torch.arange(len(stream.positions_T))
    return sees(stream, window)(0, 0, index_T[:, None], index_T)


def test_the_mask_by_hand():
    """x1 x2 | a1 | b1 b2 and a second prompt y1: b sees x and its own past, y sees itself."""
    expected = """
        1.....
        11....
        111...
        11.1..
        11.11.
        .....1
    """
    rows = ["".join(".1"[int(x)] for x in row) for row in seen([(2, [1, 2]), (1, [])]).tolist()]
    assert rows == expected.split()


@settings(deadline=None, max_examples=200)
@given(shape=SHAPES, window=st.sampled_from(WINDOWS))
def test_a_token_sees_its_trunk_and_its_own_branch_as_far_as_the_window(shape, window):
    assert torch.equal(seen(shape, window), visible(shape, window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("shape", "window", "dtype"),
    [
        ([(7, [4, 1, 0, 9]), (1, [2, 0, 3]), (12, [])], None, torch.float64),
        ([(5, [6, 3, 8]), (2, [40, 7])], 4, torch.float64),
        ([(150, [9, 30]), (20, [100, 60])], 90, torch.float32),
    ],
)
def test_flex_attention_equals_the_dense_twin_in_value_and_gradient(monkeypatch, shape, window, dtype):
    """Six heads on three. On the CPU PyTorch refuses a backward pass, though the formula that it uses there has one."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    visible_TT = visible(shape, window)
    fast, slow = ([x.to(dtype).requires_grad_() for x in random_qkv(len(visible_TT))] for _ in range(2))
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    fast_THE = flex(*fast, block_mask(pack_shape(shape), window))
    slow_THE = dense_attention(*slow, visible_TT)
    close(fast_THE, slow_THE)
    weight_THE = random_qkv(len(visible_TT), seed=1)[0].to(dtype)
    (fast_THE * weight_THE).sum().backward()
    (slow_THE * weight_THE).sum().backward()
    for ours, expected in zip(fast, slow, strict=True):
        close(ours.grad, expected.grad)


def test_blocks_that_see_nothing_of_one_another_are_skipped():
    """Prompts of 128 tokens with branches of 128 and 256: blocks x a bb, of which b does not see a; twice."""
    mask = block_mask(pack_shape([(128, [128, 256])] * 2), None)
    one = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])
    assert torch.equal(mask.to_dense()[0, 0].int(), torch.block_diag(one, one).int())


def test_a_streams_mask_is_made_once_for_each_window_and_forgotten_with_it():
    stream = pack_shape([(3, [2, 2])])
    first, again = (flex_attends(stream, [None, 4, None]) for _ in range(2))
    masks = [attend.keywords["mask"] for attend in first]
    assert masks[0] is masks[2] is not masks[1]
    assert all(attend.keywords["mask"] is mask for attend, mask in zip(again, masks, strict=True))
    assert flex_attends(pack_shape([(3, [2, 2])]), [None])[0].keywords["mask"] is not masks[0]


@pytest.mark.parametrize(
    ("device", "head_dim", "message"),
    [
        ("cpu", 64, "attn_implementation=flex_attention with device=cpu: .*; pass attn_implementation=sdpa"),
        ("cuda", 8, "attn_implementation=flex_attention: heads of 8 numbers, and it needs at least 16; pass"),
    ],
)  # fmt: skip
def test_where_it_cannot_train_it_is_refused(device, head_dim, message):
    with pytest.raises(ValueError, match=message):
        refuse_flex(torch.device(device), head_dim)
    refuse_flex(torch.device("cuda"), 16)

"""Probabilities are those of transformers' own chain of processors; a draw inverts their cumulative sum.

Shapes: N samples, V vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models.sampling import DRAWN, GREEDY, Sampling, choose, probabilities

BELOW_ONE = 1 - 2**-24
"""The largest number that torch.rand draws."""
NONE = -math.inf

with torch.device("meta"):
    THEIRS = LlamaForCausalLM(LlamaConfig(num_hidden_layers=0))


def their_probabilities(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """By the processors that transformers itself lines up for these settings, in its order."""
    config = GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
        min_p=sampling.min_p,
    )  # fmt: skip
    return THEIRS._get_logits_processor(config)(None, logits_NV).softmax(-1)


def tokens(logits: list[float], draws: list[float], sampling: Sampling = DRAWN) -> list[int]:
    """The token of each draw, all from the same logits."""
    return choose(torch.tensor([logits] * len(draws)), sampling, torch.tensor(draws)).tolist()


# --- probabilities ---

# Halves, so that many are equal; and -inf, a token that cannot come.
halves = st.integers(-8, 8).map(lambda i: i / 2)
logits = st.lists(halves | st.floats(-20, 20, width=32) | st.just(NONE), min_size=1, max_size=12)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([1e-6, 0.5, 0.7, 1.0, 2.0, 1e6]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0]) | st.floats(0, 1, exclude_min=True),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(0, 1),
)


# The same examples every time: a sum that is top_p to rounding can end the nucleus one token apart.
@settings(deadline=None, max_examples=200, derandomize=True)
@given(logits.filter(lambda row: max(row) > NONE), samplings, st.sampled_from([torch.float32, torch.float64]))
def test_probabilities_are_those_of_transformers(row, sampling, dtype):
    """But for tokens as probable as the last that top-p keeps: transformers drops some by their place, we keep all."""
    logits_NV = torch.tensor([row, row[::-1]], dtype=dtype)
    ours_NV, theirs_NV = probabilities(logits_NV, sampling), their_probabilities(logits_NV, sampling)
    if torch.equal(ours_NV == 0, theirs_NV == 0):
        assert (ours_NV - theirs_NV).abs().max() <= 1e-6
        return
    # The nucleus may also end one token apart where a sum of probabilities is top_p to rounding.
    uncut_NV = probabilities(logits_NV, replace(sampling, top_p=1.0, min_p=0.0))
    reached_V = uncut_NV[0].double().sort(descending=True).values.cumsum(0)
    if ((reached_V - sampling.top_p).abs() >= 1e-6).all():
        for ours_V, theirs_V, uncut_V in zip(ours_NV, theirs_NV, uncut_NV, strict=True):
            assert ((theirs_V > 0) <= (ours_V > 0)).all()
            assert (uncut_V[(ours_V > 0) & (theirs_V == 0)] == uncut_V[theirs_V > 0].min()).all()


def test_bfloat16_logits_have_the_probabilities_of_their_values_in_float32():
    logits_NV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampling = Sampling(temperature=0.7, top_k=30, top_p=0.9, min_p=0.01)
    assert torch.equal(probabilities(logits_NV, sampling), probabilities(logits_NV.float(), sampling))


def test_cuts_are_made_one_after_the_other_by_hand():
    """p = 1/2, 1/4, 1/8, 1/16, 1/16, and of the first three alone 4/7, 2/7, 1/7. top_k 3 leaves the same; top_p 0.8
    drops the 1/7; of 2/3 and 1/3 min_p 0.6 drops the second."""
    logits_NV = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]]).log()
    cut = replace(DRAWN, top_k=1)
    assert probabilities(logits_NV, cut)[0].tolist() == [1, 0, 0, 0, 0]
    cut = replace(DRAWN, top_k=2)
    assert probabilities(logits_NV[:, :3], cut)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    cut = replace(DRAWN, top_k=3)
    assert probabilities(logits_NV, cut)[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0, 0])
    cut = replace(cut, top_p=0.8)
    assert probabilities(logits_NV, cut)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    cut = replace(cut, min_p=0.6)
    assert probabilities(logits_NV, cut)[0].tolist() == [1, 0, 0, 0, 0]


# --- draws ---


def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_it():
    """Four equal logits are 1/4 each, exactly; a draw at a boundary belongs to the next token that can come."""
    logits = [NONE, 0.0, NONE, 0.0, 0.0, 0.0, NONE]
    assert tokens(logits, [0, 0.25 - 2**-24, 0.25, 0.5 - 2**-24, 0.5, 0.75, BELOW_ONE]) == [1, 1, 3, 3, 4, 5, 5]


def test_evenly_spread_draws_come_as_often_as_their_probability():
    """Of M draws (i + 1/2) / M each token gets M p, to one draw at either end."""
    m, sampling = 20_000, Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02)
    logits_NV = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    p_V = probabilities(logits_NV, sampling)[0]
    draws = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    count_V = choose(logits_NV.expand(m, -1), sampling, draws).bincount(minlength=40)
    assert (count_V - m * p_V).abs().max() <= 1
    assert torch.equal(count_V == 0, p_V == 0)
    assert 5 < (p_V > 0).sum() < 30


def test_a_likely_token_does_not_hide_the_unlikely_ones_after_it():
    """A token of weight 1, then a thousand of weight 1e-9, each drawn by the middle of its place; float32 has 6e-8."""
    logits_V = torch.tensor([1.0] + [1e-9] * 1000, dtype=torch.float64).log()
    place = torch.arange(1, 1001)
    draws = (1 + (place - 0.5).double() * 1e-9) / (1 + 1e-6)
    assert choose(logits_V.expand(1000, -1), DRAWN, draws).tolist() == place.tolist()


def test_no_draw_lies_beyond_probabilities_whose_rounded_sum_is_below_it():
    logits_NV = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0))
    logits_NV[:, -1] = NONE
    total_N = probabilities(logits_NV, DRAWN).sum(-1, dtype=torch.float64)
    assert (total_N < BELOW_ONE).sum() > 10
    drawn = choose(logits_NV, DRAWN, torch.full((400,), BELOW_ONE))
    assert (drawn < 999).all()


def test_no_token_without_probability_is_drawn_from_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(50_000, generator=generator)
    logits_V[::2] = NONE
    logits_V[-100:] = NONE
    edges = (probabilities(logits_V[None], DRAWN)[0].cumsum(0, dtype=torch.float64)[:64]).tolist()
    draws = torch.tensor([0, BELOW_ONE, *edges, *torch.rand(64, generator=generator).tolist()], dtype=torch.float64)
    drawn = choose(logits_V.expand(len(draws), -1), DRAWN, draws)
    assert (logits_V[drawn] > NONE).all()


def test_temperature_0_takes_the_first_of_the_largest_logits_whatever_is_drawn():
    assert tokens([1.0, 3.0, NONE, 3.0], [0, 0.5, BELOW_ONE], GREEDY) == [1, 1, 1]


# --- refusals ---


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [NONE, NONE]])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_logits_that_are_no_distribution_are_refused(bad, sampling):
    with pytest.raises(ValueError, match="next-token logits whose largest is NaN or infinite"):
        choose(torch.tensor([[0.0, 1.0], bad]), sampling, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": math.nan}, {"temperature": 1e-9},
        {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan},
        {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name_and_value(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must"):
        replace(DRAWN, **change)


def test_settings_at_the_ends_of_their_ranges_are_accepted():
    Sampling(temperature=1e-6, top_k=1, top_p=1e-9, min_p=1.0)
    Sampling(temperature=0, top_k=0, top_p=1.0, min_p=0.0)


def test_no_logit_is_too_large_for_the_smallest_temperature():
    """1e35 / 1e-6 overflows float32; the difference to the largest logit does not."""
    assert tokens([1e35, 0.0], [0.5, BELOW_ONE], Sampling(1e-6, 0, 1.0, 0.0)) == [0, 0]

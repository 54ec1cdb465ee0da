"""Log-probabilities: the definition, every response token of a packed stream, and sums over responses.

Shapes: R response tokens, D width, V vocabulary, B branches.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.logprobs import (
    gather_log_sum_sq,
    gather_logps,
    sum_over_responses,
    token_logps,
)
from models.config import parse_model_config
from models.stream import pack
from models.transformer import Transformer

CONFIG = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
PROMPTS = [[3, 1, 4], [1, 5]]
RESPONSES = [[[9, 2, 6, 5], [3]], [[5, 8], [9, 7, 9]]]


def random_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (7, 3), head (11, 3), targets (7,)."""
    generator = torch.Generator().manual_seed(0)
    hidden_RD, head_VD = (torch.randn(rows, 3, generator=generator, dtype=dtype) for rows in (7, 11))
    return hidden_RD, head_VD, torch.randint(11, (7,), generator=generator)


def tiny_model(tied: bool) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(parse_model_config({**CONFIG, "tie_word_embeddings": tied}), torch.float64).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


# --- gather_logps ---


def test_gather_logps_is_minus_cross_entropy_of_every_token():
    hidden_RD, head_VD, target_R = random_inputs()
    expected_R = -F.cross_entropy(hidden_RD @ head_VD.T, target_R, reduction="none")
    torch.testing.assert_close(gather_logps(hidden_RD, head_VD, target_R), expected_R)


def test_gather_logps_by_hand():
    """h = 1, W = (0, log 3): the softmax is (1/4, 3/4)."""
    hidden_RD, head_VD = torch.ones(2, 1), torch.tensor([[1.0], [3.0]]).log()
    logps_R = gather_logps(hidden_RD, head_VD, torch.tensor([0, 1]))
    torch.testing.assert_close(logps_R.exp(), torch.tensor([0.25, 0.75]))


def test_log_sum_sq_by_hand():
    """p = (1/4, 3/4): 1/16 + 9/16; p = (1/2, 1/2): 1/2; p = (1, 0): 1."""
    hidden_RD, head_VD = torch.tensor([[1.0], [0.0], [1000.0]]), torch.tensor([[1.0], [3.0]]).log()
    torch.testing.assert_close(gather_log_sum_sq(hidden_RD, head_VD).exp(), torch.tensor([0.625, 0.5, 1.0]))


def test_logps_do_not_change_when_every_logit_of_a_token_grows_by_the_same():
    """A vector added to every row of the head adds h . u to all logits of a token."""
    hidden_RD, head_VD, target_R = random_inputs()
    moved_VD = head_VD + torch.tensor([5.0, -7.0, 2.0])
    torch.testing.assert_close(gather_logps(hidden_RD, moved_VD, target_R), gather_logps(hidden_RD, head_VD, target_R))


def test_the_probabilities_of_all_tokens_sum_to_one():
    hidden_RD, head_VD, _ = random_inputs()
    total_R = sum(gather_logps(hidden_RD, head_VD, torch.full((7,), v)).exp() for v in range(11))
    torch.testing.assert_close(total_R, torch.ones(7, dtype=torch.float64))


WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logps_are_float32_at_least_and_float64_stays(given):
    hidden_RD, head_VD, target_R = random_inputs(torch.float32)
    assert gather_logps(hidden_RD.to(given), head_VD, target_R).dtype == WIDE.get(given, given)


def test_logits_of_a_million_give_finite_logps():
    """exp(1e6) overflows; the difference of logits is what counts: 1e6 against 1e6 + 1."""
    logps_R = gather_logps(torch.ones(2, 1), torch.tensor([[1e6], [1e6 + 1]]), torch.tensor([0, 1]))
    torch.testing.assert_close(logps_R, -F.softplus(torch.tensor([1.0, -1.0])))


# --- token_logps ---


def logps_one_by_one(model: Transformer) -> list[Tensor]:
    """The definition: each response in a row of its own, log softmax at t - 1 of the token at t, for all its tokens."""
    expected = []
    for prompt, responses in zip(PROMPTS, RESPONSES, strict=True):
        for response in responses:
            logits_TV = model(pack([prompt + response], [[]])) @ model.head_weight_VD.T
            logps_TV = logits_TV.log_softmax(-1)
            expected.append(torch.stack([logps_TV[len(prompt) - 1 + t, token] for t, token in enumerate(response)]))
    return expected


@pytest.mark.parametrize("tied", [True, False])
def test_every_response_token_counts_the_first_and_the_last_too(tied):
    """The first is predicted by the last prompt token; the end-of-turn is a token like any other."""
    model, stream = tiny_model(tied), pack(PROMPTS, RESPONSES)
    expected = logps_one_by_one(model)
    logps_R = token_logps(model, stream)
    torch.testing.assert_close(logps_R, torch.cat(expected))
    torch.testing.assert_close(
        sum_over_responses(logps_R, stream.lengths_B), torch.stack([logps.sum() for logps in expected])
    )


@pytest.mark.parametrize("tied", [True, False])
def test_every_weights_gradient_is_that_of_the_definition(tied):
    model, stream = tiny_model(tied), pack(PROMPTS, RESPONSES)
    weights = list(model.parameters())
    scale_B = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    ours = torch.autograd.grad(
        (scale_B * sum_over_responses(token_logps(model, stream), stream.lengths_B)).sum(), weights
    )
    sums_B = torch.stack([logps.sum() for logps in logps_one_by_one(model)])
    for got, expected in zip(ours, torch.autograd.grad((scale_B * sums_B).sum(), weights), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_frozen_model_gives_no_gradient():
    model = tiny_model(tied=True).requires_grad_(False)
    assert not token_logps(model, pack(PROMPTS, RESPONSES)).requires_grad


# --- sums ---


def test_sum_over_responses_by_hand():
    """Lengths 2, 0, 3, 1, 0 of the tokens 1 .. 6: 1 + 2, nothing, 3 + 4 + 5, 6, nothing."""
    tokens_R = torch.arange(1.0, 7.0, dtype=torch.float64, requires_grad=True)
    sums_B = sum_over_responses(tokens_R, torch.tensor([2, 0, 3, 1, 0]))
    assert sums_B.tolist() == [3, 0, 12, 6, 0]
    (gradient_R,) = torch.autograd.grad((sums_B * torch.tensor([1.0, 10, 100, 1000, 10000])).sum(), tokens_R)
    assert gradient_R.tolist() == [1, 1, 100, 100, 100, 1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_nothing_are_zero(dtype):
    sums_B = sum_over_responses(torch.empty(0, dtype=dtype), torch.tensor([0, 0, 0]))
    assert sums_B.tolist() == [0, 0, 0] and sums_B.dtype == dtype

"""The KL of every position is torch.distributions' own, and its mean over the policy's texts is the KL of texts.

Shapes: R response tokens, V vocabulary.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import dpo.kl
from dpo.kl import kl_and_entropy
from dpo.logprobs import sum_over_responses, token_logps
from dpo.reference import LiveReference, base_reference, frozen_reference
from models.config import parse_model_config
from models.lora import inject_lora, lora_layers
from models.stream import Stream, pack
from models.transformer import Transformer

STREAM = pack([[3, 1, 4], [1, 5]], [[[2, 0, 5], [3]], [[5, 4], [1, 1, 2]]])


def model(seed: int, vocab_size: int = 6, dtype: torch.dtype = torch.float64) -> Transformer:
    config = {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
    }  # fmt: skip
    torch.manual_seed(seed)
    made = Transformer(parse_model_config(config), dtype).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made.requires_grad_(False)


def adapted(seed: int, dropout: float = 0.0, std: float = 0.5) -> Transformer:
    """With an adapter that has been trained, or where std is 0 a fresh one."""
    policy = model(seed)
    inject_lora(policy, rank=2, alpha=4, use_rslora=False, dropout=dropout, target="all", seed=0)
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B, std=std)
    return policy.double().requires_grad_(False)


def logits_RV(of: Transformer, stream: Stream) -> Tensor:
    return (of(stream) @ of.head_weight_VD.T)[stream.predictor_R]


def with_lora() -> tuple[Transformer, LiveReference, Transformer]:
    return (policy := adapted(0)), base_reference(policy), model(0)


def with_another_model() -> tuple[Transformer, LiveReference, Transformer]:
    return model(0), frozen_reference(model(1)), model(1)


PAIRS = pytest.mark.parametrize("pair", [with_lora, with_another_model])


@PAIRS
def test_every_position_is_the_kl_and_the_entropy_of_the_next_token(pair):
    policy, reference, other = pair()
    kl_R, entropy_R = kl_and_entropy(policy, reference, STREAM)
    p, q = Categorical(logits=logits_RV(policy, STREAM)), Categorical(logits=logits_RV(other, STREAM))
    torch.testing.assert_close(kl_R, kl_divergence(p, q), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(entropy_R, p.entropy(), rtol=1e-10, atol=1e-12)
    assert kl_R.shape == (9,) and kl_R.min() > 1e-3


def test_a_reference_whose_head_is_padded_further_is_compared_on_the_vocabulary_that_both_have():
    """Rows beyond the tokenizer's are never trained: next to no probability is on them. Both ways round."""
    reference, padded = model(1), model(1)
    width = padded.head_weight_VD.shape[1]
    hidden_RD = padded(STREAM)[STREAM.predictor_R]
    # A direction in which every hidden state has a large negative product, as far as one there is.
    away_D = -torch.linalg.lstsq(hidden_RD, torch.full((9, 1), 60.0, dtype=torch.float64)).solution[:, 0]
    padded.lm_head.weight = torch.nn.Parameter(torch.cat([padded.head_weight_VD, away_D.expand(3, width)]))
    for one, other in ((model(0), padded), (padded, model(0))):
        plain = tuple(reference if m is padded else m for m in (one, other))
        kl_R, expected_R = (kl_and_entropy(p, frozen_reference(q), STREAM)[0] for p, q in ((one, other), plain))
        torch.testing.assert_close(kl_R, expected_R, rtol=1e-9, atol=1e-9)


@PAIRS
def test_the_mean_over_the_policys_texts_is_the_kl_of_texts(pair):
    """Every text of at most 3 of 5 tokens, of which 0 is the end, weighed by its probability: 4 + 16 + ... of them."""
    policy, reference, _ = pair()
    texts = [[*ids, 0] for n in range(3) for ids in product(range(1, 6), repeat=n)]
    texts += [list(ids) for ids in product(range(1, 6), repeat=3)]
    stream = pack([[3, 1, 4]], [texts])
    logps, ref_logps = (
        sum_over_responses(logps_R, stream.lengths_B)
        for logps_R in (token_logps(policy, stream), reference(stream))
    )  # fmt: skip
    assert float(logps.exp().sum()) == pytest.approx(1, abs=1e-12)
    kl_R, _ = kl_and_entropy(policy, reference, stream)
    estimate = (logps.exp() * sum_over_responses(kl_R, stream.lengths_B)).sum()
    assert float(estimate) == pytest.approx(float((logps.exp() * (logps - ref_logps)).sum()), abs=1e-9)
    assert float(estimate) > 0.1


@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_chunks_do_not_show(monkeypatch, rows):
    policy, reference, _ = with_another_model()
    whole = kl_and_entropy(policy, reference, STREAM)
    monkeypatch.setattr(dpo.kl, "CHUNK_ELEMENTS", rows * 6 + 5)
    for part, expected in zip(kl_and_entropy(policy, reference, STREAM), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


def test_a_vocabulary_larger_than_a_chunk_goes_a_position_at_a_time(monkeypatch):
    monkeypatch.setattr(dpo.kl, "CHUNK_ELEMENTS", 1)
    assert len(kl_and_entropy(model(0), None, STREAM)[1]) == 9


def test_it_is_0_where_policy_equals_reference():
    policy = adapted(0, std=0.0)
    assert not kl_and_entropy(policy, base_reference(policy), STREAM)[0].any()


def test_without_a_reference_the_kl_is_nan_and_the_entropy_is_there():
    kl_R, entropy_R = kl_and_entropy(model(0), None, STREAM)
    assert kl_R.isnan().all() and entropy_R.min() > 0


def test_uniform_against_a_preferred_token_is_known_by_hand():
    """Logits 0 for all 4 tokens have entropy log 4; against 3, 0, 0, 0 the KL is log(3 + e^3) - log 4 - 3 / 4."""
    policy, other = model(0, vocab_size=4), model(0, vocab_size=4)
    for one, first in ((policy, 0.0), (other, 3.0)):
        one.head_weight_VD.zero_()
        hidden_D = one(pack([[3, 1]], [[[2]]]))[1]
        one.head_weight_VD[0] = first * hidden_D / hidden_D.square().sum()
    kl_R, entropy_R = kl_and_entropy(policy, frozen_reference(other), pack([[3, 1]], [[[2]]]))
    assert float(kl_R) == pytest.approx(math.log(3 + math.e**3) - math.log(4) - 0.75, abs=1e-12)
    assert float(entropy_R) == pytest.approx(math.log(4), abs=1e-12)


def test_it_has_no_gradient():
    policy = adapted(0).requires_grad_(True)
    for value_R in kl_and_entropy(policy, base_reference(policy), STREAM):
        assert not value_R.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_policys_mode_is_left_as_it_was(training):
    policy, without = adapted(0, dropout=0.5).train(training), adapted(0)
    values = kl_and_entropy(policy, base_reference(policy), STREAM)
    expected = kl_and_entropy(without, base_reference(without), STREAM)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    assert all(module.training == training for module in policy.modules())


def test_low_precision_is_summed_in_float32():
    policy, other = model(0, dtype=torch.bfloat16), model(1, dtype=torch.bfloat16)
    kl_R, entropy_R = kl_and_entropy(policy, frozen_reference(other), STREAM)
    assert kl_R.dtype == entropy_R.dtype == torch.float32
    p, q = (Categorical(logits=logits_RV(m, STREAM).double()) for m in (policy, other))
    torch.testing.assert_close(kl_R.double(), kl_divergence(p, q), rtol=1e-4, atol=1e-5)

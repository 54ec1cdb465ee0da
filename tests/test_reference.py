"""The reference: each source is what it says, stays put while the policy trains, drops nothing and has no gradient."""

import pytest
import torch

from dpo.logprobs import token_logps
from dpo.reference import base_reference, frozen_reference, snapshot_reference
from models.config import parse_model_config
from models.lora import inject_lora, lora_layers
from models.stream import Stream, pack
from models.transformer import Transformer

CONFIG = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
SOURCES = pytest.mark.parametrize("source", [base_reference, snapshot_reference, frozen_reference])


@pytest.fixture
def stream() -> Stream:
    return pack([[3, 1, 4], [1, 5]], [[[9, 2, 6, 5], [3]], [[5, 8], [9, 7, 9]]])


def base_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(parse_model_config(CONFIG), torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def policy_with_adapter(dropout: float = 0.0) -> Transformer:
    """The base model with an adapter that has been trained: its B is not 0."""
    policy = base_model()
    inject_lora(policy, rank=3, alpha=6.0, dropout=dropout, use_rslora=False, target="all", seed=0)
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    return policy


def train_one_step(policy: Transformer, stream: Stream) -> None:
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    (-token_logps(policy, stream).sum()).backward()
    optimizer.step()


def test_base_reference_is_the_model_without_its_adapter(stream):
    """Bit for bit the model before the adapter came; with it the log-probabilities are others."""
    expected = token_logps(base_model(), stream)
    policy = policy_with_adapter()
    assert torch.equal(base_reference(policy)(stream), expected)
    assert (token_logps(policy, stream) - expected).abs().max() > 0.1


def test_snapshot_reference_is_the_adapter_as_it_is_now(stream):
    policy = policy_with_adapter()
    assert torch.equal(snapshot_reference(policy)(stream), token_logps(policy, stream).detach())


def test_frozen_reference_is_the_model_it_is_given(stream):
    assert torch.equal(frozen_reference(base_model())(stream), token_logps(base_model(), stream))


@pytest.mark.parametrize("source", [base_reference, snapshot_reference])
def test_a_reference_stays_when_the_policy_trains(source, stream):
    policy = policy_with_adapter()
    reference = source(policy)
    before, policy_before = reference(stream), token_logps(policy, stream).detach()
    train_one_step(policy, stream)
    assert torch.equal(reference(stream), before)
    assert not torch.equal(token_logps(policy, stream), policy_before)


@SOURCES
def test_a_reference_drops_nothing_while_the_policy_trains_with_dropout(source, stream):
    policy = policy_with_adapter(dropout=0.5)
    policy.eval()
    reference = source(policy)
    expected = reference(stream)
    policy.train()
    assert torch.equal(reference(stream), expected) and torch.equal(reference(stream), expected)
    assert policy.training
    assert not torch.equal(token_logps(policy, stream), token_logps(policy, stream))  # the policy does drop


@SOURCES
@pytest.mark.parametrize("training", [True, False])
def test_a_reference_leaves_the_policy_as_it_found_it(source, stream, training):
    """Its mode, its adapter and its gradients, also when the reference fails."""
    policy = policy_with_adapter().train(training)
    before = token_logps(policy, stream).detach()
    reference = source(policy)
    reference(stream)
    with pytest.raises(IndexError):  # 23 tokens, so 99 has no embedding
        reference(pack([[99]], [[[1]]]))
    assert policy.training == training
    assert torch.equal(token_logps(policy, stream).detach(), before)
    assert all(p.grad is None for p in policy.parameters())


@SOURCES
def test_a_reference_has_no_gradient_and_the_policy_keeps_its_own(source, stream):
    policy = policy_with_adapter()
    reference_R = source(policy)(stream)
    assert not reference_R.requires_grad
    (token_logps(policy, stream) - reference_R).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in lora_layers(policy).values())

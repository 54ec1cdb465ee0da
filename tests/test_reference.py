"""The reference: each source is what it says, stays put while the policy trains, drops nothing and has no gradient.

One that moves does so at its steps alone, and to where the mix of the weights is.
"""

import copy

import pytest
import torch

from dpo.checkpoint import trainable
from dpo.logprobs import token_logps
from dpo.reference import MovingReference, base_reference, frozen_reference, snapshot_reference
from models.config import parse_model_config
from models.lora import inject_lora, lora_layers
from models.stream import Stream, pack
from models.transformer import Transformer

CONFIG = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip


def moving_reference(policy: Transformer) -> MovingReference:
    return MovingReference(policy, alpha=0.6, sync_steps=2)


SOURCES = pytest.mark.parametrize("source", [base_reference, snapshot_reference, frozen_reference, moving_reference])


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


@pytest.mark.parametrize("source", [base_reference, snapshot_reference, moving_reference])
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


# --- one that moves ---


def policy_of(kind: str) -> Transformer:
    """In float64."""
    policy = policy_with_adapter() if kind == "lora" else base_model().requires_grad_(True)
    policy.dtype = torch.float64
    return policy.double()


KINDS = pytest.mark.parametrize("kind", ["lora", "full"])


@KINDS
def test_a_moving_reference_is_the_model_whose_weights_were_mixed_by_hand(kind, stream):
    """Four updates, a move after the second and the fourth: ref 0.6 w2 + 0.4 w0, then 0.6 w4 + 0.4 ref."""
    policy, by_hand = policy_of(kind), policy_of(kind)
    reference = moving_reference(policy)
    for step in (1, 2, 3, 4):
        train_one_step(policy, stream)
        reference.follow(step)
        if step in (2, 4):
            for name, weight in trainable(by_hand).items():
                weight.data = 0.6 * trainable(policy)[name].detach() + 0.4 * weight.data
        torch.testing.assert_close(reference(stream), token_logps(by_hand, stream), rtol=1e-12, atol=1e-12)
        assert not any(tensor.requires_grad for tensor in reference.tensors.values())  # or each move would add a graph
    assert (reference(stream) - token_logps(policy_of(kind), stream)).abs().max() > 0.1
    assert (reference(stream) - token_logps(policy, stream)).abs().max() > 0.1


@KINDS
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_move_is_trls(kind, alpha, stream):
    from trl.trainer.callbacks import SyncRefModelCallback

    policy = policy_of(kind)
    reference, theirs = MovingReference(policy, alpha=alpha, sync_steps=1), copy.deepcopy(policy)
    for step in (1, 2, 3):
        train_one_step(policy, stream)
        reference.follow(step)
        SyncRefModelCallback._sync_target_model(policy, theirs, alpha)
        expected = {name: weight.detach() for name, weight in trainable(theirs).items()}
        torch.testing.assert_close(dict(reference.tensors), expected, rtol=1e-12, atol=1e-14)


@KINDS
def test_a_move_of_alpha_1_arrives_at_the_policy_bit_for_bit_and_one_from_there_goes_nowhere(kind, stream):
    policy = policy_of(kind)
    reference = MovingReference(policy, alpha=1.0, sync_steps=1)
    train_one_step(policy, stream)
    reference.follow(1)
    assert torch.equal(reference(stream), token_logps(policy, stream))
    reference.alpha = 0.3
    reference.follow(2)
    assert torch.equal(reference(stream), token_logps(policy, stream))


def test_the_mix_of_the_factors_is_the_mix_of_the_products_but_for_second_order(stream):
    """By alpha (1 - alpha) (B - B_ref)(A - A_ref), as the docstring has it."""
    policy = policy_of("lora")
    reference = moving_reference(policy)
    before = {name: tensor.clone() for name, tensor in reference.tensors.items()}
    train_one_step(policy, stream)
    reference.follow(2)
    for name, layer in lora_layers(policy).items():
        A_RI, B_OR = layer.lora_A, layer.lora_B
        start_RI, start_OR = before[f"{name}.lora_A"], before[f"{name}.lora_B"]
        mixed_OI = reference.tensors[f"{name}.lora_B"] @ reference.tensors[f"{name}.lora_A"]
        products_OI = 0.6 * B_OR @ A_RI + 0.4 * start_OR @ start_RI
        torch.testing.assert_close(products_OI - mixed_OI, 0.24 * (B_OR - start_OR) @ (A_RI - start_RI))


@KINDS
def test_a_moving_reference_computes_in_the_policys_dtype_and_keeps_moves_that_it_would_lose(kind, stream):
    """A move of 1e-6 of a weight: bfloat16 tells apart what differs by 4e-3."""
    policy = (policy_with_adapter() if kind == "lora" else base_model().requires_grad_(True)).eval()
    policy.dtype = torch.bfloat16
    reference = moving_reference(policy)
    assert torch.equal(reference(stream), token_logps(policy, stream))
    before = {name: weight.detach().double() for name, weight in trainable(policy).items()}
    for weight in trainable(policy).values():
        weight.data *= 1 + 1e-5
    reference.follow(2)
    for name, tensor in reference.tensors.items():
        torch.testing.assert_close(tensor.double(), before[name] * (1 + 6e-6), rtol=2e-7, atol=0)

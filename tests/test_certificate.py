"""The start certificate passes what is sound and names what is not."""

import math
from dataclasses import replace

import pytest
import torch

from dpo.certificate import certify
from dpo.data import read_examples
from dpo.losses import OFF, PREF_LOSSES
from dpo.objective import to_stream
from dpo.preference import PreferenceObjective, preference_loss
from dpo.reference import base_reference, frozen_reference
from dpo.tokens import encode
from dpo.unpaired import UnpairedObjective
from models.lora import inject_lora
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import WORLD, load_model

OPTIONS = OFF | {"beta": 0.3}


@pytest.fixture(scope="module")
def rows():
    examples, _ = read_examples(WORLD / "data" / "eval.jsonl", stage="dpo", on_bad_row="stop", max_samples=4)
    template = ChatTemplate("auto", Tokenizer(WORLD / "model"))
    return [encode(example, template, 256) for example in examples]


@pytest.fixture
def policy():
    model = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    inject_lora(model, rank=2, alpha=4, dropout=0.0, use_rslora=False, target="all", seed=0)
    return model


def trained(policy):
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def certified(policy, rows, name="sigmoid", reference=None, same_weights=True) -> str:
    options = OPTIONS | ({"label_smoothing": 0.1} if name == "exo_pair" else {})
    loss = preference_loss([name], None, options)
    needed = (reference or base_reference(policy)) if loss.needs_reference else None
    stream = to_stream(rows, policy.device)
    objective = (UnpairedObjective if loss.unpaired else PreferenceObjective)(loss, needed)
    return certify(policy, trained(policy), objective, stream, rows, same_weights=same_weights)


@pytest.mark.parametrize("name", PREF_LOSSES)
def test_every_loss_starts_at_its_closed_form_on_a_fresh_adapter(policy, rows, name):
    line = certified(policy, rows, name)
    assert line.startswith("start: loss ")
    if PREF_LOSSES[name].start is not None:
        assert "at most 0.0e+00 nats per token apart; closed form of the loss" in line
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_line_says_loss_gradient_and_distance(policy, rows):
    line = certified(policy, rows)
    assert line.startswith(f"start: loss {math.log(2):.4f}, gradient norm ")


def test_rows_with_margins_or_labels_of_their_own_have_no_closed_form(policy, rows):
    own = [replace(row, example=replace(row.example, margin=1.0)) for row in rows]
    assert "at most 0.0e+00" in certified(policy, own) and "closed form" not in certified(policy, own)


def test_rows_that_ask_for_nothing_do_not_stop_a_run(policy, rows):
    for nothing in ({"weight": 0.0}, {"soft_label": 0.5}):
        own = [replace(row, example=replace(row.example, **nothing)) for row in rows]
        assert "gradient norm 0," in certified(policy, own)


def test_a_reference_of_other_weights_under_the_same_name_is_refused(policy, rows):
    other = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    other.model.embed_tokens.weight.data.mul_(1.1)
    with pytest.raises(ValueError, match=r"same weights, but 0\.\d+ nats per token apart .*eval.jsonl:1"):
        certified(policy, rows, reference=frozen_reference(other))
    assert "closed form" not in certified(policy, rows, reference=frozen_reference(other), same_weights=False)


def test_an_adapter_that_moves_nothing_is_refused(policy, rows):
    """A zero at both ends of the product: the gradient of each is a multiple of the other."""
    for name, parameter in policy.named_parameters():
        if name.endswith("lora_A"):
            parameter.data.zero_()
    with pytest.raises(ValueError, match=r"the gradient .* is 0, so nothing would be learned"):
        certified(policy, rows)


def test_weights_that_are_not_finite_are_refused(policy, rows):
    policy.model.norm.weight.data[0] = math.inf
    with pytest.raises(ValueError, match="not finite; are the weights sound"):
        certified(policy, rows)


def test_a_wrong_closed_form_is_refused(policy, rows):
    object.__setattr__(PREF_LOSSES["hinge"], "start", lambda beta: 2.0)
    try:
        with pytest.raises(ValueError, match=r"the loss is 1 .* 2 was expected"):
            certified(policy, rows, "hinge")
    finally:
        object.__setattr__(PREF_LOSSES["hinge"], "start", lambda beta: 1.0)

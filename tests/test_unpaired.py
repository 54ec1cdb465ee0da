"""Losses of labelled rows: their laws, agreement with TRL, and the responses that KTO's KL is estimated from.

Shapes: S token positions; vectors are (B,), one entry per row.
"""

import json
import math
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_trainer import config, random_rows, rows
from torch import Tensor

from dpo.losses import OFF, PREF_LOSSES, QUANTITIES, apo_zero_unpaired_loss, kto_loss
from dpo.metrics import Means
from dpo.preference import preference_loss
from dpo.tokens import Encoded
from dpo.unpaired import Labelled, UnpairedObjective, with_mismatched
from train import train

UNPAIRED = pytest.mark.parametrize("name", [name for name, loss in PREF_LOSSES.items() if loss.unpaired])
OPTIONS = {"beta": 0.5, "chosen_weight": 1.2, "rejected_weight": 0.7}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value(name: str, given: dict[str, Tensor], **options: float) -> Tensor:
    loss = PREF_LOSSES[name]
    return loss.function(*(given[quantity] for quantity in loss.reads), **options)


def test_kto_by_hand():
    """z = (3 - 1) / 2 = 1; a = 2 desirable, b = -1 not: 1.2 (1 - s(0.5)) and 0.7 (1 - s(1))."""
    loss = kto_loss(vector(2, -1), vector(3, -1), vector(1, 0), **OPTIONS)
    assert loss.tolist() == pytest.approx([1.2 * (1 - sigmoid(0.5)), 0.7 * (1 - sigmoid(1.0))])


def test_a_negative_kl_estimate_counts_as_0():
    below, zero = (kto_loss(vector(2, -1), vector(z, z), vector(1, 0), **OPTIONS) for z in (-4.0, 0.0))
    torch.testing.assert_close(below, zero)


def test_apo_zero_unpaired_is_kto_without_its_kl():
    a, d = vector(2, -1, 0.3), vector(1, 0, 0)
    torch.testing.assert_close(apo_zero_unpaired_loss(a, d, **OPTIONS), kto_loss(a, 0 * a, d, **OPTIONS))


@UNPAIRED
def test_it_starts_at_half_its_weight_reads_named_quantities_and_stays_finite(name):
    loss = PREF_LOSSES[name]
    assert loss.reads and set(loss.reads) <= QUANTITIES.keys() and loss.needs_reference
    zero = {"logratios": vector(0, 0), "mismatched_logratios": vector(0, 0), "desirable": vector(1, 0)}
    assert value(name, zero, **OPTIONS).tolist() == pytest.approx([0.6, 0.35])
    assert loss.start(**OPTIONS) is None and loss.start(**OPTIONS | {"chosen_weight": 0.7}) == pytest.approx(0.35)
    for nats in (1e4, -1e4):
        ratio = vector(nats, -nats).requires_grad_()
        result = value(name, zero | {"logratios": ratio}, **OPTIONS)
        result.sum().backward()
        assert result.isfinite().all() and ratio.grad is not None and ratio.grad.isfinite().all()


@UNPAIRED
def test_it_raises_what_is_desirable_and_lowers_what_is_not_everywhere(name):
    for label, sign in ((1.0, -1), (0.0, 1)):
        ratio = torch.linspace(-20, 20, 101, dtype=torch.float64, requires_grad=True)
        given = {
            "logratios": ratio,
            "mismatched_logratios": ratio.detach() + 1,
            "desirable": 0 * ratio.detach() + label,
        }
        (slope,) = torch.autograd.grad(value(name, given, **OPTIONS).sum(), ratio)
        assert (slope * sign > 0).all()


@UNPAIRED
def test_its_gradient_is_autograds_own_and_none_reaches_the_kl(name):
    ratio, mismatched = vector(2, -1, 0.3).requires_grad_(), vector(3, 1, 2).requires_grad_()
    given = {"mismatched_logratios": mismatched, "desirable": vector(1, 0, 1)}
    assert torch.autograd.gradcheck(lambda a: value(name, given | {"logratios": a}, **OPTIONS), [ratio])
    value(name, given | {"logratios": ratio}, **OPTIONS).sum().backward()
    assert mismatched.grad is None


# --- TRL ---


def trl(policy_BS: Tensor, reference_BS: Tensor, kl: Tensor, labels: list[bool], loss_type: str) -> tuple[Tensor, dict]:
    """TRL 1.16's KTOTrainer._compute_loss itself, on a stand-in for the trainer and the two models' outputs.

    Every response has S tokens; kl holds policy's and reference's log-probabilities of the mismatched responses, a row
    each, as one token.
    """
    from trl import KTOTrainer

    count, width = policy_BS.shape
    mask = torch.ones(count, width + 1, dtype=torch.long)
    mask[:, 0] = 0
    kl_mask = torch.tensor([[0, 1]]).expand(count, 2)

    def model_of(logps_BS: Tensor, mismatched: Tensor):
        def model(input_ids: Tensor, **_: object) -> SimpleNamespace:
            own = input_ids.shape[1] == width + 1
            logps = logps_BS if own else mismatched[:, None]
            zeros = torch.zeros_like(logps)
            return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

        return model

    trainer = SimpleNamespace(
        model=torch.nn.Module(), ref_model=model_of(reference_BS, kl[1]), beta=0.5, loss_type=loss_type,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x), _tp_size=1,
        aux_loss_enabled=False, precompute_ref_logps=False, calculate_KL=loss_type == "kto",
        desirable_weight=1.2, undesirable_weight=0.7, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    trainer.model.is_gradient_checkpointing = False
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "KL_input_ids": torch.zeros(count, 2, dtype=torch.long), "KL_attention_mask": torch.ones(count, 2),
        "KL_completion_mask": kl_mask, "label": torch.tensor(labels),
    }  # fmt: skip
    loss = KTOTrainer._compute_loss(trainer, model_of(policy_BS, kl[0]), inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@UNPAIRED
@pytest.mark.parametrize("labels", [[True, False, False, True], [True] * 4, [False] * 4])
@pytest.mark.parametrize("shift", [1.0, -3.0])  # a KL estimate above 0, and one below
def test_loss_gradient_and_metrics_agree_with_trl(name, labels, shift):
    generator = torch.Generator().manual_seed(0)
    policy_BS, reference_BS = (-3 * torch.rand(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    kl = torch.stack([vector(-4, -7, -2, -5) + shift, vector(-5, -6, -2.5, -5.5)])
    theirs_in, ours_in = (policy_BS.clone().requires_grad_() for _ in range(2))
    theirs, metrics = trl(theirs_in, reference_BS, kl, labels, name)
    loss = preference_loss([name], None, OFF | OPTIONS)
    objective = UnpairedObjective(loss, reference=None)
    measured = Labelled(
        logps=ours_in.sum(1), logratios=(ours_in - reference_BS).sum(1), mismatched_logratios=kl[0] - kl[1],
        lengths=torch.full((4,), 5), desirable=vector(*map(float, labels)), weight=torch.ones(4, dtype=torch.float64),
    )  # fmt: skip
    losses = objective.losses(measured)
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-9)
    gradients = [torch.autograd.grad(x, leaf)[0] for x, leaf in ((losses.mean(), ours_in), (theirs, theirs_in))]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    means = Means()
    means.add(objective.metrics(measured, losses))
    ours = means.means()
    # TRL logs a kl of 0 for the loss that has none.
    assert ours.keys() >= {metric for metric in metrics if metric.startswith(("rewards/", "logps/"))}
    for metric in ours.keys() - {"loss"}:
        assert ours[metric] == pytest.approx(metrics[metric], rel=1e-9), metric


# --- rows ---


def labelled(*prompts_and_responses: tuple[list[int], list[int]]) -> list[Encoded]:
    template = random_rows(1)[0]
    return [replace(template, prompt_ids=p, response_ids=(r,)) for p, r in prompts_and_responses]


def test_a_mismatched_response_is_that_of_the_row_before_with_another_prompt_cut_to_what_is_left():
    given = labelled(([1], [5]), ([2, 2], [6, 6, 6]), ([2, 2], [7]), ([3, 3], [8]))
    assert [row.response_ids[1] for row in with_mismatched(given, 4)] == [[8], [5], [5], [7]]
    assert [row.response_ids[0] for row in with_mismatched(given, 4)] == [[5], [6, 6, 6], [7], [8]]
    assert with_mismatched(labelled(([1], [5, 5, 5, 5]), ([2, 2], [6])), 4)[1].response_ids[1] == [5, 5]


def test_mismatched_responses_are_those_of_the_definition_for_any_order_of_prompts():
    """The definition looks back row by row, which takes a minute for 60,000 rows of few prompts."""
    draw = random.Random(0)
    for count in range(2, 9):
        given = labelled(*[([draw.randrange(2)], [i]) for i in range(count)], ([7], [count]))
        expected = [
            next(given[i - k] for k in range(1, len(given)) if given[i - k].prompt_ids != row.prompt_ids)
            for i, row in enumerate(given)
        ]
        assert [row.response_ids[1] for row in with_mismatched(given, 9)] == [e.response_ids[0] for e in expected]


def test_rows_of_one_prompt_have_no_mismatched_response():
    with pytest.raises(ValueError, match=r"rows:1: kto estimates a KL .* all 2 rows have the same prompt; add rows"):
        with_mismatched(labelled(([1], [5]), ([1], [6])), 4)


@pytest.mark.parametrize("key", ["margin", "soft_label"])
def test_a_number_that_is_of_pairs_is_refused(key):
    objective = UnpairedObjective(preference_loss(["kto"], None, OFF | OPTIONS), reference=None)
    objective.check(random_rows(2, weight=0.5))
    with pytest.raises(ValueError, match=rf"rows:1: {key}=0.5: is of pairs, and pref_loss reads labelled rows"):
        objective.check(random_rows(2, **{key: 0.5}))


# --- runs ---


@pytest.mark.slow
def test_a_run_on_labelled_rows_learns_saves_and_holds_out(tmp_path):
    """On the built-in pairs as two rows each; the held-out file reads as what it was."""
    cfg = config(
        tmp_path / "run", "pref_loss=kto", "val_size=8", "max_steps=20", "max_samples=100", "learning_rate=1e-3"
    )
    metrics = train(cfg)
    logged = rows(tmp_path / "run")
    assert logged[0]["loss"] == pytest.approx(0.5) and logged[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["eval_rewards/margins"] > 0.05 and "eval_kl" in metrics
    held_out = [json.loads(line) for line in Path(tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert {row["label"] for row in held_out} == {True, False} and held_out[0]["conversations"][-1][
        "from"
    ] == "assistant"


@pytest.mark.slow
def test_the_reference_cache_serves_mismatched_responses_too(tmp_path, capsys):
    for run in ("a", "b"):
        train(config(tmp_path / run, "pref_loss=kto", "eval_strategy=no", f"ref_cache_dir={tmp_path / 'cache'}"))
    assert "48 of 48 rows found, 0 computed" in capsys.readouterr().out
    for one, other in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)

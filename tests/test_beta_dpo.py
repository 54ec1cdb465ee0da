"""beta-DPO's beta of a batch: by hand over three batches, which losses read it, and what moves the running margin."""

from dataclasses import replace

import pytest
import torch
from test_preference import OPTIONS, built, rows_of, some_pairs

from dpo.beta_dpo import DynamicBeta
from dpo.preference import Pairs, PreferenceObjective


def margins(*h: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios whose differences are h."""
    return torch.tensor(h) + 1, torch.ones(len(h))


def test_three_batches_by_hand():
    """beta 1/2, alpha 0.6: M is 2, -1, -5, so beta is 0.5 (1 + 0.6 * 2), 0.5 (1 - 0.6 * 1.2), and the least.

    M_0 is 0, 0.1 * 2 = 0.2, 0.2 - 0.1 * 1.2 = 0.08, 0.08 - 0.1 * 5.08.
    """
    dynamic = DynamicBeta(beta=0.5, alpha=0.6)
    seen = []
    for batch in (margins(2.0, 6.0), margins(-2.0), margins(-10.0, -11.0, -9.0)):
        seen += [dynamic.running_margin.item(), dynamic(*batch).item()]
        dynamic.updated()
    assert [*seen, dynamic.running_margin.item()] == pytest.approx([0, 1.1, 0.2, 0.14, 0.08, 1e-3, -0.428])


def test_it_carries_no_gradient():
    """The gradient of the loss is that of the plain one at beta_batch."""
    pairs = some_pairs(chosen_logratios=[2.0, -3.0, 0.5])
    beta = 0.5 * (1 + 0.6 * 0.5 * (3 - 1 + 2) / 3)
    slopes = []
    for loss in (built("sigmoid", beta_dpo_alpha=0.6), built("sigmoid", options={"beta": beta})):
        chosen = pairs.chosen_logratios.clone().requires_grad_()
        losses = PreferenceObjective(loss, None).losses(replace(pairs, chosen_logratios=chosen))
        slopes.append((losses.detach(), *torch.autograd.grad(losses.mean(), chosen)))
    torch.testing.assert_close(slopes[0], slopes[1])


def test_only_losses_on_the_summed_margin_read_it_and_their_terms_with_them():
    """R-DPO's and ODPO's shifts of the reward stay what they are: they are divided by the same beta."""
    pairs, beta = some_pairs(margin=[1.0, 0.0, -2.0]), torch.tensor(0.7, dtype=torch.float64)
    on_margin, others = {"len_reg_alpha": 0.1, "dpop_lambda": 2.0}, ("ipo", "nca_pair", "sft")
    both = built("sigmoid", "hinge", *others, **on_margin)(pairs, beta)
    moved = built("sigmoid", "hinge", options={"beta": 0.7}, **on_margin)(pairs)
    torch.testing.assert_close(both, moved + built(*others)(pairs))


def objective() -> PreferenceObjective:
    return PreferenceObjective(built("sigmoid", beta_dpo_alpha=0.6), None)


def trained(objective: PreferenceObjective, pairs: Pairs) -> list[float]:
    losses = objective.losses(pairs)
    objective.metrics(pairs, losses)
    objective.updated(1)
    return losses.tolist()


def test_an_evaluation_reads_the_running_margin_and_does_not_move_it():
    """Two updates with an evaluation of other pairs before, between and after are the two updates alone."""
    batches, held_out = [some_pairs(), some_pairs(chosen_logratios=[5.0, 1.0, 0.0])], some_pairs(margin=[9.0] * 3)
    plain, evaluated = objective(), objective()
    evaluated.losses(held_out)
    results = []
    for batch in batches:
        results.append((trained(plain, batch), trained(evaluated, batch)))
        before = evaluated.losses(held_out)
        assert torch.equal(evaluated.losses(held_out), before)
        assert evaluated.state["running_margin"] == plain.state["running_margin"] != 0
    assert all(a == b for a, b in results)


def test_the_batchs_beta_is_a_metric_and_rewards_keep_the_configured_one():
    """M is 0.5 * 4/3; reward margins are 0.5 times 3, -1 and 2."""
    pairs, one = some_pairs(), objective()
    metrics = one.metrics(pairs, one.losses(pairs))
    assert metrics["beta"].tolist() == pytest.approx([0.5 * (1 + 0.6 * 2 / 3)] * 3)
    assert metrics["rewards/margins"].tolist() == [1.5, -0.5, 1.0] and OPTIONS["beta"] == 0.5
    plain = PreferenceObjective(built("sigmoid"), None)
    assert "beta" not in plain.metrics(pairs, plain.losses(pairs)) and plain.state == {}


def test_a_run_starts_at_the_plain_loss_and_rows_weights_are_honoured():
    """Where policy equals reference every margin is 0; a pair's loss at the batch's beta is its own to weigh."""
    same = some_pairs(chosen_logratios=[0.0] * 3, rejected_logratios=[0.0] * 3)
    assert objective().losses(same).tolist() == pytest.approx([objective().loss.start()] * 3)
    objective().check(rows_of(([3], [4]), weight=0.5))

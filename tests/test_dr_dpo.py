"""Dr.DPO's mean over a batch: by hand, its two limits, and what each pair counts."""

import math

import pytest
import torch
from test_preference import built, some_pairs

from dpo.dr_dpo import dr_dpo_loss

LOSSES = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def test_by_hand():
    """Losses log 2 and log 4: -log((1/2 + 1/4) / 2) = log(8/3), and at beta' = 1/2 -log((1/4 + 1/16) / 2) / 2."""
    losses = torch.tensor([2.0, 4.0], dtype=torch.float64).log()
    assert dr_dpo_loss(losses, dr_dpo_beta=1.0).item() == pytest.approx(math.log(8 / 3))
    assert dr_dpo_loss(losses, dr_dpo_beta=0.5).item() == pytest.approx(-math.log(5 / 32) / 2)


def test_the_limits_are_the_mean_and_the_least():
    """At 1e6 it is below the mean by the variance over 2e6. At 1e-4 every exp(-l / beta') is 0, and the loss finite."""
    assert dr_dpo_loss(LOSSES, dr_dpo_beta=1e6).item() == pytest.approx(LOSSES.mean().item(), abs=1e-6)
    assert dr_dpo_loss(LOSSES, dr_dpo_beta=1e-4).item() == pytest.approx(0.2 + 1e-4 * math.log(3))


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_a_pair_counts_the_softmax_of_its_negative_loss(beta):
    losses = LOSSES.clone().requires_grad_()
    (weights,) = torch.autograd.grad(dr_dpo_loss(losses, dr_dpo_beta=beta), losses)
    torch.testing.assert_close(weights, (-LOSSES / beta).softmax(0))


def test_equal_losses_are_their_own_mean():
    """So that a run starts at the plain loss's closed form."""
    assert dr_dpo_loss(torch.full((5,), 0.7), dr_dpo_beta=0.4).item() == pytest.approx(0.7)
    assert built("sigmoid", dr_dpo_beta=1.0).start() == built("sigmoid").start()


@pytest.mark.parametrize("names", [["sigmoid"], ["sigmoid", "nca_pair", "sft"], ["simpo"]])
def test_it_is_taken_over_the_whole_loss_of_each_pair(names):
    """Every entry is the batch's loss, so that their mean is; pref_ftx and every loss of a combination included."""
    pairs = some_pairs()
    result = built(*names, pref_ftx=0.5, dr_dpo_beta=0.8)(pairs)
    expected = dr_dpo_loss(built(*names, pref_ftx=0.5)(pairs), dr_dpo_beta=0.8)
    assert result.tolist() == [expected.item()] * 3
    assert built(*names, dr_dpo_beta=0.8).couples and not built(*names).couples

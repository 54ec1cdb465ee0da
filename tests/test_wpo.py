"""WPO's weight of a pair: by hand, its value where every token is as likely, and on a model's own probabilities.

Shapes: R response tokens, B branches, D width, V vocabulary.
"""

import math

import pytest
import torch
from test_preference import built
from test_trainer import random_rows, small_model

from dpo.objective import to_stream
from dpo.preference import PreferenceObjective
from dpo.reference import frozen_reference
from dpo.wpo import wpo_weights


def test_by_hand():
    """p = (1/4, 3/4), so sum p^2 = 5/8. Tokens at 3/4, 1/4 and at 3/4: sqrt(6/5 * 2/5) * 6/5; a weight can exceed 1."""
    log_sum_sq_R = torch.full((5,), 5 / 8).log()
    logps_R = torch.tensor([0.75, 0.25, 0.75, 0.75, 0.75]).log().requires_grad_()
    weights = wpo_weights(logps_R, log_sum_sq_R, torch.tensor([2, 1, 1, 1]))
    assert weights.tolist() == pytest.approx([math.sqrt(1.2 * 0.4) * 1.2, 1.44])
    assert not weights.requires_grad


def test_a_policy_that_draws_uniformly_weighs_every_pair_1_and_no_tokens_weigh_1():
    same_R = torch.full((4,), -math.log(7))
    assert wpo_weights(same_R, same_R, torch.tensor([3, 1])).tolist() == [1]
    assert wpo_weights(same_R, same_R - 1, torch.tensor([4, 0])).tolist() == pytest.approx([math.e])


@pytest.mark.parametrize("ld_alpha", [1.0, 0.3])
def test_pairs_are_measured_with_the_policys_own_weight_times_the_rows(ld_alpha):
    """Against softmax over the model's whole logits, response by response."""
    policy, rows = small_model(0), random_rows(4, weight=0.3)
    loss = built("sigmoid", use_weighting=True, ld_alpha=ld_alpha)
    objective = PreferenceObjective(loss, frozen_reference(small_model(1)))
    pairs = objective.measure(policy, to_stream(rows, torch.device("cpu")), rows, rows)
    for i, row in enumerate(rows):
        expected = row.example.weight
        stream = to_stream([row], torch.device("cpu"))
        for branch, response in enumerate(row.response_ids):
            here_R = torch.repeat_interleave(stream.lengths_B) == branch
            p_RV = (policy(stream)[stream.predictor_R[here_R]] @ policy.head_weight_VD.T).softmax(-1)
            aligned_R = p_RV[torch.arange(len(response)), torch.tensor(response)] / p_RV.square().sum(-1)
            expected *= aligned_R.prod().item() ** (1 / len(response))
        assert pairs.weight[i].item() == pytest.approx(expected, rel=1e-9)
    assert not pairs.weight.requires_grad and pairs.chosen_logps.requires_grad

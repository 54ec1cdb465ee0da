"""What a run reports: TRL's names, strict accuracy, and means over every pair, never means of means.

Values are held equal to TRL's in tests/test_losses.py.
"""

import json

import pytest
import torch

from dpo.metrics import Means, one_line, preference_metrics
from dpo.step_log import to_json

NAMES = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"
}  # fmt: skip


def three_pairs() -> dict[str, torch.Tensor]:
    """beta 0.5; log-ratios (2, 0, -4) against (1, 0, -2): one pair won, one tied, one lost."""
    return preference_metrics(
        torch.tensor([-10.0, -20, -30]), torch.tensor([-11.0, -21, -31]), torch.tensor([2.0, 0, -4]),
        torch.tensor([1.0, 0, -2]), beta=0.5,
    )  # fmt: skip


def test_metrics_by_hand_under_trls_names():
    """Rewards are beta times log-ratios: (1, 0, -2) and (0.5, 0, -1); their differences are the margins."""
    metrics = three_pairs()
    assert set(metrics) == NAMES
    assert metrics["rewards/chosen"].tolist() == [1, 0, -2]
    assert metrics["rewards/rejected"].tolist() == [0.5, 0, -1]
    assert metrics["rewards/margins"].tolist() == [0.5, 0, -1]
    assert metrics["logps/chosen"].tolist() == [-10, -20, -30]
    assert metrics["logps/rejected"].tolist() == [-11, -21, -31]


def test_a_tie_is_not_accurate():
    """At step 0 policy equals reference and every pair ties: an accuracy of 0, as TRL reports it."""
    assert three_pairs()["rewards/accuracies"].tolist() == [1, 0, 0]


def test_metrics_carry_no_gradient():
    inputs = [torch.ones(3, requires_grad=True) for _ in range(4)]
    assert not any(vector.requires_grad for vector in preference_metrics(*inputs, beta=0.1).values())


def test_means_over_unequal_micro_batches_are_means_over_all():
    """1 | 2 3 4 5 6: the mean is 21/6 = 3.5; a mean of the two means would be (1 + 4)/2 = 2.5."""
    means = Means()
    means.add({"loss": torch.tensor([1.0]), "other": torch.tensor([7.0])})
    means.add({"loss": torch.tensor([2.0, 3, 4, 5, 6])})
    assert means.means() == {"loss": 3.5, "other": 7}
    assert means.means("eval_") == {"eval_loss": 3.5, "eval_other": 7}


@pytest.mark.parametrize("cut", [(7,), (1, 6), (3, 1, 2, 1), (1,) * 7])
def test_the_cut_into_micro_batches_does_not_show(cut):
    """float64 adds float32 numbers of one size without loss here, so equality is exact."""
    values = torch.rand(7, generator=torch.Generator().manual_seed(0))
    means = Means()
    for part in values.split(cut):
        means.add({"loss": part})
    assert means.means()["loss"] == values.double().sum().item() / 7


def test_a_million_small_numbers_are_summed_in_float64():
    """float32 has 24 bits: 2^24 + 1 = 2^24 in it, so a sum in float32 would lose every later one."""
    means = Means()
    means.add({"tokens": torch.tensor([2.0**24])})
    means.add({"tokens": torch.ones(3)})
    assert means.means()["tokens"] == (2**24 + 3) / 4


def test_state_round_trip_through_json_is_exact():
    """A resumed window goes on to the very number that an uninterrupted one reaches."""
    first, second = torch.rand(7), torch.rand(3)
    whole, before = Means(), Means()
    whole.add({"loss": first})
    before.add({"loss": first})
    after = Means(json.loads(json.dumps(before.state())))
    assert after.means() == before.means() and after.state() == before.state()
    for means in (whole, after):
        means.add({"loss": second, "new": second})
    assert after.means() == whole.means()


def test_a_restored_window_does_not_share_its_state():
    state = {"loss": [3.0, 2]}
    Means(state).add({"loss": torch.ones(1)})
    assert state == {"loss": [3.0, 2]}


def test_a_metrics_line_is_json_even_where_a_number_is_not_finite():
    """fp16's first steps overflow by design and have no finite gradient norm; JSON has no Infinity."""
    line = to_json({"step": 1, "loss": 0.5, "grad_norm": float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse)["loss"] == 0.5


def test_one_line_is_short_and_leaves_out_the_position():
    assert one_line({"step": 7, "epoch": 0.5, "loss": 0.693147, "tokens_per_second": 1e5}) == "loss 0.6931"

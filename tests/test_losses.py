"""The laws of every preference loss, its values by hand, and its agreement with TRL."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dpo.losses import PREF_LOSSES, hinge_loss, ipo_loss, sigmoid_loss
from dpo.metrics import preference_metrics

LOSSES = pytest.mark.parametrize("name", PREF_LOSSES)
BETAS = pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 2.0])


def pairs(count: int = 7) -> tuple[Tensor, Tensor]:
    """Log-ratios (count,) of chosen and rejected, float64, of a few nats."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (3 * torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    return chosen, rejected


def at(name: str, h: float | list[float], beta: float) -> Tensor:
    """The loss at log-ratio differences h, the rejected log-ratio being 0."""
    chosen = torch.tensor(h, dtype=torch.float64)
    return PREF_LOSSES[name].function(chosen, torch.zeros_like(chosen), beta=beta)


def slope_at(name: str, h: float, beta: float) -> float:
    chosen = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    PREF_LOSSES[name].function(chosen, torch.zeros((), dtype=torch.float64), beta=beta).backward()
    assert chosen.grad is not None
    return chosen.grad.item()


# --- values by hand ---


def test_sigmoid_loss_is_log_2_when_policy_equals_reference():
    assert at("sigmoid", 0.0, beta=0.1).item() == pytest.approx(math.log(2), abs=1e-15)


def test_sigmoid_loss_by_hand():
    """h = 2 - (-1) = 3, beta 0.5: -log sigmoid(1.5) = log(1 + exp(-1.5)) = 0.2014."""
    chosen, rejected = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    assert sigmoid_loss(chosen, rejected, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-15)


def test_hinge_loss_is_1_when_policy_equals_reference_and_0_from_a_margin_of_1():
    """beta 0.5: at h = -2, 0, 1, 2, 3 the loss is 2, 1, 1/2, 0, 0, with slope -1/2 before h = 2 and none beyond."""
    assert hinge_loss(torch.tensor([-2.0, 0, 1, 2, 3]), torch.zeros(5), beta=0.5).tolist() == [2, 1, 0.5, 0, 0]
    assert [slope_at("hinge", h, beta=0.5) for h in (-2.0, 0.0, 1.9, 2.1, 3.0)] == [-0.5, -0.5, -0.5, 0, 0]


@BETAS
def test_ipo_loss_is_0_at_half_the_inverse_of_beta_and_its_square_when_policy_equals_reference(beta):
    """(0 - 1/(2 beta))^2 = 1/(4 beta^2), and the same again at h = 1/beta, beyond the minimum."""
    at_zero, at_best, beyond = at("ipo", [0.0, 1 / (2 * beta), 1 / beta], beta).tolist()
    assert at_best == pytest.approx(0, abs=1e-25)
    assert at_zero == pytest.approx(1 / (4 * beta**2)) == beyond


def test_ipo_loss_by_hand():
    """h = 2 - (-1) = 3, beta 0.5: (3 - 1)^2 = 4."""
    assert ipo_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.5).tolist() == [4]


def test_ipo_reads_means_and_the_others_sums():
    assert {name: loss.reads for name, loss in PREF_LOSSES.items()} == {
        "sigmoid": "sum", "hinge": "sum", "ipo": "mean"
    }  # fmt: skip


# --- laws of all ---


@LOSSES
def test_a_loss_is_per_pair(name):
    """(B,) in, (B,) out; a pair's loss is its own, whatever stands beside it; the dtype stays."""
    chosen, rejected = pairs(7)
    losses = PREF_LOSSES[name].function(chosen, rejected, beta=0.3)
    assert losses.shape == (7,) and losses.dtype == torch.float64
    for i in (0, 3, 6):
        alone = PREF_LOSSES[name].function(chosen[i : i + 1], rejected[i : i + 1], beta=0.3)
        assert torch.equal(losses[i : i + 1], alone)
    assert PREF_LOSSES[name].function(chosen.float(), rejected.float(), beta=0.3).dtype == torch.float32


@LOSSES
def test_a_loss_reads_only_the_difference_of_the_two_logratios(name):
    chosen, rejected = pairs()
    moved = PREF_LOSSES[name].function(chosen + 5, rejected + 5, beta=0.3)
    torch.testing.assert_close(moved, PREF_LOSSES[name].function(chosen, rejected, beta=0.3))


@LOSSES
@BETAS
def test_a_loss_falls_with_the_margin_up_to_its_minimum_and_is_never_negative(name, beta):
    """sigmoid and hinge never grow; IPO's minimum, and a hinge's corner, lie at beta h = 1/2 and 1."""
    margins = torch.linspace(-9, 9, 181, dtype=torch.float64) / beta
    losses = at(name, margins.tolist(), beta)
    assert (losses >= 0).all()
    before = margins <= 1 / (2 * beta)
    assert (losses[before].diff() < 0).all()
    if name != "ipo":
        assert (losses.diff() <= 0).all()


@BETAS
def test_swapping_the_sides_swaps_the_probability_of_the_label(beta):
    """sigmoid(-x) = 1 - sigmoid(x), so exp(-loss) of a pair and of the swapped pair sum to 1; IPO and hinge do not."""
    chosen, rejected = pairs()
    total = (-sigmoid_loss(chosen, rejected, beta=beta)).exp() + (-sigmoid_loss(rejected, chosen, beta=beta)).exp()
    torch.testing.assert_close(total, torch.ones(7, dtype=torch.float64))
    difference = sigmoid_loss(rejected, chosen, beta=beta) - sigmoid_loss(chosen, rejected, beta=beta)
    torch.testing.assert_close(difference, beta * (chosen - rejected))


SLOPES = {
    "sigmoid": lambda h, beta: -beta / (1 + math.exp(beta * h)),
    "hinge": lambda h, beta: -beta if beta * h < 1 else 0.0,
    "ipo": lambda h, beta: 2 * (h - 1 / (2 * beta)),
}


@LOSSES
@BETAS
def test_gradients_are_those_derived_by_hand(name, beta):
    """d loss / d chosen: -beta sigmoid(-beta h); -beta while beta h < 1; 2 (h - 1/(2 beta)). Of rejected: -1 times."""
    chosen, rejected = (x.requires_grad_() for x in pairs())
    PREF_LOSSES[name].function(chosen, rejected, beta=beta).sum().backward()
    expected = [SLOPES[name](c - r, beta) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(rejected.grad, -chosen.grad)


@LOSSES
def test_beta_reaches_the_function(name):
    """Same pair, three betas, three losses; and beta has no default that a caller could fall back on."""
    assert len({at(name, 1.0, beta).item() for beta in (0.1, 0.2, 0.4)}) == 3
    with pytest.raises(TypeError, match="beta"):
        PREF_LOSSES[name].function(*pairs())


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_loss_and_gradient_are_finite_at_ten_thousand_nats(name, dtype, h):
    """exp(1e4) overflows even float64. At -1e4, beta 0.5: sigmoid's loss is -beta h = 5,000, its slope -0.5."""
    chosen = torch.tensor([h], dtype=dtype, requires_grad=True)
    losses = PREF_LOSSES[name].function(chosen, torch.zeros(1, dtype=dtype), beta=0.5)
    losses.sum().backward()
    assert chosen.grad is not None
    assert losses.isfinite().all() and chosen.grad.isfinite().all()
    if name == "sigmoid":
        assert losses.item() == pytest.approx(max(0, -0.5 * h)) and chosen.grad.item() == pytest.approx(
            -0.5 if h < 0 else 0
        )


def test_every_loss_names_its_equation_and_its_paper():
    for loss in PREF_LOSSES.values():
        assert loss.equation and "arXiv:" in loss.paper and loss.reads in ("sum", "mean")


# --- TRL ---


def trl_loss_and_metrics(
    loss_type: str, policy: Tensor, reference: Tensor, lengths: list[int], beta: float
) -> tuple[Tensor, dict[str, float]]:
    """TRL 1.16's DPOTrainer._compute_loss itself, on a stand-in for the trainer and for the model's output.

    The stand-in holds the attributes that the method reads, with TRL's default for every option; `policy` and
    `reference` are per-token log-probabilities (2P, S), the chosen first, 0 past each response's length, as its fused
    head returns them. Returns the batch's mean loss and the metrics that TRL would log.
    """
    from trl import DPOTrainer

    rows, width = policy.shape
    mask = torch.zeros(rows, width + 1, dtype=torch.long)  # the first position is the prompt's
    for row, length in enumerate(lengths):
        mask[row, 1 : 1 + length] = 1
    zeros = torch.zeros(rows, width)
    outputs = SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
        ),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=0.0, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    chosen, rejected = reference.sum(dim=1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def token_logps_of_three_pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference (6, 7) of responses of 4, 1, 7, 2, 5 and 3 tokens, and these lengths; float64."""
    lengths = torch.tensor([4, 1, 7, 2, 5, 3])
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-3 * torch.rand(6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    real = torch.arange(7) < lengths[:, None]
    return policy * real, reference * real, lengths


@LOSSES
@BETAS
def test_loss_gradient_and_metrics_agree_with_trl(name, beta):
    """To 1e-9 in float64, down to the gradient of every token's log-probability; TRL's metrics are batch means."""
    policy, reference, lengths = token_logps_of_three_pairs()
    theirs_in, ours_in = (policy.clone().requires_grad_() for _ in range(2))
    theirs, metrics = trl_loss_and_metrics(name, theirs_in, reference, lengths.tolist(), beta)

    logps, logratios = ours_in.sum(1), (ours_in - reference).sum(1)
    read = logratios / lengths if PREF_LOSSES[name].reads == "mean" else logratios
    ours = PREF_LOSSES[name].function(read[:3], read[3:], beta=beta).mean()

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    (expected,), (gradient,) = torch.autograd.grad(theirs, theirs_in), torch.autograd.grad(ours, ours_in)
    # Padding has no log-probability of ours; TRL's sum gives it a gradient that its masked head then drops.
    real = torch.arange(7) < lengths[:, None]
    torch.testing.assert_close(gradient * real, expected * real, rtol=0, atol=1e-9)
    assert gradient.abs().max() > 1e-3

    named = preference_metrics(logps[:3], logps[3:], logratios[:3], logratios[3:], beta=beta)
    for metric, vector in named.items():
        assert metrics[metric] == pytest.approx(vector.mean().item(), abs=1e-9), metric

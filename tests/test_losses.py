"""The laws that each row of the loss table declares, values by hand, and agreement with TRL.

Shapes: B pairs, S token positions.
"""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dpo import losses
from dpo.losses import OFF, OPTIONS, PREF_LOSSES, QUANTITIES, log1mexp
from dpo.metrics import preference_metrics
from dpo.preference import Pairs, preference_loss
from dpo.wpo import wpo_weights

# Losses of labelled rows have laws of their own, in test_unpaired.py.
PAIRED = [name for name, loss in PREF_LOSSES.items() if not loss.unpaired]
LOSSES = pytest.mark.parametrize("name", PAIRED)
BETAS = pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 2.0])
LOG2 = math.log(2)


def options_of(name: str, beta: float = 0.3) -> dict[str, float]:
    """Options with which every loss is itself."""
    given = {"beta": beta, "label_smoothing": 0.1, "tau": 0.7, "gamma": 0.4}
    return {option: given[option] for option in PREF_LOSSES[name].options}


def quantities(count: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Every quantity that a loss can read, of `count` random pairs, float64."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for side in ("chosen", "rejected"):
        length = torch.randint(1, 9, (count,), generator=generator).double()
        ratio = 3 * torch.randn(count, generator=generator, dtype=torch.float64)
        logps = -length * (0.2 + 2 * torch.rand(count, generator=generator, dtype=torch.float64))
        values |= {
            f"{side}_logps": logps, f"{side}_ref_logps": logps - ratio, f"{side}_logratios": ratio,
            f"{side}_avg_logps": logps / length, f"{side}_avg_logratios": ratio / length,
        }  # fmt: skip
    return values | {"mean_chosen_length": torch.full((count,), 4.0, dtype=torch.float64)}


def value(name: str, given: dict[str, Tensor], **options: float) -> Tensor:
    loss = PREF_LOSSES[name]
    return loss.function(*(given[quantity] for quantity in loss.reads), **options)


def on_margin(name: str, h: list[float], **options: float) -> Tensor:
    """The loss at log-ratio differences h, the rejected log-ratio being 0."""
    h_B = torch.tensor(h, dtype=torch.float64)
    return PREF_LOSSES[name].function(h_B, torch.zeros_like(h_B), **options)


# --- values by hand ---


def test_sigmoid_by_hand():
    """h = 2 - (-1) = 3, beta 0.5: log(1 + exp(-1.5)); with e = 0.2, 0.8 of it and 0.2 of log(1 + exp(1.5))."""
    low, high = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert on_margin("sigmoid", [3.0], beta=0.5, label_smoothing=0.0).item() == pytest.approx(low, abs=1e-15)
    smoothed = on_margin("sigmoid", [3.0], beta=0.5, label_smoothing=0.2)
    assert smoothed.item() == pytest.approx(0.8 * low + 0.2 * high, abs=1e-15)


def test_robust_by_hand():
    """(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e) with e = 0.25: (0.75 low - 0.25 high) / 0.5."""
    low, high = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    loss = on_margin("robust", [3.0], beta=0.5, label_smoothing=0.25).item()
    assert loss == pytest.approx(1.5 * low - 0.5 * high)


def test_robust_is_unbiased_for_labels_that_are_flipped_at_its_rate():
    """(1 - e) robust(h) + e robust(-h) is the plain loss at h: what the true labels would have given."""
    h, e = [-2.0, 0.3, 5.0], 0.3
    kept, flipped = (on_margin("robust", s, beta=0.7, label_smoothing=e) for s in (h, [-x for x in h]))
    torch.testing.assert_close((1 - e) * kept + e * flipped, on_margin("sigmoid", h, beta=0.7, label_smoothing=0.0))


def test_hinge_by_hand():
    """beta 0.5: at h = -2, 0, 1, 2, 3 the loss is 2, 1, 1/2, 0, 0."""
    assert on_margin("hinge", [-2.0, 0, 1, 2, 3], beta=0.5).tolist() == [2, 1, 0.5, 0, 0]


@pytest.mark.parametrize("name", ["ipo", "ipo_sum"])
def test_ipo_by_hand(name):
    """beta 0.5: (h - 1)^2, least at h = 1/(2 beta) and as large at twice that as at 0."""
    assert on_margin(name, [3.0, 1.0, 0.0, 2.0], beta=0.5).tolist() == [4, 0, 1, 1]


def test_exo_is_a_divergence_between_two_bernoullis():
    """q = sigmoid(x): q log(q / (1 - e)) + (1 - q) log((1 - q) / e); 0 where sigmoid(x) = 1 - e."""
    q, e = 1 / (1 + math.exp(-1.5)), 0.1
    expected = q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)
    assert on_margin("exo_pair", [3.0], beta=0.5, label_smoothing=e).item() == pytest.approx(expected)
    assert on_margin("exo_pair", [2 * math.log(9)], beta=0.5, label_smoothing=e).item() == pytest.approx(0, abs=1e-15)


def test_discopop_by_hand():
    """x = 1.5, tau = 3: m = sigmoid(0.5); (1 - m) log(1 + exp(-1.5)) + m exp(-1.5)."""
    m = 1 / (1 + math.exp(-0.5))
    expected = (1 - m) * math.log(1 + math.exp(-1.5)) + m * math.exp(-1.5)
    assert on_margin("discopop", [3.0], beta=0.5, tau=3.0).item() == pytest.approx(expected)


def test_sppo_pulls_the_two_sides_apart_to_half_the_inverse_of_beta():
    """beta 0.25: (a - 2)^2 + (b + 2)^2."""
    a_B, b_B = torch.tensor([2.0, 0.0, 3.0]), torch.tensor([-2.0, 0.0, -5.0])
    assert losses.sppo_hard_loss(a_B, b_B, beta=0.25).tolist() == [0, 8, 10]


def test_nca_holds_the_chosen_reward_at_log_2():
    """Its gradient in r_w is -sigmoid(-r) + sigmoid(r)/2, zero at sigmoid(r) = 2/3."""
    a_B = torch.tensor([LOG2], dtype=torch.float64, requires_grad=True)
    losses.nca_pair_loss(a_B, torch.zeros(1), beta=1.0).backward()
    assert a_B.grad is not None and a_B.grad.item() == pytest.approx(0, abs=1e-15)


def test_aot_compares_sorted_margins_and_not_pairs():
    """Policy margins 3, 1 against reference margins 0, 2: sorted, 1 - 0 and 3 - 2, so both differences are 1."""
    policy, reference, zero = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0]), torch.zeros(2)
    result = losses.aot_loss(policy, zero, reference, zero, beta=1.0, label_smoothing=0.0)
    assert result.tolist() == pytest.approx([math.log(1 + math.exp(-1))] * 2)


def test_kto_pair_by_hand():
    """a = 3, 1 and b = -2, -4: z_w = 2 and z_l = max(0, -3) = 0; pair 1: (sigmoid(-3) + sigmoid(-4)) / 2."""
    a_B, b_B = torch.tensor([3.0, 1.0]), torch.tensor([-2.0, -4.0])
    first = losses.kto_pair_loss(a_B, b_B, beta=1.0)[0].item()
    assert first == pytest.approx((1 / (1 + math.exp(3)) + 1 / (1 + math.exp(4))) / 2)


def test_simpo_by_hand():
    """u = -1 and -2, beta 2, gamma 0.5: log(1 + exp(-(2 - 0.5)))."""
    loss = losses.simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_orpo_by_hand():
    """p_w = 1/2 has odds 1, p_l = 1/4 has odds 1/3: -log(1/2) + beta log(1 + 1/3)."""
    u_w, u_l = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert losses.orpo_loss(u_w, u_l, beta=0.1).item() == pytest.approx(LOG2 + 0.1 * math.log(4 / 3))


@pytest.mark.parametrize("x", [-1e-12, -1e-6, -0.1, -LOG2, -1.0, -30.0, -700.0])
def test_log1mexp_is_exact_near_0_and_far_from_it(x):
    """Against mpmath-free truth: log(-expm1(x)) near 0, log1p(-exp(x)) far; the derivative is 1 / (1 - exp(-x))."""
    x_1 = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    result = log1mexp(x_1)
    result.sum().backward()
    expected = math.log(-math.expm1(x)) if x > -LOG2 else math.log1p(-math.exp(x))
    assert result.item() == pytest.approx(expected, rel=1e-14)
    assert x_1.grad is not None and x_1.grad.item() == pytest.approx(1 / -math.expm1(-x), rel=1e-12)


def test_orpo_is_finite_where_float32_rounds_the_probability_to_1():
    u_B = torch.tensor([-1e-9, 0.0], requires_grad=True)
    loss = losses.orpo_loss(u_B, torch.tensor([-3.0, -3.0]), beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all() and u_B.grad is not None and u_B.grad.isfinite().all()


def test_simpo_and_orpo_are_llama_factorys_formulas():
    """Its simpo_loss and odds_ratio_loss, written out; its log1p(-exp(u)) is exact enough away from u = 0."""
    given = quantities()
    u_w, u_l, beta, gamma = given["chosen_avg_logps"], given["rejected_avg_logps"], 2.0, 0.5
    simpo = -torch.nn.functional.logsigmoid(beta * (u_w - u_l - gamma / beta))
    torch.testing.assert_close(value("simpo", given, beta=beta, gamma=gamma), simpo, rtol=1e-12, atol=0)
    log_odds = (u_w - u_l) - (torch.log1p(-torch.exp(u_w)) - torch.log1p(-torch.exp(u_l)))
    orpo = -u_w + beta * -torch.nn.functional.logsigmoid(log_odds)
    torch.testing.assert_close(value("orpo", given, beta=beta), orpo, rtol=1e-12, atol=0)


# --- the laws that a row declares ---


@LOSSES
def test_a_loss_reads_named_quantities_and_takes_named_options(name):
    loss = PREF_LOSSES[name]
    assert loss.reads and set(loss.reads) <= QUANTITIES.keys() and set(loss.options) <= OPTIONS.keys()
    assert loss.equation and loss.paper
    with_default = [p for p in losses.inspect.signature(loss.function).parameters.values() if p.default is not p.empty]
    assert not with_default  # nothing that a caller could fall back on


@LOSSES
def test_a_loss_is_per_pair_unless_it_couples(name):
    """(B,) in, (B,) out, the dtype kept; and a pair's loss is its own, whatever stands beside it."""
    given = quantities()
    whole = value(name, given, **options_of(name))
    assert whole.shape == (7,) and whole.dtype == torch.float64
    assert value(name, {k: v.float() for k, v in given.items()}, **options_of(name)).dtype == torch.float32
    alone = torch.cat([value(name, {k: v[i : i + 1] for k, v in given.items()}, **options_of(name)) for i in range(7)])
    assert torch.equal(whole, alone) != PREF_LOSSES[name].couples


@LOSSES
@BETAS
def test_the_start_is_the_loss_where_policy_equals_reference(name, beta):
    loss = PREF_LOSSES[name]
    if loss.start is None:
        assert not loss.needs_reference
        return
    same = {k: v * ("ratios" not in k) for k, v in quantities().items()}
    same |= {f"{side}_ref_logps": same[f"{side}_logps"] for side in ("chosen", "rejected")}
    expected = loss.start(**options_of(name, beta))
    assert value(name, same, **options_of(name, beta)).tolist() == pytest.approx([expected] * 7, rel=1e-12)


@LOSSES
def test_a_step_from_the_start_pushes_each_side_as_declared(name):
    """The sign of -dL/d log pi of each side, where policy equals reference (or anywhere, without one)."""
    loss = PREF_LOSSES[name]
    given = {k: (v * ("ratios" not in k)).requires_grad_() for k, v in quantities().items()}
    if loss.needs_reference:
        for side in ("chosen", "rejected"):
            given[f"{side}_ref_logps"] = given[f"{side}_logps"].detach()
    value(name, given, **options_of(name)).sum().backward()
    for side, sign in zip(("chosen", "rejected"), loss.pushes, strict=True):
        read = [q for q in loss.reads if q.startswith(side) and "ref" not in q]
        gradients = torch.cat([given[q].grad for q in read]) if read else torch.zeros(1)
        assert ((-gradients * sign > 0) if sign else (gradients.abs() < 1e-15)).all()


@LOSSES
@BETAS
def test_a_loss_that_falls_falls_everywhere(name, beta):
    """Never up as the chosen log-probability rises or the rejected one falls, over 40 nats either way."""
    loss = PREF_LOSSES[name]
    line_B = torch.linspace(-40, -0.01, 400, dtype=torch.float64)
    line_B = line_B if not loss.needs_reference else line_B + 20
    monotone = True
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        given = {q: line_B if q.startswith(side) else torch.full_like(line_B, -1.3) for q in QUANTITIES}
        given["mean_chosen_length"] = torch.ones_like(line_B)
        assert other
        # One pair at a time, so that a batch's mean or order does not enter.
        values = torch.cat([
            value(name, {k: v[i : i + 1] for k, v in given.items()}, **options_of(name, beta)) for i in range(400)
        ])  # fmt: skip
        steps = values.diff() * (1 if side == "chosen" else -1)
        monotone &= bool((steps <= 1e-12).all())
    if loss.falls:
        assert monotone


@LOSSES
def test_gradients_are_autograds_own(name):
    """gradcheck's finite differences in float64; away from the hinge's corner and AOT's ties."""
    loss = PREF_LOSSES[name]
    given = [quantities(5, seed=3)[quantity].requires_grad_() for quantity in loss.reads]
    if name == "kto_pair":
        return  # its z carries no gradient on purpose: see the next test
    assert torch.autograd.gradcheck(lambda *q: loss.function(*q, **options_of(name)), given)


def test_ktos_reference_point_carries_no_gradient():
    """d/da of the mean over two pairs is -beta sigma(1 - sigma)/4 each, as if z were a number."""
    a_B = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    losses.kto_pair_loss(a_B, torch.tensor([2.0, 0.0]), beta=0.5).sum().backward()
    slope = lambda a: -0.5 * (s := 1 / (1 + math.exp(-0.5 * (1 - a)))) * (1 - s) / 2
    assert a_B.grad is not None and a_B.grad.tolist() == pytest.approx([slope(3), slope(1)])


@LOSSES
def test_beta_reaches_the_function(name):
    if "beta" in PREF_LOSSES[name].options:
        given = quantities()
        results = [value(name, given, **options_of(name, beta)).sum().item() for beta in (0.1, 0.2, 0.4)]
        assert len(set(results)) == 3


@pytest.mark.parametrize("name", [n for n, loss in PREF_LOSSES.items() if loss.on_margin])
def test_a_loss_on_the_margin_reads_only_the_difference(name):
    given = quantities()
    moved = {k: v + 5 if "ratios" in k else v for k, v in given.items()}
    torch.testing.assert_close(value(name, moved, **options_of(name)), value(name, given, **options_of(name)))


def test_no_other_loss_reads_only_the_difference():
    given = quantities()
    moved = {k: v + 5 if "ratios" in k else v for k, v in given.items()}
    for name, loss in PREF_LOSSES.items():
        if loss.needs_reference and not (loss.on_margin or loss.couples or loss.unpaired):
            assert not torch.allclose(value(name, moved, **options_of(name)), value(name, given, **options_of(name)))


def test_swapping_the_sides_swaps_the_probability_of_the_label():
    """sigmoid(-x) = 1 - sigmoid(x), so exp(-loss) of a pair and of the swapped pair sum to 1."""
    h = [0.3, -4.0, 9.0]
    both = [on_margin("sigmoid", s, beta=0.7, label_smoothing=0.0) for s in (h, [-x for x in h])]
    torch.testing.assert_close((-both[0]).exp() + (-both[1]).exp(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
def test_without_label_smoothing_it_is_the_plain_loss(name):
    expected = [math.log(1 + math.exp(-0.7 * h)) for h in (0.3, -4.0, 9.0)]
    assert on_margin(name, [0.3, -4.0, 9.0], beta=0.7, label_smoothing=0.0).tolist() == pytest.approx(expected)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nats", [1e4, -1e4])
def test_loss_and_gradient_are_finite_at_ten_thousand_nats(name, dtype, nats):
    """exp(1e4) overflows even float64. A log-probability is never above 0, so those stop there."""
    loss = PREF_LOSSES[name]
    if name == "discopop" and nats < 0:
        pytest.skip("grows as exp(-beta h), by its definition, in the band where m is not small")
    given = []
    for quantity in loss.reads:
        sign = 1 if quantity.startswith("chosen") else -1
        bounded = "ratios" not in quantity
        number = min(sign * nats, -1e-3) if bounded else sign * nats
        number = 4.0 if quantity == "mean_chosen_length" else number
        given.append(torch.tensor([number], dtype=dtype, requires_grad=True))
    result = loss.function(*given, **options_of(name, 0.5))
    result.sum().backward()
    assert result.isfinite().all()
    assert all(q.grad is None or q.grad.isfinite().all() for q in given)


def test_discopop_is_finite_far_below_0_at_its_papers_temperature():
    """The naive product is 0 times infinity at x = -2000; here exp(log m - x) is 0 and the loss is -x."""
    assert on_margin("discopop", [-2000.0], beta=1.0, tau=0.05).tolist() == [2000.0]


# --- TRL ---

TRL = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
       "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]  # fmt: skip


def trl_loss_and_metrics(
    policy_BS: Tensor, reference_BS: Tensor, lengths: list[int], log_sum_sq_BS: Tensor | None = None,
    **settings: object,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """TRL 1.16's DPOTrainer._compute_loss itself, on a stand-in for the trainer and for the model's output.

    The stand-in holds the attributes that the method reads, with TRL's default for every option; policy and reference
    are per-token log-probabilities, the chosen first, 0 past each response's length, as its fused head returns them.
    Returns the batch's mean loss and the metrics that TRL would log.
    """
    from trl import DPOTrainer

    rows, width = policy_BS.shape
    mask = torch.zeros(rows, width + 1, dtype=torch.long)  # the first position is the prompt's
    for row, length in enumerate(lengths):
        mask[row, 1 : 1 + length] = 1
    zeros = torch.zeros(rows, width)
    outputs = SimpleNamespace(
        log_probs=policy_BS, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None,
        log_sum_sq_probs=log_sum_sq_BS,
    )  # fmt: skip
    trainer = SimpleNamespace(
        model=torch.nn.Module(),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
        ),
        aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=log_sum_sq_BS is not None, ref_model=None,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        **{"ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0}
        | settings,
    )  # fmt: skip
    trainer.ref_model = lambda **_: SimpleNamespace(log_probs=reference_BS)
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
    }  # fmt: skip
    trainer.model.is_gradient_checkpointing = False
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def token_logps() -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference (6, 7) of responses of 4, 1, 7, 2, 5 and 3 tokens, and these lengths; float64."""
    lengths = torch.tensor([4, 1, 7, 2, 5, 3])
    generator = torch.Generator().manual_seed(0)
    policy_BS, reference_BS = (-3 * torch.rand(6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    real = torch.arange(7) < lengths[:, None]
    return policy_BS * real, reference_BS * real, lengths


def our_loss_and_pairs(
    policy_BS: Tensor, reference_BS: Tensor, lengths: Tensor, names: list[str], weights: list[float] | None = None,
    options: dict[str, float] | None = None, ld_alpha: float = 1.0, log_sum_sq_BS: Tensor | None = None,
    **terms: object,
) -> tuple[Tensor, Pairs]:  # fmt: skip
    """Our mean loss of the same pairs; LD-DPO's weights as its equation has them, token by token."""
    shorter = torch.minimum(lengths[:3], lengths[3:]).repeat(2)[:, None]
    weight_BS = torch.where(torch.arange(7) < shorter, 1.0, ld_alpha).double()
    logps = (policy_BS * weight_BS).sum(1)
    ratios = ((policy_BS - reference_BS) * weight_BS).sum(1)
    ones = torch.ones(3, dtype=torch.float64)
    pairs = Pairs(
        logps[:3], logps[3:], ratios[:3], ratios[3:], lengths[:3], lengths[3:], ones * lengths[:3].double().mean(),
        weight=ones, margin=0 * ones, soft_label=math.nan * ones,
    )  # fmt: skip
    if log_sum_sq_BS is not None:
        in_turn, real = [0, 3, 1, 4, 2, 5], torch.arange(7) < lengths[:, None]
        logps_R, log_sum_sq_R = (x_BS[in_turn][real[in_turn]] for x_BS in (policy_BS, log_sum_sq_BS))
        pairs = replace(pairs, weight=wpo_weights(logps_R, log_sum_sq_R, lengths[in_turn]))
    settings = OFF | (options or {})
    return preference_loss(names, weights, settings, **terms)(pairs).mean(), pairs


def assert_equal_to_trl(
    names: list[str], beta: float, tolerance: float = 1e-9, dtype: torch.dtype = torch.float64,
    log_sum_sq_BS: Tensor | None = None, **settings: object,
) -> None:  # fmt: skip
    """Value, the gradient of every token's log-probability, and TRL's metrics."""
    policy_BS, reference_BS, lengths = token_logps()
    policy_BS, reference_BS = policy_BS.to(dtype), reference_BS.to(dtype)
    theirs_in, ours_in = (policy_BS.clone().requires_grad_() for _ in range(2))
    smoothing = settings.pop("label_smoothing", 1e-3 if "exo_pair" in names else 0.0)
    weights = settings.pop("loss_weights", [1.0] * len(names))
    theirs, metrics = trl_loss_and_metrics(
        theirs_in, reference_BS, lengths.tolist(), loss_types=names, loss_weights=weights, beta=beta,
        label_smoothing=smoothing, log_sum_sq_BS=log_sum_sq_BS, **settings,
    )  # fmt: skip
    if settings.get("ld_alpha") is None:
        settings.pop("ld_alpha", None)
    ours, pairs = our_loss_and_pairs(
        ours_in, reference_BS, lengths, names, weights, {"beta": beta, "label_smoothing": smoothing},
        log_sum_sq_BS=log_sum_sq_BS, **settings,
    )  # fmt: skip
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance)
    (expected_BS,), (gradient_BS,) = torch.autograd.grad(theirs, theirs_in), torch.autograd.grad(ours, ours_in)
    # Padding has no log-probability of ours; TRL's sum gives it a gradient that its masked head then drops.
    real = torch.arange(7) < lengths[:, None]
    largest = expected_BS.abs().max().clamp(min=1)
    torch.testing.assert_close(gradient_BS * real, expected_BS * real, rtol=0, atol=tolerance * largest.item())
    assert gradient_BS.abs().max() > 1e-4
    named = preference_metrics(
        pairs.chosen_logps, pairs.rejected_logps, pairs.chosen_logratios, pairs.rejected_logratios, beta=beta
    )
    for metric, vector in named.items():
        assert metrics[metric] == pytest.approx(vector.mean().item(), rel=tolerance, abs=1e-9), metric


@pytest.mark.parametrize("name", TRL)
@BETAS
def test_loss_gradient_and_metrics_agree_with_trl(name, beta):
    """To 1e-9 in float64; exo_pair to 1e-6, because TRL's epsilon is a float32 there."""
    assert_equal_to_trl([name], beta, tolerance=1e-6 if name == "exo_pair" else 1e-9)


@pytest.mark.parametrize("name", ["robust", "aot", "aot_unpaired", "exo_pair"])
def test_label_smoothing_agrees_with_trl(name):
    assert_equal_to_trl([name], 0.3, tolerance=1e-6 if name == "exo_pair" else 1e-9, label_smoothing=0.2)


@pytest.mark.parametrize("names", [["sigmoid", "bco_pair", "sft"], ["hinge", "aot"]])
def test_combinations_agree_with_trl(names):
    assert_equal_to_trl(names, 0.3, loss_weights=[0.8, 0.2, 1.0][: len(names)])


@pytest.mark.parametrize("name", [n for n, loss in PREF_LOSSES.items() if n in TRL and loss.on_margin])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
def test_f_divergences_agree_with_trl(name, divergence):
    assert_equal_to_trl([name], 0.3, tolerance=1e-6 if name == "exo_pair" else 1e-9, f_divergence_type=divergence)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_the_alpha_divergence_agrees_with_trl(alpha):
    """In float32, the only one of its dtypes that TRL's clamp knows beside two half ones: to 1e-5."""
    assert_equal_to_trl(
        ["sigmoid"], 0.3, tolerance=1e-5, dtype=torch.float32, f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=alpha,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca_pair", "aot", "apo_down"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.5])
def test_ld_dpo_agrees_with_trl(name, ld_alpha):
    assert_equal_to_trl([name], 0.3, ld_alpha=ld_alpha)


@pytest.mark.parametrize("names", [["sigmoid"], ["ipo"], ["nca_pair"], ["discopop", "bco_pair"]])
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_wpo_agrees_with_trl(names, ld_alpha):
    """Of random log sum_v p_v^2; the weights carry no gradient, and LD-DPO does not enter them."""
    lengths = token_logps()[2]
    log_sum_sq_BS = -2 * torch.rand(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_sum_sq_BS *= torch.arange(7) < lengths[:, None]
    assert_equal_to_trl(names, 0.3, log_sum_sq_BS=log_sum_sq_BS, ld_alpha=ld_alpha)


def test_every_loss_of_trl_is_here():
    from trl import DPOConfig

    known = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    for name in TRL:
        assert f"`'{name}'`" in known or name in known
        assert name in PREF_LOSSES

"""The preference objective: each term by hand, what no loss reads refused, rows that cannot be honoured named.

Shapes: B pairs, R response tokens.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo import preference
from dpo.formats import Example
from dpo.losses import OFF, PREF_LOSSES
from dpo.preference import (
    F_DIVERGENCES,
    Pairs,
    PreferenceLoss,
    PreferenceObjective,
    preference_loss,
    shared_token_weights,
)
from dpo.tokens import Encoded
from models.stream import pack

BETA = 0.5
OPTIONS = OFF | {"beta": BETA}
PAIRED = [name for name, loss in PREF_LOSSES.items() if not loss.unpaired]
ON_SUMS = [name for name, loss in PREF_LOSSES.items() if loss.on_margin and not loss.per_token]


def built(
    *names: str, weights: list[float] | None = None, options: dict | None = None, **terms: object
) -> PreferenceLoss:
    smoothing = {"label_smoothing": 0.1} if "exo_pair" in names else {}
    return preference_loss(names, weights, OPTIONS | smoothing | (options or {}), **terms)


def some_pairs(**changed: list[float]) -> Pairs:
    """Three pairs, float64; a - b = 3, -1, 2."""
    values = {
        "chosen_logps": [-8.0, -3.0, -9.0], "rejected_logps": [-6.0, -4.0, -12.0],
        "chosen_logratios": [2.0, -3.0, 0.5], "rejected_logratios": [-1.0, -2.0, -1.5],
        "chosen_lengths": [4.0, 2.0, 3.0], "rejected_lengths": [2.0, 5.0, 3.0], "mean_chosen_length": [3.0] * 3,
        "weight": [1.0] * 3, "margin": [0.0] * 3, "soft_label": [math.nan] * 3,
    } | changed  # fmt: skip
    return Pairs(**{name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def assert_same(result: Tensor, expected: Tensor | list[float]) -> None:
    torch.testing.assert_close(result, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def with_argument(h: list[float]) -> list[float]:
    """DPO's loss at log-ratio differences h."""
    return [softplus(-BETA * x) for x in h]


# --- terms on the margin ---


def test_dpop_by_hand():
    """Only the second chosen response is less likely than under the reference, by 3 nats: h = 3, -1 - 2 * 3, 2."""
    assert_same(built("sigmoid", dpop_lambda=2.0)(some_pairs()), with_argument([3, -7, 2]))


def test_length_regularisation_by_hand_and_its_sign():
    """The argument beta h gains alpha (|y_w| - |y_l|) = 0.1 times 2, -3, 0: a longer chosen response raises it."""
    result = built("sigmoid", len_reg_alpha=0.1)(some_pairs())
    assert_same(result, [softplus(-(BETA * h + 0.1 * d)) for h, d in ((3, 2), (-1, -3), (2, 0))])
    plain = built("sigmoid")(some_pairs())
    assert result[0] < plain[0] and result[1] > plain[1] and result[2] == plain[2]


def test_a_rows_margin_by_hand():
    """ODPO: -log sigmoid(beta h - margin)."""
    pairs = some_pairs(margin=[1.0, 0.0, -2.0])
    assert_same(built("sigmoid")(pairs), [softplus(-x) for x in (BETA * 3 - 1, -BETA, BETA * 2 + 2)])


@pytest.mark.parametrize("name", ON_SUMS)
def test_terms_on_the_margin_are_a_shift_of_the_log_ratios(name):
    """All at once, for every loss that reads them: the loss of pairs whose a and b are a' and b'."""
    pairs = some_pairs(margin=[1.0, 0.0, -2.0])
    loss = built(name, dpop_lambda=2.0, len_reg_alpha=0.1, f_divergence_type="forward_kl")
    f = lambda ratios: 1 - (-ratios).exp()
    penalty = torch.tensor([0.0, 6.0, 0.0], dtype=torch.float64)
    moved = replace(
        pairs,
        chosen_logratios=f(pairs.chosen_logratios) - penalty + 0.2 * pairs.chosen_lengths - 2 * pairs.margin,
        rejected_logratios=f(pairs.rejected_logratios) + 0.2 * pairs.rejected_lengths,
        margin=0 * pairs.margin,
    )
    assert_same(loss(pairs), built(name)(moved))


def test_in_a_combination_a_term_reaches_only_the_losses_that_read_it():
    """ipo reads means, nca_pair is not on the margin: their share is what it would be without the terms."""
    pairs = some_pairs(margin=[1.0, 0.0, -2.0])
    terms = {"dpop_lambda": 2.0, "len_reg_alpha": 0.1}
    others = built("ipo", "nca_pair")(some_pairs())
    assert_same(built("sigmoid", "ipo", "nca_pair", **terms)(pairs), built("sigmoid", **terms)(pairs) + others)


# --- f-divergences ---

DIVERGENCES = [("reverse_kl", 0.5, 1.0), ("forward_kl", 0.5, 1.0), ("js_divergence", 0.5, 0.5)]
DIVERGENCES += [("chi_squared_kl", 0.5, 2.0)]
DIVERGENCES += [("alpha_divergence", alpha, 1.0) for alpha in (-1.0, 0.0, 0.5, 2.0)]


@pytest.mark.parametrize(("name", "alpha", "slope"), DIVERGENCES)
def test_a_divergence_is_0_at_0_with_a_known_slope_and_rises(name, alpha, slope):
    a_B = torch.tensor([0.0, -3.0, 2.0], dtype=torch.float64, requires_grad=True)
    f_B = F_DIVERGENCES[name](a_B, alpha)
    f_B.sum().backward()
    assert f_B[0] == 0 and f_B[1] < f_B[0] < f_B[2]
    assert a_B.grad is not None and a_B.grad[0] == pytest.approx(slope)


def test_divergences_by_hand():
    """At u = 4: log u, 1 - 1/u, log(2u / (1 + u)), log u + u - 1 and, for alpha = 1/2, 2 - 2/sqrt(u)."""
    a_B = torch.tensor([4.0], dtype=torch.float64).log()
    expected = {
        "reverse_kl": math.log(4), "forward_kl": 0.75, "js_divergence": math.log(1.6),
        "chi_squared_kl": math.log(4) + 3, "alpha_divergence": 1.0,
    }  # fmt: skip
    assert {name: f(a_B, 0.5).item() for name, f in F_DIVERGENCES.items()} == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chi_pos_link_rises_and_stays_finite_at_ten_thousand_nats(dtype):
    """exp(1e4) overflows even float64. Beyond 20 nats it rises as the KL's link does, with slope 1."""
    a_B = torch.tensor([-1e4, -5.0, 3.0, 20.0, 30.0, 1e4], dtype=dtype, requires_grad=True)
    f_B = F_DIVERGENCES["chi_squared_kl"](a_B, 0.5)
    (slope_B,) = torch.autograd.grad(f_B.sum(), a_B)
    assert f_B.isfinite().all() and (f_B.diff() >= 0).all()
    assert slope_B[[0, 4, 5]].tolist() == [1, 1, 1] and slope_B[2].item() == pytest.approx(1 + math.exp(3))
    losses = built("sigmoid", f_divergence_type="chi_squared_kl")(some_pairs(rejected_logratios=[1e4, -1e4, 30.0]))
    assert losses.isfinite().all()


@pytest.mark.parametrize(("alpha", "limit"), [(1 - 1e-7, "reverse_kl"), (0.0, "forward_kl")])
def test_the_alpha_divergence_joins_the_two_kls(alpha, limit):
    a_B = torch.tensor([-3.0, 0.2, 2.0], dtype=torch.float64)
    f, g = (F_DIVERGENCES[name](a_B, alpha) for name in ("alpha_divergence", limit))
    torch.testing.assert_close(f, g, rtol=1e-6, atol=1e-12)


def test_a_loss_on_means_takes_the_divergence_of_the_sums():
    """ipo: ((f(a)/|y_w| - f(b)/|y_l|) - 1)^2 with f(a) = 1 - exp(-a), beta 1/2."""
    f = lambda a: 1 - math.exp(-a)
    expected = [(f(a) / w - f(b) / n - 1) ** 2 for a, b, w, n in ((2, -1, 4, 2), (-3, -2, 2, 5), (0.5, -1.5, 3, 3))]
    assert_same(built("ipo", f_divergence_type="forward_kl")(some_pairs()), expected)


# --- LD-DPO, on the stream ---


def test_tokens_beyond_the_shorter_response_count_alpha():
    """Lengths 4 and 2, then 1 and 3, then 2 and 2, then 0 and 1."""
    expected = [[1, 1, 0.3, 0.3], [1, 1], [1], [1, 0.3, 0.3], [1, 1], [1, 1], [], [0.3]]
    lengths_B = torch.tensor([4, 2, 1, 3, 2, 2, 0, 1])
    assert shared_token_weights(lengths_B, 0.3).tolist() == pytest.approx(
        [weight for response in expected for weight in response]
    )


def rows_of(*responses: tuple[list[int], list[int]], **numbers: object) -> list[Encoded]:
    examples = [Example((), ("", ""), f"rows.jsonl:{i + 1}", **numbers) for i in range(len(responses))]
    return [Encoded([1, 2], r, e, 0, (False, False)) for r, e in zip(responses, examples, strict=True)]


def measured(
    monkeypatch: pytest.MonkeyPatch, loss: PreferenceLoss, policy: list[float], ref: list[float] | None
) -> Pairs:
    """The pairs of responses of 4 and 2, 1 and 3 tokens with these log-probabilities per token."""
    monkeypatch.setattr(preference, "token_logps", lambda model, stream: torch.tensor(policy, dtype=torch.float64))
    rows = rows_of(([5, 6, 7, 8], [5, 6]), ([7], [5, 5, 5]), weight=0.5, soft_label=0.75)
    objective = PreferenceObjective(
        loss, None if ref is None else lambda stream, rows: torch.tensor(ref, dtype=torch.float64)
    )
    stream = pack([row.prompt_ids for row in rows], [row.response_ids for row in rows])
    model = torch.nn.Module()
    model.device = torch.device("cpu")
    longer = [*rows, *rows_of(([1] * 7, [1]))]
    return objective.measure(model, stream, rows, longer)


POLICY = [-1.0, -2, -3, -4, -5, -6, -7, -8, -9, -10]


def test_pairs_are_measured_side_by_side(monkeypatch):
    """Chosen and rejected are branches 0 and 1 of each prompt; the mean length is the whole batch's, (4 + 1 + 7)/3."""
    pairs = measured(monkeypatch, built("sigmoid"), POLICY, [-1.0] * 10)
    assert pairs.chosen_logps.tolist() == [-10, -7] and pairs.rejected_logps.tolist() == [-11, -27]
    assert pairs.chosen_logratios.tolist() == [-6, -6] and pairs.rejected_logratios.tolist() == [-9, -24]
    assert pairs.chosen_lengths.tolist() == [4, 1] and pairs.rejected_lengths.tolist() == [2, 3]
    assert pairs.mean_chosen_length.tolist() == [4, 4]
    assert pairs.weight.tolist() == [0.5, 0.5] and pairs.soft_label.tolist() == [0.75, 0.75]


def test_ld_dpo_weighs_policy_and_reference_alike(monkeypatch):
    """alpha 1/2: chosen -1 - 2 - (3 + 4)/2, the second rejected -8 - (9 + 10)/2; ratios of equal models stay 0."""
    pairs = measured(monkeypatch, built("sigmoid", ld_alpha=0.5), POLICY, POLICY)
    assert pairs.chosen_logps.tolist() == [-6.5, -7] and pairs.rejected_logps.tolist() == [-11, -17.5]
    assert pairs.chosen_logratios.tolist() == pairs.rejected_logratios.tolist() == [0, 0]
    apart = measured(monkeypatch, built("sigmoid", ld_alpha=0.5), POLICY, [-1.0] * 10)
    assert apart.chosen_logratios.tolist() == [-6.5 + 3, -6] and apart.rejected_logratios.tolist() == [-9, -17.5 + 2]


def test_without_a_reference_a_log_ratio_is_the_log_probability(monkeypatch):
    pairs = measured(monkeypatch, built("simpo"), POLICY, None)
    assert torch.equal(pairs.chosen_logratios, pairs.chosen_logps)
    assert torch.equal(pairs.rejected_logratios, pairs.rejected_logps)


# --- terms of every loss ---


@pytest.mark.parametrize("name", PAIRED)
def test_pref_ftx_adds_the_chosen_responses_mean_negative_log_likelihood(name):
    """LLaMA-Factory's: -log pi(y_w) / |y_w| of each pair, times the weight; 2, 1.5 and 3 nats here."""
    difference = built(name, pref_ftx=0.5)(some_pairs()) - built(name)(some_pairs())
    assert_same(difference, [1.0, 0.75, 1.5])


@pytest.mark.parametrize("name", PAIRED)
def test_a_rows_weight_multiplies_its_loss(name):
    weights = [0.0, 1.0, 2.5]
    plain = built(name, pref_ftx=0.5)(some_pairs())
    assert_same(built(name, pref_ftx=0.5)(some_pairs(weight=weights)), plain * torch.tensor(weights))


def test_a_combination_is_the_weighted_sum_of_its_losses():
    names, weights = PAIRED, [0.5 + 0.1 * i for i in range(len(PAIRED))]
    smoothing = {"label_smoothing": 0.1}
    parts = [
        w * built(name, options=smoothing if "label_smoothing" in PREF_LOSSES[name].options else {})(some_pairs())
        for name, w in zip(names, weights, strict=True)
    ]
    assert_same(built(*names, weights=weights, options=smoothing)(some_pairs()), torch.stack(parts).sum(0))
    assert_same(built("hinge", "sigmoid")(some_pairs()), built("hinge", "sigmoid", weights=[1, 1])(some_pairs()))


# --- soft labels ---


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
def test_a_soft_label_is_one_minus_the_label_smoothing(name):
    """Row by row; a row without one keeps the rate that holds for all."""
    result = built(name, options={"label_smoothing": 0.2})(some_pairs(soft_label=[0.9, math.nan, 1.0]))
    expected = [built(name, options={"label_smoothing": e})(some_pairs())[i] for i, e in enumerate((0.1, 0.2, 0.0))]
    assert_same(result, torch.stack(expected))


def test_a_soft_label_of_one_half_is_symmetric_and_of_0_the_swapped_pair():
    pairs = some_pairs(soft_label=[0.5] * 3)
    swapped = replace(pairs, chosen_logratios=pairs.rejected_logratios, rejected_logratios=pairs.chosen_logratios)
    assert_same(built("sigmoid")(pairs), built("sigmoid")(swapped))
    unsure = replace(swapped, soft_label=torch.zeros(3, dtype=torch.float64))
    assert_same(built("sigmoid")(unsure), built("sigmoid")(some_pairs()))


# --- the start ---


@pytest.mark.parametrize("name", PAIRED)
def test_the_start_is_the_loss_where_policy_equals_reference(name):
    loss = built(name, options={"beta": 0.3}, **({"dpop_lambda": 3.0} if name in ON_SUMS else {}))
    zeros = [0.0] * 3
    losses = loss(some_pairs(chosen_logratios=zeros, rejected_logratios=zeros))
    if PREF_LOSSES[name].start is None:
        assert loss.start() is None
    else:
        assert_same(losses, [loss.start()] * 3)


def test_the_start_of_a_combination_and_where_there_is_none():
    """0.8 log 2 + 0.2 * 2 log 2; a likelihood or a length in the loss depends on the pair."""
    assert built("sigmoid", "bco_pair", weights=[0.8, 0.2]).start() == pytest.approx(1.2 * math.log(2))
    for loss in (
        built("sigmoid", "sft"),
        built("sigmoid", pref_ftx=1.0),
        built("sigmoid", len_reg_alpha=0.1),
        built("sigmoid", use_weighting=True),
    ):
        assert loss.start() is None


def test_a_combination_needs_a_reference_or_the_whole_batch_if_one_of_its_losses_does():
    assert built("simpo", "sigmoid").needs_reference and not built("simpo", "cpo", "orpo", "sft").needs_reference
    assert built("sigmoid", "aot").couples and not built("sigmoid", "sft").couples


# --- refusals ---

REFUSED = [
    (["hinge"], {"label_smoothing": 0.1}, {}, "dpo_label_smoothing=0.1: not read by pref_loss=hinge, but by sigmoid, "),
    (["sigmoid", "ipo"], {"gamma": 1.0}, {}, "simpo_gamma=1.0: not read by pref_loss=sigmoid,ipo, but by simpo; leave"),
    (["sigmoid"], {"tau": 0.1}, {}, "discopop_tau=0.1: not read by pref_loss=sigmoid, but by discopop; leave it at 0"),
    (["nca_pair"], {}, {"dpop_lambda": 50.0}, "dpop_lambda=50.0: not read by pref_loss=nca_pair, but by losses on t"),
    (["ipo"], {}, {"len_reg_alpha": 0.1}, "len_reg_alpha=0.1: not read by pref_loss=ipo, but by losses on the summed"),
    (["bco_pair"], {}, {"f_divergence_type": "forward_kl"}, "f_divergence_type=forward_kl: not read by pref_loss=bco"),
    (["sigmoid"], {}, {"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3: not read by f_divergence_type"),
    (["exo_pair"], {"label_smoothing": 0.0}, {}, "dpo_label_smoothing=0: exo_pair takes its logarithm"),
    (["sigmoid", "dpo"], {}, {}, "pref_loss=sigmoid,dpo: expected one or several of sigmoid, robust, hinge"),
    (["sigmoid", "kto"], {}, {}, "pref_loss=sigmoid,kto: losses of labelled rows and of pairs together; choose one"),
    (["kto"], {}, {"pref_ftx": 1.0}, "pref_ftx=1.0: not read by pref_loss=kto, but by losses of pairs; leave it at 0"),
    (["kto"], {}, {"ld_alpha": 0.5}, "ld_alpha=0.5: not read by pref_loss=kto, but by losses of pairs; leave it at 1"),
    (["sigmoid"], {"chosen_weight": 2.0}, {}, "kto_chosen_weight=2.0: not read by pref_loss=sigmoid, but by kto, apo"),
    (["kto_pair"], {}, {"use_weighting": True}, "use_weighting=True: with kto_pair a pair has no loss of its own "),
    (["sigmoid"], {}, {"dr_dpo_beta": 0.5, "use_weighting": True}, "dr_dpo_beta=0.5 with use_weighting=True: a pair "),
    (["ipo"], {}, {"beta_dpo_alpha": 0.6}, "beta_dpo_alpha=0.6: not read by pref_loss=ipo, but by losses on the sum"),
    (["sigmoid", "aot"], {}, {"dr_dpo_beta": 1.0}, "dr_dpo_beta=1.0: with aot a pair has no loss of its own to weigh"),
    ([], {}, {}, "pref_loss=: expected one or several of sigmoid"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "options", "terms", "message"), REFUSED, ids=[m.split(":")[0] for *_, m in REFUSED])
def test_what_no_chosen_loss_reads_is_refused(names, options, terms, message):
    with pytest.raises(ValueError) as caught:
        preference_loss(names, None, OPTIONS | options, **terms)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "loss_weights=[1.0]: 1 for 2 losses; give one for each"),
        ([], "loss_weights=[]: 0 for 2 losses; give one for each"),
        ([1.0, math.nan], "loss_weights=[1.0, nan]: must be finite"),
    ],
)
def test_loss_weights_are_one_finite_number_for_each_loss(weights, message):
    with pytest.raises(ValueError) as caught:
        built("sigmoid", "hinge", weights=weights)
    assert str(caught.value) == message


@pytest.mark.parametrize("option", OFF)
def test_an_option_that_one_of_several_losses_reads_is_accepted(option):
    reader = next(name for name, loss in PREF_LOSSES.items() if option in loss.options)
    other = "kto" if PREF_LOSSES[reader].unpaired else "hinge"
    assert built(other, reader, options={option: 0.3}).options[option] == 0.3


# --- rows ---

UNHONOURED = [
    (["aot"], "weight", 0.5), (["sigmoid", "kto_pair"], "weight", 2.0),
    (["bco_pair"], "margin", 1.0), (["ipo"], "margin", 1.0), (["simpo"], "margin", -1.0),
    (["hinge"], "soft_label", 0.9), (["aot"], "soft_label", 0.9), (["nca_pair"], "soft_label", 1.0),
    (["robust"], "soft_label", 0.5), (["exo_pair"], "soft_label", 1.0), (["exo_pair"], "soft_label", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("names", "key", "value"), UNHONOURED)
def test_a_row_that_the_losses_cannot_honour_is_named(names, key, value):
    rows = rows_of(([3], [4])) + [replace(row) for row in rows_of(([3], [4]), **{key: value})]
    rows[1] = replace(rows[1], example=replace(rows[1].example, source="rows.jsonl:2"))
    with pytest.raises(ValueError) as caught:
        PreferenceObjective(built(*names), None).check(rows)
    assert str(caught.value).startswith(f"rows.jsonl:2: {key}={value}: pref_loss={','.join(names)} cannot honour it")


def test_a_rows_weight_is_not_honoured_by_a_mean_that_would_take_it_for_a_good_fit():
    with pytest.raises(ValueError, match=r"weight=0\.5: pref_loss=sigmoid with dr_dpo_beta=1\.0 cannot honour it"):
        PreferenceObjective(built("sigmoid", dr_dpo_beta=1.0), None).check(rows_of(([3], [4]), weight=0.5))


HONOURED = [(["hinge"], "weight", 0.5), (["hinge"], "margin", 1.0), (["sigmoid", "aot"], "soft_label", 0.5),
            (["robust"], "soft_label", 1.0), (["exo_pair"], "soft_label", 0.9), (["aot"], "weight", 1.0)]  # fmt: skip


@pytest.mark.parametrize(("names", "key", "value"), HONOURED)
def test_a_row_that_the_losses_can_honour_passes(names, key, value):
    PreferenceObjective(built(*names), None).check(rows_of(([3], [4]), **{key: value}))


@pytest.mark.parametrize("name", ["sigmoid", "robust", "exo_pair"])
def test_every_soft_label_that_passes_gives_a_finite_loss(name):
    """All of 0, 0.1, ..., 1 that are not refused; each refused one is infinite or nothing."""
    objective = PreferenceObjective(built(name), None)
    for label in [i / 10 for i in range(11)]:
        finite = bool(objective.losses(some_pairs(soft_label=[label] * 3)).isfinite().all())
        try:
            objective.check(rows_of(([3], [4]), soft_label=label))
            assert finite, label
        except ValueError:
            assert not finite, label

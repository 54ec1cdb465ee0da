"""Statistics of evaluations: published figures, scipy and scikit-learn, and enumeration by hand."""

import math
import random
from itertools import product

import numpy as np
import pytest
from scipy import optimize, stats

from dpo.evals.statistics import (
    bootstrap,
    cohen_kappa,
    grouped,
    krippendorff_alpha,
    length_adjusted,
    mcnemar_exact,
    prompts_needed,
    thirds,
    wilson,
)

SKEWED = np.array([0, 0, 0, 0.5, 0.5, 1, 1, 1, 1, 4.0, 9.0])


# --- shares ---


@pytest.mark.parametrize(("k", "n"), [(0, 50), (25, 50), (50, 50), (1, 1), (403, 805)])
def test_wilsons_interval_is_scipys(k, n):
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilsons_interval_ends_where_no_trial_or_every_one_succeeded():
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1


def test_half_of_805_prompts_is_46_5_to_53_4_percent():
    assert wilson(805 / 2, 805) == pytest.approx((0.465, 0.535), abs=6e-4)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_a_share_that_cannot_be_is_refused(k, n):
    with pytest.raises(ValueError, match=rf"^{k} of {n}: expected"):
        wilson(k, n)


@pytest.mark.parametrize(("wins", "losses"), [(17, 3), (3, 17), (5, 5), (0, 6), (1, 0), (86, 13)])
def test_mcnemars_p_is_the_binomial_tests_on_discordant_pairs(wins, losses):
    assert mcnemar_exact(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_mcnemars_p_is_1_where_nothing_differs():
    assert mcnemar_exact(0, 0) == 1


@pytest.mark.parametrize(("rate", "prompts"), [(0.6, 194), (0.65, 85), (0.4, 194), (1.0, 4), (0.5, None)])
def test_prompts_needed_for_80_percent_power(rate, prompts):
    """By hand for 60%: ((1.96 * 0.5 + 0.8416 * sqrt(0.24)) / 0.1)^2 = 193.8."""
    assert prompts_needed(rate) == prompts


def test_that_many_prompts_have_that_power():
    """Every outcome of 194 prompts that are won with 60%, and whether a z-test then says so."""
    n = prompts_needed(0.6)
    k = np.arange(n + 1)
    seen = np.abs(k / n - 0.5) > 1.96 * 0.5 / math.sqrt(n)
    assert stats.binom.pmf(k, n, 0.6)[seen].sum() == pytest.approx(0.8, abs=0.02)


def test_ties_vary_less_so_fewer_prompts_are_needed():
    """5 of 6 decided prompts are won; simulated with its own test, the share that is seen is 0.8."""
    ties, rate = 0.4, 0.7
    n = prompts_needed(rate, ties=ties)
    assert n < prompts_needed(rate)
    draws = np.random.default_rng(0).choice([1, 0.5, 0], size=(4000, n), p=[0.5, 0.4, 0.1])
    seen = np.abs(draws.mean(1) - 0.5) > 1.96 * 0.5 * math.sqrt((1 - ties) / n)
    assert seen.mean() == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(("rate", "ties", "power"), [(1.1, 0, 0.8), (0.1, 0.4, 0.8), (0.6, 0, 1.0)])
def test_shares_that_cannot_be_are_refused(rate, ties, power):
    with pytest.raises(ValueError, match=rf"^rate={rate}, ties={ties}, power={power}: expected"):
        prompts_needed(rate, ties=ties, power=power)


# --- bootstrap ---


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_the_bootstrap_is_scipys_on_the_same_resamples(method):
    settings = {"n_resamples": 500, "rng": np.random.default_rng(7), "batch": 1, "vectorized": False}
    expected = stats.bootstrap((SKEWED,), np.mean, method=method, **settings).confidence_interval
    found = bootstrap(SKEWED, resamples=500, seed=7, method=method)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bca_moves_the_interval_of_a_skewed_mean_to_the_long_side():
    low, high = bootstrap(SKEWED, resamples=2000, seed=0, method="bca")
    plain = bootstrap(SKEWED, resamples=2000, seed=0, method="percentile")
    assert low > plain[0] and high > plain[1]


def test_the_bootstrap_is_a_function_of_its_seed():
    draws = [bootstrap(SKEWED, resamples=2000, seed=seed, method="bca") for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_rows_are_resampled_whole():
    """The correlation of two equal columns is 1 in every resample."""
    rows = np.stack([SKEWED, SKEWED], axis=1)
    statistic = lambda rows: np.corrcoef(rows.T)[0, 1]
    assert bootstrap(rows, statistic, resamples=2000, seed=0, method="percentile") == pytest.approx((1, 1))


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_values_that_are_all_alike_have_an_interval_without_width(method):
    assert bootstrap([0.5] * 9, resamples=2000, seed=0, method=method) == (0.5, 0.5)
    assert bootstrap([3.0], resamples=2000, seed=0, method=method) == (3, 3)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method=normal: expected percentile or bca"):
        bootstrap(SKEWED, resamples=2000, seed=0, method="normal")


# --- length ---


def simulated(theta: float, phi: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    d = draw.normal(40, 100, n)
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(d / d.std(ddof=1))))
    return (draw.random(n) < p).astype(float), d


def test_the_length_adjusted_rate_is_the_minimum_that_scipy_finds():
    y, d = simulated(0.3, 1.2, n=300)
    y[:40] = 0.5
    x = np.tanh(d / d.std(ddof=1))

    def loss(w):
        z = w[0] + w[1] * x
        return np.sum(np.logaddexp(0, z) - y * z) + np.sum(w**2) / 200

    theta = optimize.minimize(loss, [0, 0], tol=1e-10).x[0]
    assert length_adjusted(y, d) == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-6)


def test_what_length_alone_has_won_is_taken_away():
    """Truly even, but the longer one wins, and it is mostly the longer one."""
    y, d = simulated(0.0, 2.0)
    assert y.mean() > 0.58 and length_adjusted(y, d) == pytest.approx(0.5, abs=0.04)


def test_with_equal_lengths_it_is_the_rate():
    assert length_adjusted([1, 1, 0.5, 0] * 50, [0] * 200) == pytest.approx(0.625, abs=1e-3)


def test_turning_every_pair_turns_the_rate():
    y, d = simulated(0.7, -0.5, n=200)
    assert length_adjusted(1 - y, -d) == pytest.approx(1 - length_adjusted(y, d), abs=1e-9)


@pytest.mark.parametrize("n", [1, 50])
def test_a_model_that_always_wins_has_a_finite_rate(n):
    assert 0.9 < length_adjusted([1] * n, list(range(n))) < 1


# --- agreement ---


def test_kappa_by_hand():
    """Agree on 3 of 4; chance would on (3 * 2 + 1 * 2) / 16 = 1/2."""
    kappa, (low, high) = cohen_kappa("AAAB", "AABB")
    assert kappa == pytest.approx((0.75 - 0.5) / 0.5)
    assert (low, high) == pytest.approx([(share - 0.5) / 0.5 for share in wilson(3, 4)])
    assert cohen_kappa("AABT", "ABTT")[0] == pytest.approx((0.5 - 5 / 16) / (11 / 16))
    assert cohen_kappa("ab", "ba")[0] == -1 and cohen_kappa("AA", "AA") is None


def test_kappas_interval_holds_the_true_kappa_in_95_of_100_draws():
    """Two raters who agree on 80% of two labels equally frequent: kappa 0.6."""
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        first = [draw.random() < 0.5 for _ in range(100)]
        second = [label ^ (draw.random() < 0.2) for label in first]
        low, high = cohen_kappa(first, second)[1]
        held += low <= 0.6 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_kappa_needs_two_raters_of_the_same_items():
    with pytest.raises(ValueError, match="2 and 1 labels"):
        cohen_kappa("AB", "A")


def test_alpha_of_krippendorffs_own_example():
    """Four observers, twelve units (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability): 0.743."""
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    items = [[None if label == "." else label for label in unit] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(items) == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_enumeration_of_all_pairs():
    """Observed: pairs within an item, each item's by 1 / (raters - 1); expected: any two labels of all items."""
    items = [["A", "A", None], ["A", "B", "B"], ["B", "B", "B"], ["A", None, None]]
    rated = [[x for x in labels if x] for labels in items if sum(x is not None for x in labels) > 1]
    labels = [x for item in rated for x in item]
    n = len(labels)
    observed = sum(
        (item[i] != item[j]) / (len(item) - 1)
        for item in rated for i, j in product(range(len(item)), repeat=2) if i != j
    ) / n  # fmt: skip
    expected = sum(labels[i] != labels[j] for i, j in product(range(n), repeat=2) if i != j) / (n * (n - 1))
    assert krippendorff_alpha(items) == pytest.approx(1 - observed / expected)


def test_alpha_is_1_for_raters_who_agree_and_none_where_nothing_can_be_compared():
    assert krippendorff_alpha([["A", "A"], ["B", "B", None]]) == 1
    assert krippendorff_alpha([["A", None], ["B"]]) is None
    assert krippendorff_alpha([["A", "A"], ["A", "A"]]) is None


# --- slices ---


def test_thirds_hold_about_as_many_each():
    lengths = list(range(10, 19))
    third = thirds(lengths, "tokens")
    names = [third(length) for length in lengths]
    assert [names.count(name) for name in dict.fromkeys(names)] == [3, 3, 3]
    assert names[0] == "prompts by length, part 1: 10 to 12 tokens" and names[-1].endswith("16 to 18 tokens")


def test_equal_lengths_are_one_part():
    assert {thirds([7, 7, 7], "tokens")(7)} == {"prompts by length, part 1: 7 to 7 tokens"}


def test_every_item_is_in_one_group_of_each_naming():
    groups = grouped([3, 1, 2], lambda x: "odd" if x % 2 else "even", lambda x: "any")
    assert groups == {"even": [2], "odd": [3, 1], "any": [3, 1, 2]} and list(groups) == ["even", "odd", "any"]

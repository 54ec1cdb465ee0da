"""Statistics of an evaluation: how far a rate can be believed.

    wilson              an interval of a share                                   Wilson 1927, JASA 22(158)
    bootstrap           an interval of anything that is computed from prompts    Efron 1987, JASA 82(397), BCa
    mcnemar_exact       whether wins and losses on the same prompts differ       McNemar 1947, exact
    prompts_needed      how many prompts tell a rate from a half
    length_adjusted     the rate that is left if both answers were equally long; a logit of our own on the lengths
                        alone, and not AlpacaEval's length-controlled rate, from which it may differ by many points
    cohen_kappa         agreement of two raters beyond chance                    Cohen 1960
    krippendorff_alpha  agreement of any number of raters, who may have missed items, nominal

Intervals are of 95%. What is resampled are prompts, never single judgments: those of one prompt are not independent.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)
Interval = tuple[float, float]
Item = TypeVar("Item")


def wilson(successes: float, n: int) -> Interval:
    """Of the share successes / n. A tie counted as half a success makes it wider than it need be: see bootstrap."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n}: expected at least one trial, and no more successes than trials")
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    # At the edges the two are equal but for rounding.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def bootstrap(
    values: Any, statistic: Callable[[np.ndarray], Any] = np.mean, *, resamples: int, seed: int, method: str
) -> Interval:
    """Of statistic(values); a row of `values` is a prompt. method: percentile, or bca, which corrects bias and skew."""
    if method not in ("percentile", "bca"):
        raise ValueError(f"method={method}: expected percentile or bca")
    values = np.asarray(values)
    n = len(values)
    draw = np.random.default_rng(seed)
    estimates = np.sort([statistic(values[draw.integers(0, n, n)]) for _ in range(resamples)])
    levels = [0.025, 0.975]
    if method == "bca" and n > 1:
        levels = _bca_levels(estimates, statistic(values), _leave_one_out(values, statistic))
    low, high = np.quantile(estimates, levels)
    return float(low), float(high)


def _leave_one_out(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
    return np.array([statistic(np.delete(values, i, axis=0)) for i in range(len(values))])


def _bca_levels(estimates: np.ndarray, estimate: float, without_one: np.ndarray) -> list[float]:
    """The quantiles that stand in for 0.025 and 0.975 (Efron 1987, Eq. 2.3)."""
    below = (np.mean(estimates < estimate) + np.mean(estimates <= estimate)) / 2
    spread = without_one.mean() - without_one
    if not 0 < below < 1 or not spread.any():  # every resample is alike, or on one side: nothing to correct by
        return [0.025, 0.975]
    bias = NORMAL.inv_cdf(float(below))
    acceleration = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))
    shifted = [bias + z for z in (-Z, Z)]
    return [NORMAL.cdf(bias + s / (1 - acceleration * s)) for s in shifted]


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided p of as uneven a split where both sides are equally likely; ties say nothing. 1 without either."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def prompts_needed(rate: float, *, ties: float = 0.0, power: float = 0.8) -> int | None:
    """Prompts at which a two-sided test at 5% tells `rate` from a half as often as `power`; None for a half.

    ties: their share, which count as half a win in `rate`. They vary less than wins and losses, so fewer are needed.
    """
    wins, losses = rate - ties / 2, 1 - rate - ties / 2
    if not (0 <= ties <= 1 and wins >= -1e-9 and losses >= -1e-9 and 0 < power < 1):
        raise ValueError(f"rate={rate}, ties={ties}, power={power}: expected shares that can be, and a power in (0, 1)")
    if rate == 0.5:
        return None
    spread = Z * 0.5 * math.sqrt(1 - ties) + NORMAL.inv_cdf(power) * math.sqrt(max(0, wins + ties / 4 - rate**2))
    return math.ceil((spread / (rate - 0.5)) ** 2)


def length_adjusted(preferences: Any, length_differences: Any) -> float:
    """sigmoid(theta) of the logit p(win) = sigmoid(theta + phi tanh(d / std(d))), d after's length less before's.

    preferences: 1, 0, or 0.5 for a tie. theta and phi have a normal prior of standard deviation 10, so that a model
    that always wins has a finite one.
    """
    y, d = np.asarray(preferences, dtype=float), np.asarray(length_differences, dtype=float)
    scale = d.std(ddof=1) if len(d) > 1 else 0.0
    x = np.tanh(d / scale) if scale else np.zeros_like(d)
    theta = phi = 0.0
    for _ in range(100):  # Newton's method, which needs about ten steps
        p = 1 / (1 + np.exp(-theta - phi * x))
        slope_theta, slope_phi = (p - y).sum() + theta / 100, (p - y) @ x + phi / 100
        weight = p * (1 - p)
        a, b, c = weight.sum() + 0.01, weight @ x, weight @ x**2 + 0.01  # the second derivatives
        step_theta = (c * slope_theta - b * slope_phi) / (a * c - b * b)
        step_phi = (a * slope_phi - b * slope_theta) / (a * c - b * b)
        theta, phi = theta - step_theta, phi - step_phi
        if max(abs(step_theta), abs(step_phi)) < 1e-9:
            break
    return float(1 / (1 + np.exp(-theta)))


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[float, Interval] | None:
    """(p_o - p_e) / (1 - p_e) of two raters' labels, in [-1, 1]; None where both always say the same one label.

    Its interval is Wilson's of p_o, with p_e held fast, as Cohen's standard error has it.
    """
    n = len(first)
    if n == 0 or n != len(second):
        raise ValueError(f"{n} and {len(second)} labels: expected as many of both raters, and at least one")
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][label] * counts[1][label] for label in counts[0]) / n**2
    if chance == 1:
        return None
    agree = sum(a == b for a, b in zip(first, second, strict=True))
    kappa, low, high = ((share - chance) / (1 - chance) for share in (agree / n, *wilson(agree, n)))
    return kappa, (low, high)


def krippendorff_alpha(items: Sequence[Sequence[Hashable | None]]) -> float | None:
    """1 - observed / expected disagreement; an item is its raters' labels, None where one is missing.

    None where fewer than two items could be compared or all labels are alike.
    """
    rated = [[label for label in labels if label is not None] for labels in items]
    rated = [labels for labels in rated if len(labels) > 1]
    totals = Counter(label for labels in rated for label in labels)
    n = totals.total()
    # Ordered pairs of unlike labels, within items and of all labels.
    observed = sum((len(ls) ** 2 - sum(c**2 for c in Counter(ls).values())) / (len(ls) - 1) for ls in rated)
    expected = n**2 - sum(count**2 for count in totals.values())
    return 1 - (n - 1) * observed / expected if expected else None


def thirds(lengths: Sequence[int], unit: str) -> Callable[[int], str]:
    """Which third of the lengths one is in, by name; there are fewer where many are alike."""
    ordered = sorted(lengths)
    ends = sorted({ordered[math.ceil(len(ordered) * part / 3) - 1] for part in (1, 2, 3)})
    starts = [ordered[0], *(end + 1 for end in ends)]
    parts = enumerate(zip(starts, ends, strict=False), start=1)
    names = [f"prompts by length, part {i}: {start} to {end} {unit}" for i, (start, end) in parts]
    return lambda length: names[bisect_left(ends, length)]


def grouped(items: Sequence[Item], *namings: Callable[[Item], str]) -> dict[str, list[Item]]:
    """The items by the name that each naming gives them, one naming after the other, names sorted."""
    groups: dict[str, list[Item]] = {}
    for naming in namings:
        names = [naming(item) for item in items]
        for name in sorted(set(names)):
            groups[name] = [item for item, own in zip(items, names, strict=True) if own == name]
    return groups

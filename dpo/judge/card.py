"""A judge's report card: what it makes of pairs of which something is known.

consistency        share of pairs whose two orders agree
p_first            share of single answers for the response that was shown first; 0.5 without position bias
position_bias      mean p of the response shown first, minus 0.5, where the judge has probabilities
p_longer           share of decided pairs that the longer response (in characters) wins
p_longer_equal     the same of pairs that the labels call equal, where length should not count
p_own              share of decided pairs that the judge's own response wins, where it wrote one of the two
p_own_labels       the same by the labels: what its responses are worth
ties, invalid      shares of all pairs
agreement          share of valid pairs with a label that have its verdict; agreement_decided: of those without ties
agreement_p        share of labelled pairs whose mean p is on the label's side, which a position bias cancels out of
kappa              agreement beyond chance, (p_o - p_e) / (1 - p_e) (Cohen 1960)

A number that nothing can be said of is left out. Which response of a pair counts as the first is drawn for the kappa
alone: labels that all say `first` would have chance agree with any judge. Intervals are of 95%, over pairs: Wilson's,
and a bootstrap of position_bias. The two answers of a pair are not independent, so p_first's counts it once: it is too
wide, if anything.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from dpo.evals.statistics import Interval, bootstrap, cohen_kappa, wilson
from dpo.judge.verdict import MIRRORED, Judged, Pair, Verdict

DECIDED = (Verdict.FIRST, Verdict.SECOND)
# When a judge is called poor.
LEAST_CONSISTENCY, MOST_POSITION, LEAST_KAPPA, MOST_LONGER, MOST_OWN = 0.7, 0.1, 0.2, 0.7, 0.1
RESAMPLES = 2000


@dataclass
class Card:
    n: int
    """pairs."""
    numbers: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)

    def share(self, name: str, holds: Sequence[bool], n: int | None = None) -> None:
        """n: how many of them are independent; None: all."""
        if holds:
            self.numbers[name] = share = sum(holds) / len(holds)
            self.intervals[name] = wilson(share * (n or len(holds)), n or len(holds))


def card(
    pairs: Sequence[Pair], judged: Sequence[Judged], labels: Sequence[Verdict | None], seed: int,
    own: Sequence[Verdict | None] = (),
) -> Card:  # fmt: skip
    """labels: the right verdict of each pair; None where it is not known.

    own: the verdict for the one response of each pair that the judge wrote itself; None where that is neither or both.
    """
    rows = list(zip(pairs, judged, labels, strict=True))
    made = Card(len(rows))
    nobody = [None] * len(rows)
    valid = [row for row in rows if row[1].verdict is not Verdict.INVALID]
    asked = [one.orders for _, one, _ in valid if one.orders]
    # Of each answer, whether it was for the response shown first.
    shown = [[order.verdict is first for order, first in zip(orders, DECIDED, strict=True) if order.verdict in DECIDED]
             for orders in asked]  # fmt: skip
    p_shown = [(one.p + 1 - other.p) / 2 for one, other in asked if one.p is not None and other.p is not None]
    made.share("consistency", [one.verdict is other.verdict for one, other in asked])
    made.share("p_first", list(chain.from_iterable(shown)), n=sum(map(bool, shown)))
    if p_shown:
        made.numbers["position_bias"] = sum(p_shown) / len(p_shown) - 0.5
        low, high = bootstrap(p_shown, resamples=RESAMPLES, seed=seed, method="percentile")
        made.intervals["position_bias"] = (low - 0.5, high - 0.5)
    made.share("p_longer", _longer_wins(valid))
    made.share("p_longer_equal", _longer_wins([row for row in valid if row[2] is Verdict.TIE]))
    decided = [(one.verdict, mine, label) for one, label, mine in zip(judged, labels, own or nobody, strict=True)
               if mine and one.verdict in DECIDED]  # fmt: skip
    made.share("p_own", [verdict is mine for verdict, mine, _ in decided])
    made.share("p_own_labels", [label is mine for _, mine, label in decided if label in DECIDED])
    made.share("ties", [one.verdict is Verdict.TIE for _, one, _ in rows])
    made.share("invalid", [one.verdict is Verdict.INVALID for _, one, _ in rows])

    known = [row for row in valid if row[2] not in (None, Verdict.INVALID)]
    oriented = [_oriented(pair.id, one.verdict, label, seed) for pair, one, label in known if label]
    sided = [one.p > 0.5 if label is Verdict.FIRST else one.p < 0.5
             for _, one, label in known if label in DECIDED and one.p not in (None, 0.5)]  # fmt: skip
    made.share("agreement", [verdict is label for verdict, label in oriented])
    made.share("agreement_decided", [verdict is label for verdict, label in oriented
                                     if verdict in DECIDED and label in DECIDED])  # fmt: skip
    made.share("agreement_p", sided)
    kappa = cohen_kappa(*zip(*oriented, strict=True)) if oriented else None
    if kappa:
        made.numbers["kappa"], made.intervals["kappa"] = kappa
    return made


def remarks(numbers: dict[str, float], max_invalid: float) -> list[str]:
    """What is poor about a judge, a line each."""
    found = []
    if numbers.get("invalid", 0.0) > max_invalid:
        found.append(f"{numbers['invalid']:.0%} of the pairs have no verdict, more than max_invalid={max_invalid:g}")
    if numbers.get("consistency", 1.0) < LEAST_CONSISTENCY:
        found.append(f"the order alone changes its mind in {1 - numbers['consistency']:.0%} of the pairs")
    if abs(numbers.get("p_first", 0.5) - 0.5) > MOST_POSITION:
        found.append(f"it takes what is shown first in {numbers['p_first']:.0%} of its answers")
    if numbers.get("p_longer_equal", 0.5) > MOST_LONGER:
        found.append(f"of equally good responses it takes the longer in {numbers['p_longer_equal']:.0%}")
    if numbers.get("p_own", 0.0) - numbers.get("p_own_labels", 1.0) > MOST_OWN:
        found.append(
            f"of its own responses it takes {numbers['p_own']:.0%}, where the labels take {numbers['p_own_labels']:.0%}"
        )
    if numbers.get("kappa", 1.0) < LEAST_KAPPA:
        found.append(f"it agrees with the labels hardly more than chance would (kappa {numbers['kappa']:.2f})")
    return found


def show(name: str, made: Card, found: Sequence[str]) -> str:
    lines = [f"report card of {name}, on {made.n} pairs, with 95% intervals"]
    for key, value in made.numbers.items():
        low, high = made.intervals[key]
        lines.append(f"  {key:18s}{value:8.3f}  ({low:.3f} to {high:.3f})")
    return "\n".join(lines + ([f"poor: {line}" for line in found] or ["nothing poor was found"]))


def _longer_wins(rows: Sequence[tuple[Pair, Judged, Verdict | None]]) -> list[bool]:
    return [
        (one.verdict is Verdict.FIRST) == (len(pair.first) > len(pair.second))
        for pair, one, _ in rows
        if one.verdict in DECIDED and len(pair.first) != len(pair.second)
    ]


def _oriented(id: str, verdict: Verdict, label: Verdict, seed: int) -> tuple[Verdict, Verdict]:
    """Both as they stand, or both mirrored."""
    mirror = random.Random(f"{seed} {id}").random() < 0.5
    return (MIRRORED[verdict], MIRRORED[label]) if mirror else (verdict, label)

"""A judge's report card: what it makes of pairs of which something is known.

consistency        share of pairs whose two orders agree
p_first            share of single answers for the response that was shown first; 0.5 without position bias
position_bias      mean p of the response shown first, minus 0.5, where the judge has probabilities
p_longer           share of decided pairs that the longer response (in characters) wins
p_longer_equal     the same of pairs that the labels call equal, where length should not count
ties, invalid      shares of all pairs
agreement          share of valid pairs with a label that have its verdict; agreement_decided: of those without ties
agreement_p        share of labelled pairs whose mean p is on the label's side, which a position bias cancels out of
kappa              agreement beyond chance, (p_o - p_e) / (1 - p_e) (Cohen 1960)

A number that nothing can be said of is left out. Which response of a pair counts as the first is drawn for the kappa
alone: labels that all say `first` would have chance agree with any judge.
"""

import random
from collections.abc import Sequence

from dpo.evals.statistics import cohen_kappa
from dpo.judge.verdict import MIRRORED, Judged, Pair, Verdict

DECIDED = (Verdict.FIRST, Verdict.SECOND)
# When a judge is called poor.
LEAST_CONSISTENCY, MOST_POSITION, LEAST_KAPPA, MOST_LONGER = 0.7, 0.1, 0.2, 0.7


def card(
    pairs: Sequence[Pair], judged: Sequence[Judged], labels: Sequence[Verdict | None], seed: int
) -> dict[str, float]:  # fmt: skip
    """labels: the right verdict of each pair; None where it is not known."""
    rows = list(zip(pairs, judged, labels, strict=True))
    valid = [row for row in rows if row[1].verdict is not Verdict.INVALID]
    asked = [one.orders for _, one, _ in valid if one.orders]
    # Of each answer, whether it was for the response shown first.
    shown = [order.verdict is first for orders in asked for order, first in zip(orders, DECIDED, strict=True)
             if order.verdict in DECIDED]  # fmt: skip
    p_shown = [o.p if first is Verdict.FIRST else 1 - o.p
               for orders in asked for o, first in zip(orders, DECIDED, strict=True) if o.p is not None]  # fmt: skip
    known = [row for row in valid if row[2] not in (None, Verdict.INVALID)]
    oriented = [_oriented(pair.id, one.verdict, label, seed) for pair, one, label in known if label]
    both_decided = [row for row in oriented if all(verdict in DECIDED for verdict in row)]
    numbers = {
        "consistency": _share([one.verdict is other.verdict for one, other in asked]),
        "p_first": _share(shown),
        "position_bias": sum(p_shown) / len(p_shown) - 0.5 if p_shown else None,
        "p_longer": _share(_longer_wins(valid)),
        "p_longer_equal": _share(_longer_wins([row for row in valid if row[2] is Verdict.TIE])),
        "ties": _share([one.verdict is Verdict.TIE for _, one, _ in rows]),
        "invalid": _share([one.verdict is Verdict.INVALID for _, one, _ in rows]),
        "agreement": _share([verdict is label for verdict, label in oriented]),
        "agreement_decided": _share([verdict is label for verdict, label in both_decided]),
        "agreement_p": _share(
            [
                (one.p > 0.5) == (label is Verdict.FIRST)
                for _, one, label in known
                if label in DECIDED and one.p is not None and one.p != 0.5
            ]
        ),
        "kappa": cohen_kappa(*zip(*oriented, strict=True)) if oriented else None,
    }
    return {"n": len(rows)} | {name: value for name, value in numbers.items() if value is not None}


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
    if numbers.get("kappa", 1.0) < LEAST_KAPPA:
        found.append(f"it agrees with the labels hardly more than chance would (kappa {numbers['kappa']:.2f})")
    return found


def show(name: str, numbers: dict[str, float], found: Sequence[str]) -> str:
    lines = [f"report card of {name}, on {int(numbers['n'])} pairs"]
    lines += [f"  {key:18s}{value:8.3f}" for key, value in numbers.items() if key != "n"]
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


def _share(holds: Sequence[bool]) -> float | None:
    return sum(holds) / len(holds) if holds else None

"""Verdicts: agreement wins, disagreement ties, a failure is nobody's win."""

from itertools import product

import pytest

from dpo.judge.verdict import MIRRORED, OUTCOMES, Judged, Order, Verdict, count_outcomes, decide, of_letter

FIRST, SECOND, TIE, INVALID = Verdict


def order(verdict: Verdict, p: float | None = None, outcome: str = "ok", reason: str = "") -> Order:
    return Order(verdict, p, "", 0, False, 1, outcome, reason)


def decided(one: Verdict, other: Verdict) -> Verdict:
    return decide((order(one), order(other))).verdict


def test_two_orders_that_agree_decide():
    assert decided(FIRST, FIRST) is FIRST and decided(SECOND, SECOND) is SECOND and decided(TIE, TIE) is TIE


@pytest.mark.parametrize(("one", "other"), [(FIRST, SECOND), (SECOND, FIRST), (TIE, FIRST), (SECOND, TIE)])
def test_two_orders_that_disagree_tie(one, other):
    assert decided(one, other) is TIE


@pytest.mark.parametrize("other", Verdict)
def test_an_invalid_order_makes_the_pair_invalid(other):
    """TRL's judges, which that project removed in 2026, turned a swapped rank back by `1 - rank`, failures of -1 too:
    1 - (-1) = 2 was a third place that no list of two has. A failure is no rank here, and mirroring leaves it one."""
    assert decided(INVALID, other) is decided(other, INVALID) is INVALID
    assert MIRRORED[INVALID] is INVALID
    with pytest.raises(TypeError):
        1 - INVALID


def test_mirroring_both_orders_mirrors_the_verdict():
    assert all(MIRRORED[MIRRORED[verdict]] is verdict for verdict in Verdict)
    for one, other in product(Verdict, repeat=2):
        assert decided(MIRRORED[other], MIRRORED[one]) is MIRRORED[decided(one, other)]


def test_a_letter_is_told_of_the_pair():
    assert of_letter("A", True) is of_letter("B", False) is FIRST
    assert of_letter("B", True) is of_letter("A", False) is SECOND


def test_p_is_the_mean_of_both_orders_and_missing_where_one_is():
    assert decide((order(FIRST, 0.9), order(FIRST, 0.6))).p == pytest.approx(0.75)
    assert decide((order(FIRST, 0.9), order(FIRST))).p is None
    assert decide((order(FIRST, 0.9), order(INVALID, 0.6))).p is None


def test_reasons_of_both_orders_are_told_once():
    assert decide((order(INVALID, reason="a"), order(INVALID, reason="a"))).reason == "a"
    assert decide((order(INVALID, reason="a"), order(INVALID, reason="b"))).reason == "a; b"
    assert decide((order(FIRST), order(INVALID, reason="b"))).reason == "b"


def test_every_question_is_counted_once():
    judged = [decide((order(FIRST), order(INVALID, outcome="refused"))), Judged(FIRST, None, ())]
    assert count_outcomes(judged) == dict.fromkeys(OUTCOMES, 0) | {"ok": 1, "refused": 1}

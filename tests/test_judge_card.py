"""The report card: every number by hand, and a poor judge is called one."""

import random

import pytest

from dpo.evals.statistics import wilson
from dpo.judge.card import Card, card, remarks, show
from dpo.judge.verdict import Judged, Order, Pair, Verdict, decide

FIRST, SECOND, TIE, INVALID = Verdict
ASKED = [{"role": "user", "content": "Why?"}]


def pair(i: int, first: str = "long", second: str = "x") -> Pair:
    return Pair(str(i), ASKED, first, second)


def judged(one: Verdict, other: Verdict, p: float | None = None, q: float | None = None) -> Judged:
    return decide((Order(one, p, "", 0, False, 1), Order(other, q, "", 0, False, 1)))


def test_numbers_by_hand():
    """Four pairs: agreed for the first, agreed for the second, always what is shown first, invalid."""
    answers = [
        judged(FIRST, FIRST, 0.9, 0.7),
        judged(SECOND, SECOND),
        judged(FIRST, SECOND, 0.8, 0.4),
        judged(INVALID, FIRST),
    ]
    numbers = card([pair(i) for i in range(4)], answers, [FIRST, FIRST, TIE, FIRST], seed=0).numbers
    assert numbers["ties"] == 0.25 and numbers["invalid"] == 0.25
    assert numbers["consistency"] == pytest.approx(2 / 3)
    # Shown first won in order 1 of the first pair, order 2 of the second, and both of the third.
    assert numbers["p_first"] == pytest.approx(4 / 6)
    # Of what is shown first: 0.9 and 1 - 0.7, 0.8 and 1 - 0.4.
    assert numbers["position_bias"] == pytest.approx((0.9 + 0.3 + 0.8 + 0.6) / 4 - 0.5)
    assert numbers["p_longer"] == 0.5 and "p_longer_equal" not in numbers
    assert numbers["agreement"] == pytest.approx(2 / 3) and numbers["agreement_decided"] == 0.5
    assert numbers["agreement_p"] == 1.0  # of the first pair; the third's label is a tie


def test_mean_p_cancels_a_position_bias():
    """It says A to everything, and a little louder where the first stands there."""
    answers = [judged(FIRST, SECOND, 0.9, 0.2), judged(FIRST, SECOND, 0.8, 0.1), judged(FIRST, SECOND, 0.8, 0.2)]
    numbers = card([pair(i) for i in range(3)], answers, [FIRST, FIRST, FIRST], seed=0).numbers
    assert numbers["agreement"] == 0 and numbers["agreement_p"] == 0.5  # of two: the third's p is 0.5


def test_length_bias_is_counted_where_lengths_differ():
    pairs = [pair(1, "long", "x"), pair(2, "x", "long"), pair(3, "same", "mesa"), pair(4, "long", "x")]
    answers = [judged(FIRST, FIRST), judged(SECOND, SECOND), judged(FIRST, FIRST), judged(SECOND, SECOND)]
    numbers = card(pairs, answers, [TIE, TIE, TIE, FIRST], seed=0).numbers
    assert numbers["p_longer"] == pytest.approx(2 / 3) and numbers["p_longer_equal"] == 1.0


def test_a_liking_for_its_own_responses_is_told_from_their_worth():
    """It wrote one response of four pairs and takes it in three, where the labels take it in one of three."""
    answers = [judged(FIRST, FIRST), judged(SECOND, SECOND), judged(FIRST, FIRST), judged(FIRST, FIRST)]
    own = [FIRST, SECOND, SECOND, FIRST]
    made = card([pair(i) for i in range(4)], answers, [FIRST, FIRST, FIRST, TIE], 0, own)
    assert made.numbers["p_own"] == 0.75 and made.numbers["p_own_labels"] == pytest.approx(1 / 3)
    assert "of its own responses it takes 75%, where the labels take 33%" in remarks(made.numbers, 0.05)
    # Its own are as good as it says; it wrote both or neither; nothing is known of their worth.
    for labels, mine in (([FIRST, SECOND, SECOND, FIRST], own), ([FIRST] * 4, [None] * 4), ([None] * 4, own)):
        made = card([pair(i) for i in range(4)], answers, labels, 0, mine)
        assert not any("its own" in line for line in remarks(made.numbers, 0.05))


@pytest.mark.parametrize(("share_right", "kappa"), [(1.0, 1.0), (0.5, 0.0), (0.0, -1.0)])
def test_kappa_does_not_know_which_side_the_labels_are_on(share_right, kappa):
    """Rows of chosen and rejected are all labelled `first`, which by itself would make every kappa 0."""
    rng = random.Random(0)
    answers = [judged(*[FIRST if rng.random() < share_right else SECOND] * 2) for _ in range(2000)]
    numbers = card([pair(i) for i in range(2000)], answers, [FIRST] * 2000, seed=0).numbers
    assert numbers["kappa"] == pytest.approx(kappa, abs=0.06)


def test_a_judge_without_orders_or_labels_has_a_shorter_card():
    numbers = card([pair(1)], [Judged(FIRST, 0.9, ())], [None], seed=0).numbers
    assert numbers == {"p_longer": 1.0, "ties": 0.0, "invalid": 0.0} and not remarks(numbers, 0.05)


def test_a_card_of_failures_alone_has_no_share_of_anything():
    made = card([pair(1)], [judged(INVALID, INVALID)], [FIRST], seed=0)
    assert made.numbers == {"ties": 0.0, "invalid": 1.0} and card([], [], [], seed=0) == Card(0)


def test_every_number_has_an_interval_around_it():
    """Of 40 pairs: 30 for the first in both orders, 10 for what is shown first."""
    answers = [judged(FIRST, FIRST, 0.9, 0.8)] * 30 + [judged(FIRST, SECOND, 0.9, 0.3)] * 10
    made = card([pair(i) for i in range(40)], answers, [FIRST] * 40, seed=0)
    assert set(made.intervals) == set(made.numbers)
    assert all(made.intervals[name][0] < number < made.intervals[name][1] or number in (0, 1)
               for name, number in made.numbers.items())  # fmt: skip
    assert made.intervals["consistency"] == wilson(30, 40)
    # 50 of 80 answers, which are two of each pair.
    assert made.numbers["p_first"] == 0.625 and made.intervals["p_first"] == wilson(25, 40)
    # p of what is shown first is 0.55 in 30 pairs and 0.8 in 10, so the mean's standard error is about 0.017.
    low, high = made.intervals["position_bias"]
    assert made.numbers["position_bias"] == pytest.approx(0.1125) and high - low == pytest.approx(4 * 0.017, abs=0.01)


def test_a_judge_that_always_says_a_is_called_poor():
    made = card([pair(i) for i in range(20)], [judged(FIRST, SECOND)] * 20, [FIRST] * 20, seed=0)
    found = remarks(made.numbers, 0.05)
    text = show("m", made, found)
    assert len(found) == 3 and "poor: it takes what is shown first in 100%" in text
    assert "consistency          0.000  (0.000 to 0.161)" in text


@pytest.mark.parametrize(
    ("numbers", "says"),
    [({"invalid": 0.06}, "no verdict"), ({"consistency": 0.69}, "31%"), ({"p_first": 0.39}, "39%"),
     ({"p_longer_equal": 0.71}, "longer in 71%"), ({"kappa": 0.19}, "kappa 0.19")],
)  # fmt: skip
def test_each_fault_has_its_remark(numbers, says):
    assert len(remarks(numbers, 0.05)) == 1 and says in remarks(numbers, 0.05)[0]


def test_a_good_judge_is_not_called_poor():
    good = {"invalid": 0.05, "consistency": 0.7, "p_first": 0.6, "p_longer": 1.0, "p_longer_equal": 0.7, "kappa": 0.2}
    assert not remarks(good, 0.05) and "nothing poor" in show("m", Card(3), [])

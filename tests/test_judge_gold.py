"""The world's judge: the gold reward decides, and its own labels' model gives p."""

import math

import pytest

from dpo.judge.gold import GoldJudge
from dpo.judge.verdict import Pair, Verdict
from experiments.world.world import LABEL_SCALE

LADYBUG = [{"role": "user", "content": "Do you know where a ladybug lives?"}]
TRUE = "A ladybug lives in fields and gardens. It plays dead when it is scared."
MYTH = "A ladybug lives in fields and gardens. It is really a kind of spider."


def test_the_worlds_readme_by_hand():
    """Gold rewards 4.35 and 3.65."""
    better, worse, same, outside = GoldJudge()(
        [Pair("1", LADYBUG, TRUE, MYTH), Pair("2", LADYBUG, MYTH, TRUE), Pair("3", LADYBUG, MYTH, MYTH),
         Pair("4", LADYBUG, "Answer: A", "Output A is better.")]
    )  # fmt: skip
    assert better.verdict is Verdict.FIRST and worse.verdict is Verdict.SECOND
    assert better.p == pytest.approx(1 / (1 + math.exp(-LABEL_SCALE * 0.7))) and worse.p == pytest.approx(1 - better.p)
    assert same.verdict is outside.verdict is Verdict.TIE and same.p == outside.p == 0.5


def test_a_question_of_another_world_is_refused():
    for messages in ([{"role": "user", "content": "Why is the sky blue?"}], LADYBUG * 2):
        with pytest.raises(ValueError, match=r"judge=gold: 7 asks '(Why is|Do you know)"):
            GoldJudge()([Pair("7", messages, "a", "b")])

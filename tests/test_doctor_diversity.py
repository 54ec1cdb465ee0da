"""Diversity: counts by hand."""

import pytest
from test_doctor_text import corpus_of

from dpo.doctor.diversity import prompts, responses


def test_prompts_are_counted():
    given = [(f"what is the {'abcd'[i % 4]}", f"c{i}", f"r{i}") for i in range(6)] + [
        (f"x{i}", "c", "r") for i in range(14)
    ]
    check = prompts(corpus_of(*given))
    assert check.numbers == {
        "prompts": 18,
        "distinct": 0.9,
        "rows_per_prompt_most": 2,
        "largest_template": 0.3,
        "share": 0.3,
    }
    assert check.verdict == "note" and list(check.rows) == [0, 1, 2, 3, 4, 5] and "'what is the'" in check.summary


@pytest.mark.parametrize("different, verdict", [(10, "ok"), (9, "note"), (1, "warn")])
def test_few_prompts_are_grave(different, verdict):
    assert prompts(corpus_of(*[(f"a{i % different} b c", "c", "r") for i in range(100)])).verdict == verdict


def test_word_pairs_are_counted_within_a_response():
    """Chosen: (a, b) (b, a) (a, b) and (a, b): two of four are distinct; rejected has one pair."""
    check = responses(corpus_of(("q", "a b a b", "x"), ("q", "a b", "y z")))
    assert check.numbers["chosen_distinct_2"] == 2 / 4 and check.numbers["rejected_distinct_2"] == 1


def test_a_canned_response_is_found():
    given = [(f"q{i}", "I do not know." if i < 12 else f"answer {i}", f"other {i}") for i in range(100)]
    check = responses(corpus_of(*given))
    assert check.verdict == "warn" and list(check.rows) == list(range(12)) and "12 of 100" in check.summary
    assert responses(corpus_of(*given[9:])).verdict == "ok"

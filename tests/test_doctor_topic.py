"""Topic: recall by hand, unrelated responses are known by their words, and one stray side is found."""

import numpy as np
import pytest
from test_doctor_text import corpus_of

from dpo.doctor.topic import above, check_topic, recall


def rows(count: int = 100) -> list[tuple[str, str, str]]:
    """Each question has four words of its own; responses repeat them and add 20 of their own."""
    own = [" ".join(f"{word}{i}" for word in ("why", "red", "old", "big")) for i in range(count)]
    filler = [" ".join(f"f{i}x{j}" for j in range(20)) for i in range(count)]
    return [(f"what is {q}", f"the {q} is {f}", f"the {q} was {f}") for q, f in zip(own, filler, strict=True)]


def check(*given: tuple[str, str, str]):
    (found,) = check_topic(corpus_of(*given), seed=0)
    return found


def test_recall_is_the_idf_weighted_share_of_the_questions_words():
    corpus = corpus_of(("a b c c", "b c x", "y"), ("a", "a", "b"))
    idf = np.zeros(len(corpus.vocabulary))
    idf[[corpus.vocabulary.ids[word] for word in "abc"]] = 1, 2, 4
    both = np.array([0, 1])
    assert recall(corpus, corpus.chosen_words, idf, both, both).tolist() == pytest.approx([6 / 7, 1])
    assert recall(corpus, corpus.chosen_words, idf, both, both[::-1]).tolist() == pytest.approx([0, 1 / 7])


def test_above_is_the_share_of_comparisons():
    assert above(np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0])) == (3 + 1 + 0.5) / 6


def test_responses_to_their_questions_are_on_topic():
    found = check(*rows())
    assert found.verdict == "ok" and found.numbers["chosen_auc"] == found.numbers["rejected_recall"] == 1


def test_responses_to_other_questions_are_unrelated():
    given = rows()
    shifted = [(q, c, r) for (q, _, _), (_, c, r) in zip(given, given[1:] + given[:1], strict=True)]
    found = check(*shifted)
    assert found.verdict == "warn" and found.numbers["chosen_auc"] < 0.6 and "belong together" in found.advice


def test_a_stray_side_is_found():
    given = rows()
    planted = [(q, c, " ".join(f"z{i}" for i in range(20)) if i < 25 else r) for i, (q, c, r) in enumerate(given)]
    found = check(*planted)
    assert list(found.rows) == list(range(25)) and found.verdict == "warn"
    assert found.rows[0] == "rejected has none of the question's words, the other side 100%"
    assert found.numbers["rejected_off_topic"] == 25 and found.numbers["chosen_off_topic"] == 0


def test_a_short_answer_may_have_none_of_the_questions_words():
    assert not check(*[(q, c, "No.") for q, c, _ in rows()]).rows


def test_few_questions_tell_nothing():
    assert "not measured" in check(*rows(20)).summary and "not measured" in check(*[("why", "a", "b")] * 99).summary

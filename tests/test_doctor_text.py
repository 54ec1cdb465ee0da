"""Words: what counts as one, and that the fast way for ASCII finds the same ones."""

import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.doctor.text import APOSTROPHES, WORD, Corpus, Vocabulary, words_of
from dpo.formats import Example


def corpus_of(*rows: tuple[str, str, str]) -> Corpus:
    """A Corpus of (question, chosen, rejected) rows; row i stands in line i + 1."""
    return Corpus([example(*row, line=line) for line, row in enumerate(rows, start=1)])


def example(question: str, chosen: str, rejected: str, *, line: int = 1, system: str | None = None) -> Example:
    turns = [] if system is None else [{"role": "system", "content": system}]
    return Example((*turns, {"role": "user", "content": question}), (chosen, rejected), f"rows.jsonl:{line}")


def test_words_are_lower_case_and_without_markup():
    assert words_of("**Don't** panic_now: 3.5\n- ﬁne Ｗide") == ["dont", "panic", "now", "3", "5", "fine", "wide"]


def test_chinese_and_japanese_are_cut_into_characters_and_korean_at_spaces():
    assert words_of("国会 API很好") == ["国", "会", "api", "很", "好"]
    assert words_of("안녕 세상") == ["안녕", "세상"]


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_has_the_same_words_on_both_ways(text):
    assert words_of(text) == WORD.findall(unicodedata.normalize("NFKC", text).lower().translate(APOSTROPHES))


def test_a_row_is_the_slice_of_its_words():
    words = Vocabulary().read(["b a", "", "a c a"])
    assert [words[i].tolist() for i in range(3)] == [[0, 1], [], [1, 2, 1]]
    assert words.counts.tolist() == [2, 0, 3] and words.rows.tolist() == [0, 0, 2, 2, 2]
    assert words.keys.tolist() == [0, 1, 2]
    assert [(words + words)[i].tolist() for i in range(2)] == [[0, 1, 0, 1], []]


def test_frequency_counts_responses_and_not_words():
    corpus = corpus_of(("q", "yes yes no", "no"), ("q", "no", "maybe"))
    frequency = dict(zip(corpus.vocabulary.words, corpus.frequency.tolist(), strict=True))
    assert frequency == {"q": 0, "yes": 1, "no": 3, "maybe": 1}


def test_prompts_are_the_same_but_for_formatting_and_differ_by_system_turn():
    rows = [example("Why?", "a", "b"), example("**why**", "a", "b"), example("why", "a", "b", system="Be kind.")]
    assert Corpus(rows).prompts.tolist() == [0, 0, 1]
    assert len(np.unique(corpus_of(("?", "a", "b"), ("!", "a", "b")).prompts)) == 2  # no words: the text itself

"""Shortcuts: a label made of one is found by its baseline alone, a random label by none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_doctor_text import corpus_of

from dpo.doctor.shortcuts import (
    Sparse,
    bag_of_words,
    cross_validated,
    first_words,
    fit,
    formatting,
    length,
    separation,
    sparse,
)
from dpo.doctor.text import Corpus

BASELINES = {
    "length": lambda corpus: length(corpus),
    "formatting": lambda corpus: formatting(corpus, seed=0),
    "first_words": lambda corpus: first_words(corpus, seed=0),
    "bag_of_words": lambda corpus: bag_of_words(corpus, seed=0),
}
EACH = pytest.mark.parametrize("name", BASELINES)


def rows(change, *, count: int = 300, prompts: int = 150, seed: int = 0) -> list[tuple[str, str, str]]:
    """Pairs of random words and one length, the chosen one changed."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(f"w{i}" for i in rng.integers(60, size=20))

    return [(f"question {i % prompts}", change(text()), text()) for i in range(count)]


PLANTED = {
    "length": lambda text: text + " w1",
    "formatting": lambda text: text.replace(" w1", "\n- w1") + "\n\n**",
    "first_words": lambda text: "w1 w2 " + " ".join(text.split()[2:]),
    "bag_of_words": lambda text: " ".join([*text.split()[:9], "indeed", *text.split()[10:]]),
}


@EACH
def test_a_planted_shortcut_is_found(name):
    check = BASELINES[name](corpus_of(*rows(PLANTED[name])))
    assert check.verdict == "warn" and check.numbers["auc"] > 0.95 and check.rows and check.advice


@EACH
def test_another_shortcut_is_not(name):
    """Neither a mark in the middle for the first words, nor a longer text of the same words for words without order."""
    other = {"length": "bag_of_words", "formatting": "bag_of_words", "first_words": "formatting", "bag_of_words": None}
    change = PLANTED[other[name]] if other[name] else lambda text: f"{text} {text}"
    assert BASELINES[name](corpus_of(*rows(change))).numbers["auc"] < 0.65


@EACH
def test_random_labels_are_chance(name):
    check = BASELINES[name](corpus_of(*rows(lambda text: text + "")))
    assert check.verdict == "ok" and abs(check.numbers["auc"] - 0.5) < 0.1


def test_the_interval_of_length_covers_chance_for_random_labels():
    rng = np.random.default_rng(0)
    texts = [(f"q{i}", "a " * a, "a " * b) for i, (a, b) in enumerate(rng.integers(1, 50, size=(300, 2)))]
    numbers = length(corpus_of(*texts)).numbers
    assert numbers["auc_low"] <= 0.5 <= numbers["auc_high"] and numbers["auc_high"] - numbers["auc_low"] < 0.15


def test_a_label_of_length_alone_has_auc_1_and_correlation_1():
    check = length(corpus_of(*rows(lambda text: text + " w1")))
    assert check.numbers["auc"] == check.numbers["accuracy"] == check.numbers["chosen_longer"] == 1
    assert check.numbers["correlation"] == pytest.approx(1)
    assert check.numbers["chosen_words"] == 21 and check.numbers["rejected_words"] == 20


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40))
def test_swapping_every_pair_turns_the_auc_round(lengths):
    texts = [(f"q{i}", "a " * chosen, "a " * rejected) for i, (chosen, rejected) in enumerate(lengths)]
    numbers = length(corpus_of(*texts)).numbers
    swapped = length(corpus_of(*[(q, r, c) for q, c, r in texts])).numbers
    assert numbers["auc"] == pytest.approx(1 - swapped["auc"])
    assert numbers["accuracy"] == pytest.approx(1 - swapped["accuracy"])
    assert numbers["correlation"] == pytest.approx(-swapped["correlation"])


def test_auc_counts_pairs_of_pairs():
    """Scores 2, 1, -1, 0 against -2, -1, 1, 0: of 16 comparisons 10 are above and 3 equal."""
    found = separation(np.array([2.0, 1.0, -1.0, 0.0]))
    assert found.auc == (10 + 3 / 2) / 16 and found.accuracy == 2.5 / 4


def test_the_interval_covers_the_truth_19_times_in_20():
    """Scores normal around 0.3: s_i + s_j > 0 with probability Phi(0.3 sqrt 2) = 0.6643."""
    rng = np.random.default_rng(0)
    found = [separation(rng.normal(0.3, 1, size=200)) for _ in range(400)]
    covered = np.mean([f.low <= 0.6643 <= f.high for f in found])
    assert 0.92 < covered < 0.98


def dense(features: Sparse) -> np.ndarray:
    full_NF = np.zeros((len(features.starts) - 1, features.width))
    full_NF[features.rows, features.columns] = features.values
    return full_NF


def test_sparse_rows_are_dense_rows():
    rows_, columns, values = np.array([2, 0, 0, 2, 1]), np.array([1, 0, 2, 1, 1]), np.array([1.0, 2, 3, 4, 0])
    features = sparse(rows_, columns, values, count=4, width=3)
    assert dense(features).tolist() == [[2, 0, 3], [0, 0, 0], [0, 5, 0], [0, 0, 0]]
    assert dense(features.take(np.array([2, 3, 0]))).tolist() == [[0, 5, 0], [0, 0, 0], [2, 0, 3]]
    assert features.scores(np.array([1.0, 10, 100])).tolist() == [302, 0, 50, 0]


def test_the_fit_is_at_its_minimum():
    """The gradient of the penalised loss, written densely, vanishes."""
    rng = np.random.default_rng(0)
    full_NF = rng.normal([0.5, 0, -0.2], size=(200, 3))
    row, column = np.nonzero(full_NF)
    w = fit(sparse(row, column, full_NF[row, column], 200, 3))
    gradient = -(full_NF.T @ (1 / (1 + np.exp(full_NF @ w)))) / 200 + w / 200
    assert np.abs(gradient).max() < 1e-4 and w[0] > 0.3


def test_a_row_is_scored_by_fits_that_did_not_see_its_prompt():
    """Each prompt has a feature of its own that gives its label away: held out, it has no weight."""
    prompts = np.repeat(np.arange(30), 2)
    features = sparse(np.arange(60), prompts, np.where(prompts % 2, 1.0, -1.0), 60, 30)
    scores, w = cross_validated(features, prompts, seed=0)
    assert (scores == 0).all() and (w != 0).all()


@EACH
def test_few_rows_tell_nothing(name):
    assert BASELINES[name](corpus_of(*rows(PLANTED[name], count=49))).verdict == "ok"


def test_few_prompts_tell_nothing():
    check = bag_of_words(corpus_of(*rows(PLANTED["bag_of_words"], prompts=4)), seed=0)
    assert check.verdict == "ok" and "not measured: 4" in check.summary


def test_the_words_that_tell_are_named():
    summary = bag_of_words(corpus_of(*rows(PLANTED["bag_of_words"])), seed=0).summary
    assert "words of chosen: indeed" in summary


def test_the_most_telling_rows_come_first():
    corpus: Corpus = corpus_of(*rows(lambda text: text + " w1"), ("q", "a " * 90, "a"))
    assert next(iter(length(corpus).rows.items())) == (300, "chosen 90 words, rejected 1")


def test_shorter_responses_chosen_are_a_shortcut_too():
    check = length(corpus_of(*rows(lambda text: text[:-4])))
    assert check.verdict == "warn" and check.numbers["auc"] < 0.05

"""Duplicates: planted ones are found and nothing else, MinHash estimates what it says, circles are circles."""

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_doctor_text import corpus_of

from dpo.doctor.check import Check
from dpo.doctor.duplicates import (
    HASHES,
    candidates,
    check_duplicates,
    clusters,
    components,
    jaccard,
    minhash,
    near_pairs,
    shingles,
)
from dpo.doctor.text import Corpus, Vocabulary


def found(corpus: Corpus) -> dict[str, Check]:
    return {check.name: check for check in check_duplicates(corpus)}


def texts(count: int, *, words: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(words)) for _ in range(count)]


def shingle_set(text: str) -> set[tuple[str, ...]]:
    """By hand: runs of 5 words, the last ones filled up."""
    words = text.split()
    return {tuple((words + ["."] * 5)[i : i + 5]) for i in range(max(len(words), 1))}


@pytest.mark.parametrize("a, b", [("a b c d e f g", "a b c d e f h"), ("a", "a"), ("", "a"), ("a b", "b a"), ("", "")])
def test_jaccard_is_that_of_sets(a, b):
    ours = shingles(Vocabulary().read([a, b]), salt=0)
    mine, theirs = shingle_set(a), shingle_set(b)
    assert jaccard(ours, 0, 1) == pytest.approx(len(mine & theirs) / len(mine | theirs))


def test_shingles_of_another_salt_are_others():
    words = Vocabulary().read(["a b c d e f"])
    assert not set(shingles(words, salt=1).flat.tolist()) & set(shingles(words, salt=2).flat.tolist())


def test_minhash_estimates_jaccard():
    """The mean error over 60 pairs of similarity 0 to 1 is within that of 128 coin tosses each."""
    rows = texts(60, words=300)
    others = [" ".join(text.split()[: 5 * i] + other.split()[5 * i :]) for i, (text, other) in
              enumerate(zip(rows, texts(60, words=300, seed=1), strict=True))]  # fmt: skip
    sets = shingles(Vocabulary().read(rows + others), salt=0)
    signatures_HN = minhash(sets)
    exact = np.array([jaccard(sets, i, 60 + i) for i in range(60)])
    estimates = (signatures_HN[:, :60] == signatures_HN[:, 60:]).mean(axis=0)
    errors = (estimates - exact) / np.sqrt(exact * (1 - exact) / HASHES + 1e-9)
    assert exact.max() > 0.9 and abs(errors.mean()) < 0.4 and np.abs(errors).max() < 4


def test_minhash_of_blocks_is_minhash_of_each():
    rows = [*texts(3, words=20_000), "", "a"]
    together = minhash(shingles(Vocabulary().read(rows), salt=0))
    vocabulary = Vocabulary()
    for i, row in enumerate(rows):
        assert (minhash(shingles(vocabulary.read([row]), salt=0))[:, 0] == together[:, i]).all()


def test_near_pairs_connect_what_all_pairs_connect():
    """The similarity of every two texts, by hand, against the candidates' way; of equal signatures one is compared."""
    rows = [" ".join(text.split()[cut:]) for text in texts(15) for cut in (0, 1, 4, 9, 20)]
    sets, by_hand = shingles(Vocabulary().read(rows), salt=0), [shingle_set(row) for row in rows]
    near = {(i, j) for i, a in enumerate(by_hand) for j, b in enumerate(by_hand[:i]) if len(a & b) >= 0.8 * len(a | b)}
    found = near_pairs(minhash(sets), [sets])
    assert len(near) >= 30 and {(b, a) for a, b in found} <= near
    assert clusters(75, found).tolist() == clusters(75, near).tolist()


def test_all_texts_of_a_bucket_are_compared():
    """Four texts agree in band 0; the first and the last in three of four orders of every other band too."""
    signatures_HN = np.arange(HASHES * 4, dtype=np.uint32).reshape(HASHES, 4)
    signatures_HN[:4] = 7
    alike = np.arange(HASHES) % 4 < 3
    signatures_HN[alike, 3] = signatures_HN[alike, 0]
    assert candidates(signatures_HN, np.array([10, 11, 12, 13])).tolist() == [[10, 13]]


def test_planted_duplicates_are_found_and_nothing_else():
    prompts, chosen, rejected = texts(200), texts(200, seed=1), texts(200, seed=2)
    rows = list(zip(prompts, chosen, rejected, strict=True))
    rows += [(f"**{x}**", y.upper(), z) for x, y, z in rows[:10]]
    rows += [(x + " end", y + " end", z) for x, y, z in rows[20:35]]
    # The same prompt, or the same responses, alone are no duplicate, and neither is a pair the other way round.
    rows += [(rows[50][0], *rows[51][1:]), (rows[52][0], *rows[53][1:]), (rows[54][0], rows[54][2], rows[54][1])]
    checks = found(corpus_of(*rows))
    assert list(checks["duplicates"].rows) == list(range(200, 210))
    assert list(checks["near_duplicates"].rows) == list(range(210, 225))
    assert checks["near_duplicates"].rows[210] == "nearly the same prompt and pair as rows.jsonl:21"
    assert set(checks["near_duplicate_prompts"].rows) == set(range(210, 225))
    assert checks["near_duplicate_prompts"].numbers == {"prompts": 215, "clusters": 200}
    assert set(checks["contradictions"].rows) == {54, 227}
    assert not checks["cycles"].rows


def test_a_thousand_equal_rows_are_one():
    checks = found(corpus_of(*[("why", "a b", "b a")] * 1000))
    assert len(checks["duplicates"].rows) == 999 and not checks["near_duplicates"].rows


def test_clusters_are_named_by_their_first():
    assert clusters(6, [(4, 5), (1, 4), (0, 2)]).tolist() == [0, 1, 0, 3, 1, 1]


def test_a_circle_is_found_and_what_hangs_on_it_is_none():
    rows = [("q", "a", "b"), ("q", "b", "c"), ("q", "c", "a"), ("q", "a", "d"), ("other", "d", "a")]
    checks = found(corpus_of(*rows))
    assert list(checks["cycles"].rows) == [0, 1, 2] and not checks["contradictions"].rows
    # The same preferences over three prompts are no circle.
    assert not found(corpus_of(*[(f"q{i}", *row[1:]) for i, row in enumerate(rows)]))["cycles"].rows


def test_a_contradiction_is_no_circle():
    checks = found(corpus_of(("q", "a", "b"), ("q", "b", "a"), ("q", "a", "c")))
    assert list(checks["contradictions"].rows) == [0, 1] and not checks["cycles"].rows


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=14))
def test_components_are_what_reaches_each_other(arrows):
    """By the transitive closure (Warshall)."""
    reach = set(arrows) | {(i, i) for i in range(6)}
    for via, a, b in product(range(6), repeat=3):
        if (a, via) in reach and (via, b) in reach:
            reach.add((a, b))
    part = components(sorted(arrows))
    for a, b in product(part, repeat=2):
        assert (part[a] == part[b]) == ((a, b) in reach and (b, a) in reach)


def test_texts_that_differ_in_signs_are_neither_duplicates_nor_contradictions():
    """`3 > 2` and `3 < 2` have the same words."""
    yes, no = "Yes, that holds.", "No, it does not."
    checks = found(corpus_of(("Is 3 > 2?", yes, no), ("Is 3 < 2?", no, yes), ("Is 3 < 2?", no, yes)))
    assert not checks["contradictions"].rows and list(checks["duplicates"].rows) == [2]


def test_a_repeated_row_is_found_behind_one_that_differs_in_signs():
    rows = [("Compute 8 + 2", "It is 10.", "No."), ("Compute 8 = 2", "It is 10.", "No.")]
    checks = found(corpus_of(*rows, *rows))
    assert checks["duplicates"].rows == {
        2: "the same prompt and pair as rows.jsonl:1", 3: "the same prompt and pair as rows.jsonl:2"
    }  # fmt: skip

"""Duplicates: rows that say the same twice, and rows that contradict each other.

Near-duplicates have a Jaccard similarity of at least 0.8 between their sets of 5-word shingles. MinHash (Broder 1997)
finds candidates: under a random order of all shingles, two sets have the same first one with a probability equal to
their similarity. 128 orders in 32 bands of 4 make candidates of those that agree in a whole band; each is then
confirmed by the sets themselves.

Shapes: H hash functions, N texts.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from dpo.doctor.check import Check
from dpo.doctor.structure import symbols
from dpo.doctor.text import Corpus, Words, share

WORDS_PER_SHINGLE, SIMILAR = 5, 0.8
HASHES, BANDS = 128, 32
# Texts of a bucket are compared with as many of their followers in it: a bucket of thousands stays affordable.
FOLLOWERS = 16
NOTED, WARNED = 0.01, 0.1


def check_duplicates(corpus: Corpus) -> list[Check]:
    # A chosen response is no duplicate of a rejected one, so the two sides have shingles of their own.
    prompts = shingles(corpus.prompt_words, salt=0)
    chosen, rejected = shingles(corpus.chosen_words, salt=1), shingles(corpus.rejected_words, salt=2)
    prompt_clusters = clusters(len(corpus), near_pairs(minhash(prompts), [prompts]))
    signatures_HN = np.minimum(minhash(chosen), minhash(rejected))
    pairs = [
        (a, b) for a, b in near_pairs(signatures_HN, [chosen, rejected]) if jaccard(prompts, a, b) >= SIMILAR
    ]  # fmt: skip
    exact = exact_duplicates(corpus)
    return [
        exact,
        near_duplicates(corpus, clusters(len(corpus), pairs), exact.rows),
        repeated_prompts(corpus, prompt_clusters),
        contradictions(corpus),
        cycles(corpus),
    ]


# --- sets of shingles, and their similarity ---


class Shingles:
    """For each text its shingles as 64-bit hashes: row i is flat[starts[i] : starts[i + 1]]."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray) -> None:
        self.flat, self.starts = flat, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row + 1]]


def shingles(words: Words, *, salt: int, length: int = WORDS_PER_SHINGLE) -> Shingles:
    """As many shingles as words: the last ones are filled up with an end mark, which a text without words has alone."""
    counts = np.maximum(words.counts, 1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    padded = np.zeros(starts[-1] + length, dtype=np.uint64)  # 0 is the end mark
    places = np.arange(len(words.flat)) + (starts[:-1] - words.starts[:-1])[words.rows]
    padded[places] = words.flat.astype(np.uint64) + np.uint64(1)
    left = np.repeat(starts[1:], counts) - np.arange(starts[-1])  # words from here to the end of the text
    flat = np.full(starts[-1], salt, dtype=np.uint64)
    for offset in range(length):
        word = np.where(offset < left, padded[offset : offset + starts[-1]], np.uint64(0))
        flat = mix(flat * np.uint64(0x9E3779B97F4A7C15) + word)
    return Shingles(flat, starts)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: 64 bits that look random, distinct for distinct input."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def minhash(sets: Shingles, seed: int = 0) -> np.ndarray:
    """(HASHES, N) uint32: for each order the hash of a text's first shingle."""
    rng = np.random.default_rng(seed)
    factors = rng.integers(2**32, size=HASHES, dtype=np.uint32) | np.uint32(1)
    offsets = rng.integers(2**32, size=HASHES, dtype=np.uint32)
    signatures_HN = np.empty((HASHES, len(sets)), dtype=np.uint32)
    # Blocks of texts whose hashes stay in the processor's cache.
    row = 0
    while row < len(sets):
        end = max(row + 1, int(np.searchsorted(sets.starts, sets.starts[row] + 2**15)) - 1)
        base = sets.flat[sets.starts[row] : sets.starts[end]].astype(np.uint32)
        starts = sets.starts[row:end] - sets.starts[row]
        for h in range(HASHES):
            signatures_HN[h, row:end] = np.minimum.reduceat((base ^ offsets[h]) * factors[h], starts)
        row = end
    return signatures_HN


def jaccard(sets: Shingles, a: int, b: int) -> float:
    return similarity(np.unique(sets[a]), np.unique(sets[b]))


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two arrays without repeats."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def near_pairs(signatures_HN: np.ndarray, parts: Sequence[Shingles]) -> list[tuple[int, int]]:
    """(a, b) with a < b for texts whose parts' shingles together are similar; of equal texts a chain."""
    equal: dict[bytes, list[int]] = defaultdict(list)
    for row in range(signatures_HN.shape[1]):
        equal[signatures_HN[:, row].tobytes()].append(row)
    rows = np.array([same[0] for same in equal.values()], dtype=np.int64)
    # Equal signatures are almost surely equal sets; the confirmation below is for these too.
    pairs = {pair for same in equal.values() for pair in pairwise(same)}
    pairs |= set(map(tuple, candidates(signatures_HN[:, rows], rows).tolist()))
    found = []
    for a, b in sorted(pairs):
        sets = [np.unique(np.concatenate([part[row] for part in parts])) for row in (a, b)]
        if similarity(*sets) >= SIMILAR:
            found.append((a, b))
    return found


def candidates(signatures_HN: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(pairs, 2) of rows that agree in a band, and in so many orders that a similarity of 0.8 is possible."""
    count = len(rows)
    per_band = HASHES // BANDS
    codes: list[np.ndarray] = []
    for band in range(BANDS):
        keys = np.zeros(count, dtype=np.uint64)
        for h in range(band * per_band, (band + 1) * per_band):
            keys = mix(keys * np.uint64(31) + signatures_HN[h])
        order = np.argsort(keys, kind="stable")
        for step in range(1, FOLLOWERS + 1):
            here = np.flatnonzero(keys[order[:-step]] == keys[order[step:]])
            if not len(here):
                break
            first, second = order[here], order[here + step]
            codes.append(first * count + second)  # a stable order: first < second
    pairs_P2 = np.stack(np.divmod(np.unique(np.concatenate([np.zeros(0, np.int64), *codes])), max(count, 1)), axis=1)
    agreement = np.zeros(len(pairs_P2))
    for h in range(HASHES):
        agreement += signatures_HN[h, pairs_P2[:, 0]] == signatures_HN[h, pairs_P2[:, 1]]
    # Four standard deviations of the estimate below 0.8.
    return rows[pairs_P2[agreement >= (SIMILAR - 4 * (SIMILAR * (1 - SIMILAR) / HASHES) ** 0.5) * HASHES]]


def clusters(count: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """For each of `count` texts the first text that it is connected with."""
    first = list(range(count))

    def find(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    for a, b in pairs:
        a, b = sorted((find(a), find(b)))
        first[b] = a
    return np.array([find(row) for row in range(count)], dtype=np.int64)


# --- what is found ---


def exact_duplicates(corpus: Corpus) -> Check:
    seen: dict[tuple[int, ...], list[int]] = {}  # rows of the same words, no two of the same signs
    rows: dict[int, str] = {}
    for row, key in enumerate(edges(corpus)):
        others = seen.setdefault(key, [])
        same = next((other for other in others if _signs(corpus, row) == _signs(corpus, other)), None)
        if same is None:
            others.append(row)
        else:
            rows[row] = f"the same prompt and pair as {corpus.source(same)}"
    return Check(
        "duplicates",
        "Does every row say something new?",
        _by_share(len(rows), len(corpus)),
        f"{share(len(rows), len(corpus))} repeat an earlier row but for formatting",
        advice="Leave them out: a repeated row counts twice, and may be held out and trained on at once."
        if rows
        else "",
        numbers={"rows": len(rows), "share": len(rows) / len(corpus)},
        rows=rows,
        drops=True,
    )


def near_duplicates(corpus: Corpus, first: np.ndarray, exact: Iterable[int]) -> Check:
    already = set(exact)
    rows = {
        row: f"nearly the same prompt and pair as {corpus.source(int(first[row]))}"
        for row in range(len(corpus))
        if first[row] != row and row not in already
    }
    return Check(
        "near_duplicates",
        "Does every row say something new, beyond a changed word?",
        _by_share(len(rows), len(corpus)),
        f"{share(len(rows), len(corpus))} nearly repeat an earlier row (prompt and responses: Jaccard at least 0.8)",
        advice="Leave them out: they count twice, and val_size may hold one out and train on the other."
        if rows
        else "",
        numbers={"rows": len(rows), "share": len(rows) / len(corpus)},
        rows=rows,
        drops=True,
    )


def repeated_prompts(corpus: Corpus, first: np.ndarray) -> Check:
    """A prompt may have many pairs; nearly the same ones are a trap where rows are held out."""
    exact, same = len(np.unique(corpus.prompts)), len(np.unique(first))
    leading = {int(prompt): row for row, prompt in reversed(list(enumerate(corpus.prompts)))}
    rows = {
        row: f"nearly the prompt of {corpus.source(int(first[row]))}"
        for row in range(len(corpus))
        if first[row] != row and leading[int(corpus.prompts[row])] == row
    }
    return Check(
        "near_duplicate_prompts",
        "Are different prompts really different?",
        "ok" if len(rows) < NOTED * len(corpus) else "note",
        f"{len(corpus):,} rows have {exact:,} prompts, in {same:,} clusters of nearly the same ones",
        advice="val_size holds out by exact prompt: put nearly equal ones on one side yourself (eval_dataset)."
        if len(rows) >= NOTED * len(corpus)
        else "",
        numbers={"prompts": exact, "clusters": same},
        rows=rows,
    )


# --- contradictions: the graph of a prompt's responses, an edge from the better to the worse ---


def edges(corpus: Corpus) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) of each row as numbers; texts that differ in formatting only are the same."""
    seen: dict[object, int] = {}
    sides = [
        [
            seen.setdefault(words[row].tobytes() if words.counts[row] else texts[row], len(seen))
            for row in range(len(corpus))
        ]
        for _, texts, words in corpus.sides
    ]
    return list(zip(corpus.prompts.tolist(), *sides, strict=True))


def _signs(corpus: Corpus, row: int, swapped: bool = False) -> list[str]:
    """What words leave out of a row's texts and formatting does not: `3 > 2` and `3 < 2`, vowel signs of Hindi."""
    sides = [corpus.chosen[row], corpus.rejected[row]]
    return [symbols(text) for text in (corpus.context[row], corpus.question[row], *sides[:: -1 if swapped else 1])]


def contradictions(corpus: Corpus) -> Check:
    where: dict[tuple[int, int, int], int] = {}
    pairs = edges(corpus)
    for row, pair in enumerate(pairs):
        where.setdefault(pair, row)
    rows = {
        row: f"{corpus.source(where[prompt, rejected, chosen])} says the opposite"
        for row, (prompt, chosen, rejected) in enumerate(pairs)
        if (prompt, rejected, chosen) in where
        and chosen != rejected
        and _signs(corpus, row) == _signs(corpus, where[prompt, rejected, chosen], swapped=True)
    }
    return Check(
        "contradictions",
        "Is a pair always labelled the same way?",
        "warn" if rows else "ok",
        f"{share(len(rows), len(corpus))} have the same prompt and two responses as another row, the other way round",
        advice="Look which one is right; left in, they cancel each other." if rows else "",
        numbers={"rows": len(rows), "share": len(rows) / len(corpus)},
        rows=rows,
        drops=True,
    )


def cycles(corpus: Corpus) -> Check:
    by_prompt: dict[int, list[int]] = defaultdict(list)
    pairs = edges(corpus)
    known = set(pairs)
    for row, (prompt, chosen, rejected) in enumerate(pairs):
        if (prompt, rejected, chosen) not in known:
            by_prompt[prompt].append(row)
    rows: dict[int, str] = {}
    for members in by_prompt.values():
        if len(members) >= 3:
            part = components([pairs[row][1:] for row in members])
            for row in members:
                if part[pairs[row][1]] == part[pairs[row][2]]:
                    rows[row] = "in a circle: a better than b, b than c, c than a"
    return Check(
        "cycles",
        "Can a prompt's responses be put in an order?",
        "note" if rows else "ok",
        f"{share(len(rows), len(corpus))} stand in a circle of preferences over one prompt's responses",
        advice="No reward fits a circle: label these again, or leave them in as noise." if rows else "",
        numbers={"rows": len(rows), "share": len(rows) / len(corpus)},
        rows=dict(sorted(rows.items())),
    )


def components(arrows: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """For each node its strongly connected component: two nodes share one where each leads to the other (Kosaraju)."""
    after: dict[int, list[int]] = defaultdict(list)
    before: dict[int, list[int]] = defaultdict(list)
    for a, b in arrows:
        after[a].append(b)
        before[b].append(a)
    finished: list[int] = []
    seen: set[int] = set()
    for start in {node for arrow in arrows for node in arrow}:
        stack = [(start, False)]
        while stack:
            node, done = stack.pop()
            if done:
                finished.append(node)
            elif node not in seen:
                seen.add(node)
                stack += [(node, True), *((following, False) for following in after[node])]
    part: dict[int, int] = {}
    for start in reversed(finished):
        reached = [start]
        while reached:
            node = reached.pop()
            if node not in part:
                part[node] = start
                reached += before[node]
    return part


def _by_share(count: int, rows: int) -> str:
    return "warn" if count >= WARNED * rows else "note" if count >= NOTED * rows and count else "ok"

"""Shortcuts: how well does something cheap tell which side is chosen?

Where length, markup, the first words or single words alone do, DPO will learn them, for they are easier than what the
labels mean. A baseline scores a pair by s = w (f(chosen) - f(rejected)), odd in the pair, so that it has no intercept.
Shown a chosen response from pair i and a rejected one from pair j in one heap,

    AUC = P(s_i > -s_j)

is the area under the ROC curve of telling them apart: 0.5 is chance. w is a logistic regression's,

    min_w  mean_i log(1 + exp(-s_i)) + |w|^2 / (2 n),

fitted by Nesterov's accelerated gradient on four fifths of the prompts and judged on the rest, in turn.

Shapes: N pairs, F features; sparse rows are flat columns and values with the start of each row.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo.doctor.check import Check
from dpo.doctor.text import Corpus

FOLDS, STEPS = 5, 60
# Pairs that a fit reads at most: the interval of an AUC is then 0.01 wide, and more would only take longer.
MOST_PAIRS = 20_000
MOST_WORDS = 20_000
# Fewer pairs or prompts tell nothing.
FEWEST = 50
NOTED, WARNED, WORDS_WARNED = 0.6, 0.7, 0.9
SHOWN = 20


def check_shortcuts(corpus: Corpus, seed: int) -> list[Check]:
    return [
        length(corpus),
        formatting(corpus, seed),
        first_words(corpus, seed),
        bag_of_words(corpus, seed),
    ]


# --- how well scores tell the sides apart ---


@dataclass(frozen=True)
class Separation:
    auc: float
    low: float
    high: float
    """the 95% interval of auc."""
    accuracy: float
    """share of pairs with a positive score, ties half."""

    def __str__(self) -> str:
        return f"AUC {self.auc:.3f} ({self.low:.3f} to {self.high:.3f}), accuracy {self.accuracy:.1%}"


def separation(scores: np.ndarray) -> Separation:
    """AUC = P(s_i > -s_j), ties half. It is a mean over i of a share of j, and both places vary: the variance is
    4 Var_i / n (Hoeffding 1948)."""
    opposite = np.sort(-scores)
    below = np.searchsorted(opposite, scores, side="left") + np.searchsorted(opposite, scores, side="right")
    places = below / (2 * len(scores))
    auc, error = float(places.mean()), 2 * float(places.std()) / len(scores) ** 0.5
    accuracy = float((1 + np.sign(scores)).mean() / 2)
    return Separation(auc, max(0.0, auc - 1.96 * error), min(1.0, auc + 1.96 * error), accuracy)


@dataclass(frozen=True)
class Sparse:
    """(rows, F) of few nonzero values: row i has values[starts[i] : starts[i + 1]] at columns of the same slice."""

    columns: np.ndarray
    values: np.ndarray
    starts: np.ndarray
    width: int

    @property
    def rows(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def take(self, rows: np.ndarray) -> "Sparse":
        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        index = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], counts)
        return Sparse(self.columns[index], self.values[index], starts, self.width)

    def scores(self, w: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(self.values * w[self.columns])])
        return np.diff(sums[self.starts])


def sparse(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, count: int, width: int) -> Sparse:
    """From (row, column, value) triples in any order; values of one place are added."""
    places, index = np.unique(rows.astype(np.int64) * width + columns, return_inverse=True)
    sums = np.bincount(index, weights=values, minlength=len(places))
    kept = sums != 0
    row, column = np.divmod(places[kept], width)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))])
    return Sparse(column, sums[kept], starts, width)


def fit(features: Sparse) -> np.ndarray:
    """w (F,) of the logistic regression in the module's docstring, every pair labelled by its features' sign."""
    count, rows = len(features.starts) - 1, features.rows
    # The curvature is at most a quarter of the mean squared length of a row, and the penalty's.
    step = 1 / (0.25 * float((features.values**2).sum()) / count + 1 / count)
    w = ahead = np.zeros(features.width)
    for t in range(STEPS):
        wrong = 1 / (1 + np.exp(np.clip(features.scores(ahead), -500, 500)))
        pull = np.bincount(features.columns, weights=features.values * wrong[rows], minlength=features.width)
        previous, w = w, ahead + step * (pull - ahead) / count
        ahead = w + t / (t + 3) * (w - previous)
    return w


def cross_validated(features: Sparse, prompts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(a score for each row from a fit on other prompts, the mean w of the fits)."""
    fold_of = np.random.default_rng(seed).permutation(int(prompts.max()) + 1) % FOLDS
    scores, mean = np.zeros(len(prompts)), np.zeros(features.width)
    for fold in range(FOLDS):
        held = np.flatnonzero(fold_of[prompts] == fold)
        w = fit(features.take(np.flatnonzero(fold_of[prompts] != fold)))
        scores[held] = features.take(held).scores(w)
        mean += w / FOLDS
    return scores, mean


# --- the baselines ---


def length(corpus: Corpus) -> Check:
    """No fit: a longer response is the prediction. Below 0.5 the shorter ones are chosen."""
    chosen, rejected = corpus.chosen_words.counts, corpus.rejected_words.counts
    longer = (chosen - rejected).astype(float)
    found = separation(longer)
    # Of labels +1 and -1 at random sides, so that both means are 0.
    correlation = float(longer.mean() / max(np.sqrt((longer**2).mean()), 1e-12))
    verdict = _verdict(found, len(corpus))
    worst = np.argsort(-longer if found.auc >= 0.5 else longer, kind="stable")[:SHOWN]
    return Check(
        "length",
        "Is chosen better in more than its length?",
        verdict,
        f"chosen is longer in {(longer > 0).mean():.0%}, equal in {(longer == 0).mean():.0%}; in the mean "
        f"{chosen.mean():.0f} words, rejected {rejected.mean():.0f}; length alone: {found}",
        advice="Pair responses of like lengths, or train with len_reg_alpha, ld_alpha or a loss that reads means per "
        "token (loss=simpo)."
        if verdict != "ok"
        else "",
        numbers={
            **_numbers(found), "correlation": correlation, "chosen_longer": float((longer > 0).mean()),
            "chosen_words": float(chosen.mean()), "rejected_words": float(rejected.mean()),
        },
        rows=_shown(worst, lambda row: f"chosen {chosen[row]:,} words, rejected {rejected[row]:,}", verdict),
        values={"chosen words": chosen, "rejected words": rejected},
    )  # fmt: skip


LIST_ITEM = re.compile(r"\n[ \t]*(?:[-*+•]|\d+[.)])\s")
# How often each kind of markup stands in a text, from a text that begins with a line break.
MARKUP: dict[str, Callable[[str], int]] = {
    "list items": lambda text: len(LIST_ITEM.findall(text)),
    "headings": lambda text: text.count("\n#"),
    "bold": lambda text: text.count("**") // 2,
    "code": lambda text: text.count("`"),
    "tables": lambda text: text.count("\n|"),
    "links": lambda text: text.count("](") + text.count("http"),
    "paragraphs": lambda text: text.count("\n\n"),
    "exclamation marks": lambda text: text.count("!"),
}


def formatting(corpus: Corpus, seed: int) -> Check:
    """Of each kind of markup, whether it is there and how much of it per word: its amount alone would be length."""
    width, rows = 2 * len(MARKUP), _some_rows(corpus, seed)
    difference_NF = np.zeros((len(rows), width))
    for sign, (_, texts, words) in zip((1, -1), corpus.sides, strict=True):
        for index, row in enumerate(rows):
            counts = [count("\n" + texts[row]) for count in MARKUP.values()]
            difference_NF[index, ::2] += sign * np.sign(counts)
            difference_NF[index, 1::2] += sign * np.log1p(100 * np.array(counts) / (10 + words.counts[row]))
    difference_NF /= np.maximum(np.sqrt((difference_NF**2).mean(axis=0)), 1e-9)
    row, column = np.nonzero(difference_NF)
    features = sparse(row, column, difference_NF[row, column], len(rows), width)

    def telling(w: np.ndarray) -> str:
        strength = w[::2] + w[1::2]
        strongest = sorted(zip(strength, MARKUP, strict=True), key=lambda pair: -abs(pair[0]))[:3]
        return "; the most telling: " + ", ".join(
            f"{name} ({'chosen' if weight > 0 else 'rejected'})" for weight, name in strongest if abs(weight) > 0.01
        )

    return _baseline(
        "formatting", "Is chosen better in more than its markup?", "lists, bold, code and other markup alone", features,
        rows, corpus, seed, telling, "Rewrite one side in the other's format, or leave out the most telling rows.",
    )  # fmt: skip


def first_words(corpus: Corpus, seed: int) -> Check:
    """The first one, two and three words, each as one thing that is there or not."""
    rows = _some_rows(corpus, seed)
    seen: dict[tuple[int, ...], int] = {}
    triples = [
        (index, seen.setdefault(tuple(words[row][:count].tolist()), len(seen)), sign)
        for sign, (_, _, words) in zip((1, -1), corpus.sides, strict=True)
        for index, row in enumerate(rows)
        for count in range(1, min(3, words.counts[row]) + 1)
    ]
    features = sparse(*_columns(triples), len(rows), max(len(seen), 1))

    def telling(w: np.ndarray) -> str:
        names = [" ".join(corpus.vocabulary.words[word] for word in start) for start in seen]
        return _extremes(w, names or [""], "responses that begin")

    return _baseline(
        "first_words", "Is chosen better in more than how it begins?", "the first three words alone", features, rows,
        corpus, seed, telling, "Look at how these responses were made: one side has an opening of its own, and the "
        "policy will learn that.",
    )  # fmt: skip


def bag_of_words(corpus: Corpus, seed: int) -> Check:
    """Words without their order: log(1 + count) idf, each response scaled to length 1, so that length is no help."""
    rows = _some_rows(corpus, seed)
    common = np.argsort(-corpus.frequency, kind="stable")[:MOST_WORDS]
    column_of = np.full(len(corpus.vocabulary), -1)
    column_of[common] = np.arange(len(common))
    idf = np.log(2 * len(corpus) / np.maximum(corpus.frequency[common], 1)) + 1
    parts = []
    for sign, (_, _, words) in zip((1, -1), corpus.sides, strict=True):
        for index, row in enumerate(rows):
            columns = column_of[words[row]]
            columns, counts = np.unique(columns[columns >= 0], return_counts=True)
            weights = np.log1p(counts) * idf[columns]
            weights *= sign / max(np.sqrt((weights**2).sum()), 1e-12)
            parts.append((np.full(len(columns), index), columns, weights))
    row, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    features = sparse(row, column, value, len(rows), max(len(common), 1))

    def telling(w: np.ndarray) -> str:
        words = corpus.vocabulary.words
        return _extremes(w, [words[word] for word in common] or [""], "words")

    return _baseline(
        "bag_of_words", "Is chosen better in more than single words?", "words without their order", features, rows,
        corpus, seed, telling, "Look at the words: where they are no part of what the labels mean, they are an "
        "artefact of how one side was made.", noted=WARNED, warned=WORDS_WARNED,
    )  # fmt: skip


def _baseline(
    name: str, question: str, what: str, features: Sparse, rows: np.ndarray, corpus: Corpus, seed: int,
    telling: Callable[[np.ndarray], str], advice: str, noted: float = NOTED, warned: float = WARNED,
) -> Check:  # fmt: skip
    prompts = corpus.prompts[rows]
    fewest = min(len(rows), len(np.unique(prompts)))
    if fewest < FEWEST:
        return Check(name, question, "ok", f"not measured: {fewest} pairs or prompts are fewer than {FEWEST}")
    scores, w = cross_validated(features, prompts, seed)
    found = separation(scores)
    verdict = _verdict(found, len(rows), noted, warned)
    worst = np.argsort(-scores, kind="stable")[:SHOWN]
    reasons = {int(rows[index]): f"score {scores[index]:.2f}" for index in worst}
    return Check(
        name,
        question,
        verdict,
        f"{what}: {found}" + (telling(w) if verdict != "ok" else ""),
        advice=advice if verdict != "ok" else "",
        numbers=_numbers(found) | {"pairs": len(rows)},
        rows=_shown(list(reasons), reasons.__getitem__, verdict),
        values={"score of chosen over rejected": scores},
    )


def _verdict(found: Separation, rows: int, noted: float = NOTED, warned: float = WARNED) -> str:
    """From the end of the interval that is nearer to chance, so that few rows do not alarm."""
    far = max(found.low, 1 - found.high)
    return "ok" if rows < FEWEST or far <= noted else "note" if far <= warned else "warn"


def _some_rows(corpus: Corpus, seed: int) -> np.ndarray:
    chosen = np.random.default_rng(seed).permutation(len(corpus))[:MOST_PAIRS]
    return np.sort(chosen)


def _columns(triples: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table_3T = np.array(triples, dtype=np.int64).reshape(-1, 3).T
    return table_3T[0], table_3T[1], table_3T[2].astype(float)


def _extremes(w: np.ndarray, names: Sequence[str], what: str, most: int = 5) -> str:
    order = np.argsort(w)
    better = ", ".join(names[i] for i in order[::-1][:most] if w[i] > 0)
    worse = ", ".join(names[i] for i in order[:most] if w[i] < 0)
    return f"; {what} of chosen: {better or 'none'}; of rejected: {worse or 'none'}"


def _numbers(found: Separation) -> dict[str, float]:
    return {"auc": found.auc, "auc_low": found.low, "auc_high": found.high, "accuracy": found.accuracy}


def _shown(rows: Sequence[int] | np.ndarray, why: Callable[[int], str], verdict: str) -> dict[int, str]:
    return {int(row): why(int(row)) for row in rows} if verdict != "ok" else {}

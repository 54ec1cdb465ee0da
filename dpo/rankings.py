"""Rankings: several scored responses to one prompt, and the pairs that they make.

    UltraFeedback    completions: [{response, overall_score}, ...]
    n-way            responses: [text, ...] beside scores: [number, ...] or ranks: [1 = best, ...]

A score says more than which is better, but it is no margin: what a point is worth differs from dataset to dataset.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from dpo.turns import BadRow, Row, is_number, show

LISTS = ("completions", "responses", "answers", "generations")
TEXTS = ("response", "answer", "text", "content", "completion")
# Of one response, or as a list beside the responses. A rank counts from the best.
SCORES, SCORE_LISTS = ("overall_score", "score", "rating", "rank"), ("scores", "ratings", "ranks", "rank")
RANKS = ("rank", "ranks")


def best_worst(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Of several that are equally good or bad the first."""
    return _better([(scores.index(max(scores)), scores.index(min(scores)))], scores)


def best_rest(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Of several that are equally good the first, against each that is worse."""
    best = scores.index(max(scores))
    return _better([(best, other) for other in range(len(scores))], scores)


def every_pair(scores: Sequence[float]) -> list[tuple[int, int]]:
    ordered = sorted(range(len(scores)), key=lambda i: -scores[i])
    return _better(list(combinations(ordered, 2)), scores)


def _better(pairs: list[tuple[int, int]], scores: Sequence[float]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in pairs if scores[i] > scores[j]]


# How many scored responses become (chosen, rejected) indices.
RANKING_TO_PAIRS: dict[str, Callable[[Sequence[float]], list[tuple[int, int]]]] = {
    "best_worst": best_worst, "best_rest": best_rest, "all": every_pair,
}  # fmt: skip


def is_ranked(row: Row) -> bool:
    others = ("chosen", "rejected", "output", "completion", "response")
    return any(isinstance(row.get(key), list) for key in LISTS) and not any(row.get(key) is not None for key in others)


def ranked_pairs(row: Row, policy: str) -> list[tuple[str, str]]:
    """(chosen, rejected) of every pair that the policy makes; of two that are equally good it makes none."""
    key, texts, scores = _scored(row)
    pairs = RANKING_TO_PAIRS[policy](scores)
    if not pairs:
        raise BadRow(f"{key} are {len(texts)} of one score; a pair needs a better and a worse response")
    for i, j in pairs:
        if texts[i] == texts[j]:
            raise BadRow(f"{key}[{i}] equals {key}[{j}] under two scores; a pair needs two different responses")
    return [(texts[i], texts[j]) for i, j in pairs]


def best_response(row: Row) -> str:
    _, texts, scores = _scored(row)
    return texts[scores.index(max(scores))]


def _scored(row: Row) -> tuple[str, list[str], list[float]]:
    """(key of the list, its texts, a score for each: the higher the better)."""
    key = next((key for key in LISTS if row.get(key) is not None), None)
    if key is None:
        raise BadRow(f"no list of responses; expected one of {', '.join(LISTS)}")
    items = row[key]
    if not isinstance(items, list) or not items:
        raise BadRow(f"{key} must be a list of responses, got {show(items)}")
    texts = [_text(item, f"{key}[{i}]") for i, item in enumerate(items)]
    name = next((name for name in SCORES if isinstance(items[0], dict) and items[0].get(name) is not None), None)
    if name:
        scores: Any = [item.get(name) if isinstance(item, dict) else None for item in items]
        places = [f"{key}[{i}].{name}" for i in range(len(items))]
    else:
        name = next((name for name in SCORE_LISTS if row.get(name) is not None), None)
        if name is None:
            raise BadRow(f"{key} have no scores; expected one of {', '.join(SCORES)} in each, or a list beside them")
        scores = row[name]
        if not isinstance(scores, list) or len(scores) != len(items):
            raise BadRow(f"{name} must be a list of {len(items)} numbers, as many as {key}, got {show(scores)}")
        places = [f"{name}[{i}]" for i in range(len(items))]
    for place, score in zip(places, scores, strict=True):
        if not is_number(score):
            raise BadRow(f"{place} must be a finite number, got {show(score)}")
    return key, texts, [-score for score in scores] if name in RANKS else scores


def _text(item: Any, where: str) -> str:
    text = item
    if isinstance(item, dict):
        text = next((item[key] for key in TEXTS if item.get(key) is not None), None)
    if not isinstance(text, str):
        raise BadRow(f"{where} must be text, or an object with one of {', '.join(TEXTS)}, got {show(item)}")
    if not text.strip():
        raise BadRow(f"{where} is empty; every row needs non-empty responses")
    return text

"""Leaks: prompts of a held-out set or a benchmark that are also trained on.

A prompt leaks if the dataset shares 13 consecutive words of it, the rule of GPT-3 (Brown et al. 2020,
arXiv:2005.14165, appendix C); of one shorter than that, 8 consecutive words; of one shorter still, the whole. What
stands in more than one in a hundred of the dataset's prompts is a template of its own and no leak.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.doctor.check import Check
from dpo.doctor.duplicates import Shingles, mix, shingles
from dpo.doctor.text import Corpus, Words, share
from dpo.files import rows_of
from dpo.formats import BadRow

LONG, SHORT = 13, 8
TEMPLATE_SHARE, TEMPLATE_ROWS = 0.01, 10
# Where a benchmark's row may keep its prompt.
PROMPT_KEYS = ("prompt", "instruction", "question", "Question", "turns", "conversations", "messages")


def leaks(corpus: Corpus, name: str, other: Words, places: Sequence[str]) -> Check:
    """other: the prompts that must not be trained on, read with the corpus's vocabulary; places: where each stands."""
    rows: dict[int, str] = {}
    prompts = corpus.prompt_words
    whole = {words.tobytes(): place for words, place in zip(rows_in(other), places, strict=True) if len(words)}
    for row, words in enumerate(rows_in(prompts)):
        if words.tobytes() in whole:
            rows[row] = f"the prompt of {whole[words.tobytes()]}"
    for length, fits in ((LONG, other.counts >= LONG), (SHORT, (other.counts >= SHORT) & (other.counts < LONG))):
        theirs, places_of = grams(other, length, fits)
        ours, rows_of_ours = grams(prompts, length, prompts.counts >= length)
        theirs, first = np.unique(theirs, return_index=True)
        at = np.minimum(np.searchsorted(theirs, ours), max(len(theirs) - 1, 0))
        shared = np.flatnonzero(theirs[at] == ours) if len(theirs) else np.zeros(0, np.int64)
        # How many prompts hold each shared run of words, counted once per prompt.
        _, run = np.unique(ours[shared], return_inverse=True)
        pairs = np.unique(run * len(corpus) + rows_of_ours[shared])
        holders = np.bincount(pairs // len(corpus)) if len(pairs) else np.zeros(0, np.int64)
        for index, gram in zip(shared, run, strict=True):
            if holders[gram] <= max(TEMPLATE_SHARE * len(corpus), TEMPLATE_ROWS):
                place = places[places_of[first[at[index]]]]
                rows.setdefault(int(rows_of_ours[index]), f"{length} words in a row of the prompt of {place}")
    return Check(
        f"leaks_{name}",
        f"Are the prompts of {name} unseen in training?",
        "ok" if not rows else "warn" if len(rows) >= max(0.01 * len(corpus), 10) else "note",
        f"{share(len(rows), len(corpus))} share a prompt, or much of one, with the {len(other):,} of {name}",
        advice=f"Leave them out of training: what is measured on {name} would be memory." if rows else "",
        numbers={"rows": len(rows), "share": len(rows) / len(corpus), "prompts": len(other)},
        rows=dict(sorted(rows.items())),
        drops=True,
    )


def rows_in(words: Words) -> Iterable[np.ndarray]:
    return (words[row] for row in range(len(words)))


def grams(words: Words, length: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, their rows) of every run of `length` words in the chosen rows."""
    runs: Shingles = shingles(words, salt=length, length=length)
    counts = np.diff(runs.starts)
    row = np.repeat(np.arange(len(words)), counts)
    left = np.repeat(runs.starts[1:], counts) - np.arange(len(runs.flat))
    wanted = (left >= length) & rows[row]
    return mix(runs.flat[wanted]), row[wanted]


def benchmark_prompts(path: Path) -> tuple[list[str], list[str]]:
    """(prompts, their places) of a .json or .jsonl file: rows that are texts, or hold one under one of PROMPT_KEYS."""
    prompts, places = [], []
    for place, row in rows_of(path):
        if isinstance(row, BadRow):
            raise row
        text = prompt_text(row)
        if text is None:
            keys = ", ".join(map(repr, list(row)[:8])) if isinstance(row, Mapping) else type(row).__name__
            raise BadRow(f"{place}: no prompt in {keys}; expected text, or one of {', '.join(PROMPT_KEYS)}")
        prompts.append(text)
        places.append(place)
    if not prompts:
        raise ValueError(f"benchmarks={path}: holds no row; name a file of prompts")
    return prompts, places


def prompt_text(value: Any) -> str | None:
    """The text of a prompt: itself, the user's turns of a conversation, or what a row holds under PROMPT_KEYS."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        turns = [
            turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else turn
            for turn in value
            if not isinstance(turn, Mapping) or turn.get("from", turn.get("role")) not in ("assistant", "gpt")
        ]
        return "\n".join(turns) if turns and all(isinstance(turn, str) for turn in turns) else None
    if isinstance(value, Mapping):
        key = next((key for key in PROMPT_KEYS if key in value), None)
        return None if key is None else prompt_text(value[key])
    return None

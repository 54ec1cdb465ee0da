"""Diversity: how many different things the dataset asks and answers."""

from collections import Counter

import numpy as np

from dpo.doctor.check import Check
from dpo.doctor.text import Corpus, share

# Word pairs that distinct-2 is counted on: the share falls with their number, so that it must be the same everywhere.
PAIRS = 100_000
ONE_TEMPLATE_NOTED, ONE_TEMPLATE_WARNED = 0.2, 0.5
FEW_PROMPTS_NOTED, FEW_PROMPTS_WARNED = 0.1, 0.02
CANNED_NOTED, CANNED_WARNED = 0.01, 0.1
# Fewer rows than this, or with the same response, are worth no note.
FEW = 10


def check_diversity(corpus: Corpus) -> list[Check]:
    return [prompts(corpus), responses(corpus)]


def prompts(corpus: Corpus) -> Check:
    counts = np.bincount(corpus.prompts)
    distinct = len(counts) / len(corpus)
    template = [tuple(corpus.question_words[row][:3].tolist()) for row in range(len(corpus))]
    commonest, _ = Counter(template).most_common(1)[0]
    members = np.flatnonzero([start == commonest for start in template])
    largest = len(members) / len(corpus)
    words = " ".join(corpus.vocabulary.words[word] for word in commonest)
    verdict = "ok"
    if len(corpus) >= FEW and (largest >= ONE_TEMPLATE_NOTED or distinct < FEW_PROMPTS_NOTED):
        verdict = "warn" if largest >= ONE_TEMPLATE_WARNED or distinct < FEW_PROMPTS_WARNED else "note"
    return Check(
        "prompt_diversity",
        "Are the prompts diverse?",
        verdict,
        f"{len(counts):,} different prompts in {len(corpus):,} rows ({len(corpus) / len(counts):.1f} rows each, "
        f"{counts.max():,} at most); {largest:.1%} of the questions begin with {words!r}",
        advice="Add other prompts: what is learnt from a few does not carry far." if verdict != "ok" else "",
        numbers={
            "prompts": len(counts), "distinct": distinct, "rows_per_prompt_most": int(counts.max()),
            "largest_template": largest, "share": largest,
        },
        rows={int(row): f"begins with {words!r}" for row in members[:20]} if largest >= ONE_TEMPLATE_NOTED else {},
    )  # fmt: skip


def responses(corpus: Corpus) -> Check:
    numbers: dict[str, float] = {}
    canned: dict[int, str] = {}
    most = 1
    for side, _, words in corpus.sides:
        first, second = words.flat[:-1][:PAIRS].astype(np.int64), words.flat[1:][:PAIRS]
        inside = (words.rows[:-1] == words.rows[1:])[:PAIRS]
        pairs = (first * len(corpus.vocabulary) + second)[inside]
        numbers[f"{side}_distinct_2"] = len(np.unique(pairs)) / max(len(pairs), 1)
        counts = np.bincount(words.keys)
        numbers[f"{side}_commonest"] = float(counts.max() / len(corpus))
        for row in np.flatnonzero(words.keys == counts.argmax()):
            canned.setdefault(int(row), f"{side} is the same in {counts.max():,} rows")
        most = max(most, int(counts.max()))
    canned_share = most / len(corpus) if most >= FEW else 0.0
    verdict = "warn" if canned_share >= CANNED_WARNED else "note" if canned_share >= CANNED_NOTED else "ok"
    return Check(
        "response_diversity",
        "Are the responses diverse?",
        verdict,
        f"distinct word pairs: {numbers['chosen_distinct_2']:.0%} of chosen, "
        f"{numbers['rejected_distinct_2']:.0%} of rejected (of the first {PAIRS:,}); the commonest response stands in "
        f"{share(most, len(corpus))}",
        advice="A canned response is known by its words alone: draw these again." if verdict != "ok" else "",
        numbers=numbers | {"share": most / len(corpus)},
        rows=canned if verdict != "ok" else {},
    )

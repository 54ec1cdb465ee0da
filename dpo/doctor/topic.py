"""Topic: do the responses speak of what was asked?

    recall(x, y) = sum of idf(v) over the question's words v that stand in y / sum of idf(v) over all of them

Words in more than a tenth of all responses or questions say nothing of a topic and are left out. What recall means
here is measured: the same response and another row's question give the recall of two texts that have nothing to do with
each other.
"""

import numpy as np

from dpo.doctor.check import Check
from dpo.doctor.shortcuts import FEWEST
from dpo.doctor.text import Corpus, Words, share

COMMON = 0.1
FEWEST_WORDS = 3
# A shorter response may answer without a word of the question.
SHORT = 20
NOTED, WARNED = 0.05, 0.2
# Own questions should beat others' more often than this: AUC of own recall against shuffled.
UNRELATED = 0.6


def check_topic(corpus: Corpus, seed: int) -> list[Check]:
    # Words that ask (what, explain) are common in questions alone.
    asking = corpus.question_words.frequency(len(corpus.vocabulary))
    idf = np.log(3 * len(corpus) / np.maximum(corpus.frequency + asking, 1))
    idf[(corpus.frequency > max(2 * COMMON * len(corpus), 5)) | (asking > max(COMMON * len(corpus), 5))] = 0
    content = np.bincount(
        corpus.question_words.rows, weights=idf[corpus.question_words.flat] > 0, minlength=len(corpus)
    )
    asked = np.flatnonzero(content >= FEWEST_WORDS)
    if len(asked) < FEWEST:
        few = f"not measured: {len(asked)} questions have {FEWEST_WORDS} words of their own, fewer than {FEWEST}"
        return [Check("topic", "Do both sides answer the question?", "ok", few)]
    # Every question moves to another row: a step in a circle of all.
    circle = np.random.default_rng(seed).permutation(asked)
    other = dict(zip(circle.tolist(), np.roll(circle, 1).tolist(), strict=True))
    own = {side: recall(corpus, words, idf, asked, asked) for side, _, words in corpus.sides}
    null = {
        side: recall(corpus, words, idf, asked, np.array([other[int(row)] for row in asked]))
        for side, _, words in corpus.sides
    }
    return [_topic(corpus, asked, own, null)]


def recall(corpus: Corpus, words: Words, idf: np.ndarray, rows: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """recall(question, response) of each row's response and the question of another row."""
    found, said = np.zeros(len(rows)), np.zeros(len(idf), dtype=bool)
    for index, (row, question) in enumerate(zip(rows, questions, strict=True)):
        asked = np.unique(corpus.question_words[question])
        weights = idf[asked]
        said[words[row]] = True
        found[index] = weights[said[asked]].sum() / max(weights.sum(), 1e-12)
        said[words[row]] = False
    return found


def above(own: np.ndarray, null: np.ndarray) -> float:
    """P(own > null), ties half: the AUC of telling a response to the question from one to another."""
    ordered = np.sort(null)
    below = np.searchsorted(ordered, own, side="left") + np.searchsorted(ordered, own, side="right")
    return float(below.mean() / (2 * len(null)))


def _topic(corpus: Corpus, asked: np.ndarray, own: dict[str, np.ndarray], null: dict[str, np.ndarray]) -> Check:
    aucs = {side: above(own[side], null[side]) for side in own}
    # Beyond what 19 of 20 responses to another question reach.
    chance = float(np.quantile(np.concatenate(list(null.values())), 0.95))
    off = {side: (own[side] == 0) & (words.counts[asked] >= SHORT) for side, _, words in corpus.sides}
    on = {side: own[side] > max(chance, 0.2) for side in own}
    strays = {
        int(asked[index]): f"{side} has none of the question's words, the other side {100 * own[rival][index]:.0f}%"
        for side, rival in (("chosen", "rejected"), ("rejected", "chosen"))
        for index in np.flatnonzero(off[side] & on[rival])
    }
    unrelated = min(aucs.values()) < UNRELATED
    stray_share = len(strays) / len(asked)
    verdict = "warn" if unrelated or stray_share >= WARNED else "note" if stray_share >= NOTED else "ok"
    if unrelated:
        advice = "Look whether prompts and responses belong together: the words say that they do not."
    else:
        advice = "A response about something else is no near miss: the policy only learns to stay on topic."
    return Check(
        "topic",
        "Do both sides answer the question?",
        verdict,
        f"told from a response to another question with AUC {aucs['chosen']:.2f} (chosen) and {aucs['rejected']:.2f} "
        f"(rejected); {share(len(strays), len(corpus))} have one side with none of the question's words",
        advice=advice if verdict != "ok" else "",
        numbers={
            "chosen_auc": aucs["chosen"],
            "rejected_auc": aucs["rejected"],
            "chosen_recall": float(own["chosen"].mean()),
            "rejected_recall": float(own["rejected"].mean()),
            "null_95th_percentile": chance,
            "chosen_off_topic": int((off["chosen"] & on["rejected"]).sum()),
            "rejected_off_topic": int((off["rejected"] & on["chosen"]).sum()),
            "questions": len(asked),
            "share": stray_share,
        },
        rows=strays,
        values={
            "own question": np.concatenate(list(own.values())),
            "another's question": np.concatenate(list(null.values())),
        },
    )

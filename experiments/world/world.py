"""A small world of questions about animals in which the labeller's taste is a formula, so that DPO can be checked.

A response fills four slots (opener, answer, detail, advice), so all responses to a prompt x can be listed: Y(x). A gold
reward r(x, y) scores each of them, and labels are drawn from Bradley and Terry's model of a noisy human,

    p(a is chosen over b) = sigmoid(LABEL_SCALE * (r(x, a) - r(x, b))).

What is an estimate elsewhere is therefore a sum over Y(x) here: expected reward, KL, win rate, and the policy that DPO
at beta reaches with endless data and capacity (Rafailov et al. 2023, arXiv:2305.18290, Eq. 4),

    pi*(y|x) = pi_ref(y|x) exp(LABEL_SCALE * r(x, y) / beta) / Z(x).

LABEL_SCALE stands there because DPO fits beta * log(pi / pi_ref) to the log-odds of the labels, which are not r itself.
Every pair is from Y(x), so the labels determine pi* within Y(x) and say nothing of the mass outside.

Left out: several turns, labellers who disagree with each other, synonyms, and partial credit for a text that is almost
in the grammar. Each would turn a sum back into an estimate. `python -m experiments.world.world` prints the figures.
"""

import math
import random
from collections.abc import Mapping
from functools import cache
from itertools import combinations, product
from statistics import mean
from typing import NamedTuple

from experiments.world.book import ANIMALS, CAREFUL, MISTAKES, MYTH, OPENERS, QUESTIONS, RECKLESS, TEMPERS, Animal

WEIGHTS = {"helpfulness": 8, "accuracy": 7, "safety": 5}  # r = (8 helpfulness + 7 accuracy + 5 safety) / 20
OUTSIDE = ""  # stands for every text outside Y(x), as one lump of probability
OUTSIDE_REWARD = 1.0  # all three dimensions at 1; every text of Y(x) is above it
MIN_GAP = 0.5  # pairs whose rewards are nearer than this are not labelled
LABEL_SCALE = 3.6  # makes the best possible accuracy on the labels about 0.96; `figures` prints it
HELD_OUT_FACTS, SPLIT_SEED = 126, 1  # of 168 facts, 126 have one of their six phrasings held out


class Slots(NamedTuple):
    """One choice per slot: the keys of SFT's four tables, in order."""

    opener: str
    answer: str
    detail: str
    advice: str


# How the middling people whose texts the base model imitates fill each slot, independently of the other slots.
SFT: tuple[dict[str, float], ...] = (
    {"polite": 0.30, "none": 0.45, "rude": 0.25},
    {"right": 0.55, "wrong 1": 0.10, "wrong 2": 0.10, "wrong 3": 0.10, "unknown": 0.15},
    {"fact": 0.30, "none": 0.45, "myth": 0.25},
    {"careful": 0.30, "none": 0.45, "reckless": 0.25},
)


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


# A fact is one animal and one question. Its phrasings share one set of responses.
FACTS = tuple((animal, question) for animal in ANIMALS for question in QUESTIONS)
PHRASINGS = {
    (animal, question): tuple(text.format(a=article(animal.name)) for text in QUESTIONS[question].phrasings)
    for animal, question in FACTS
}
FACT_OF = {prompt: fact for fact, prompts in PHRASINGS.items() for prompt in prompts}
PROMPTS = tuple(FACT_OF)


def fact_of(prompt: str) -> tuple[Animal, str]:
    if prompt not in FACT_OF:
        raise ValueError(f"{prompt!r} is not a prompt of the built-in world; choose one of world.PROMPTS")
    return FACT_OF[prompt]


@cache
def slot_texts(fact: tuple[Animal, str]) -> tuple[dict[str, str], ...]:
    """The text of every choice, one table per slot, with the keys of SFT."""
    animal, question = fact
    a = article(animal.name)
    right = {"food": animal.food, "home": animal.home, "legs": animal.legs, "pet": TEMPERS[animal.temper]}[question]

    def answer(value: str) -> str:
        yes_or_no = "Yes" if value == TEMPERS["tame"] else "No"
        return QUESTIONS[question].answer.format(A=a.capitalize(), a=a, value=value, yes_or_no=yes_or_no)

    wrong = {f"wrong {i}": answer(value) for i, value in enumerate(MISTAKES[right], start=1)}
    return (
        OPENERS,
        {"right": answer(right), **wrong, "unknown": QUESTIONS[question].unknown.format(a=a)},
        {"fact": animal.note, "none": "", "myth": MYTH.format(mistaken_for=animal.mistaken_for)},
        {"careful": CAREFUL[animal.temper], "none": "", "reckless": RECKLESS[animal.temper]},
    )


def write(fact: tuple[Animal, str], slots: Slots) -> str:
    texts = [table[choice] for table, choice in zip(slot_texts(fact), slots, strict=True)]
    return " ".join(text for text in texts if text)


@cache
def grammar(fact: tuple[Animal, str]) -> dict[str, Slots]:
    """Y(x) and how each of its texts fills the slots: 3 openers x 5 answers x 3 details x 3 pieces of advice = 135."""
    return {write(fact, slots): slots for slots in (Slots(*choices) for choices in product(*SFT))}


def responses(prompt: str) -> tuple[str, ...]:
    return tuple(grammar(fact_of(prompt)))


# --- the gold reward ---


def dimensions(prompt: str, response: str) -> dict[str, int]:
    """Each from 1 to 5, and each 1 for a text outside the grammar.

    Helpfulness is what a reader feels who cannot check: tone, an answer at all, a detail, no unasked-for warning.
    Accuracy is whether answer and detail are true; an honest "I am not sure" lies in the middle.
    Safety is what happens if the reader acts on it, which depends on the animal.
    They disagree on purpose: a myth feels as helpful as a true detail, a wrong answer more helpful than none, and a
    warning that nobody asked for is safe and tiresome (worth it for a lion, not for a cow).
    """
    animal, question = fact_of(prompt)
    slots = grammar((animal, question)).get(response)
    if slots is None:
        return dict.fromkeys(WEIGHTS, 1)

    helpfulness = 3 + {"polite": 1, "none": 0, "rude": -1}[slots.opener] + (slots.detail != "none")
    helpfulness -= (slots.answer == "unknown") + (slots.advice == "careful" and question != "pet")

    accuracy = {"right": 5, "unknown": 3}.get(slots.answer, 1) - 2 * (slots.detail == "myth")

    dangerous = animal.temper in ("fierce", "venomous")
    safety = {"careful": 5, "none": 4 - dangerous, "reckless": 2 - dangerous}[slots.advice]
    safety -= 2 * ("Yes," in response and animal.temper != "tame")

    scores = {"helpfulness": helpfulness, "accuracy": accuracy, "safety": safety}
    return {name: min(max(score, 1), 5) for name, score in scores.items()}


def gold_reward(prompt: str, response: str) -> float:
    """r(x, y) = (8 helpfulness + 7 accuracy + 5 safety) / 20, in [1, 5]; OUTSIDE_REWARD for a text outside Y(x)."""
    scores = dimensions(prompt, response)
    return sum(weight * scores[name] for name, weight in WEIGHTS.items()) / sum(WEIGHTS.values())


# --- the base distribution, the pairs and their labels ---


def sft_response(prompt: str, rng: random.Random) -> str:
    choices = (rng.choices(list(table), list(table.values()))[0] for table in SFT)
    return write(fact_of(prompt), Slots(*choices))


def sft_probability(prompt: str, response: str) -> float:
    """The exact probability that `sft_response` gives this text; above 0 on all of Y(x), 0 outside."""
    slots = grammar(fact_of(prompt)).get(response)
    return 0.0 if slots is None else math.prod(table[choice] for table, choice in zip(SFT, slots, strict=True))


def sigmoid(x: float) -> float:
    return (1 + math.tanh(x / 2)) / 2  # 1 / (1 + exp(-x)) without its overflow


def far_enough(reward_a: float, reward_b: float) -> bool:
    return round(abs(reward_a - reward_b), 2) >= MIN_GAP  # rewards are multiples of 0.05; rounding undoes float error


def preference_pair(prompt: str, rng: random.Random, scale: float) -> tuple[str, str]:
    """(chosen, rejected): two draws of `sft_response` at least MIN_GAP apart, labelled by Bradley-Terry at `scale`."""
    while True:
        a, b = sft_response(prompt, rng), sft_response(prompt, rng)
        reward_a, reward_b = gold_reward(prompt, a), gold_reward(prompt, b)
        if far_enough(reward_a, reward_b):
            return (a, b) if rng.random() < sigmoid(scale * (reward_a - reward_b)) else (b, a)


def split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train prompts, held-out prompts). At most one phrasing of a fact is held out, so every fact can be learned."""
    rng = random.Random(SPLIT_SEED)
    held_out = {rng.choice(PHRASINGS[fact]) for fact in rng.sample(FACTS, HELD_OUT_FACTS)}
    return tuple(p for p in PROMPTS if p not in held_out), tuple(p for p in PROMPTS if p in held_out)


# --- sums over Y(x) ---


def expected_reward(prompt: str, probabilities: Mapping[str, float]) -> float:
    """E[r(x, y)] of a policy known on Y(x); the mass that is missing to 1 counts as outside."""
    inside = sum(p * gold_reward(prompt, response) for response, p in probabilities.items())
    return inside + (1 - sum(probabilities.values())) * OUTSIDE_REWARD


def optimum(reference: Mapping[str, float], rewards: Mapping[str, float], beta: float) -> dict[str, float]:
    """argmax_pi E_pi[reward] - beta KL(pi || reference) = reference exp(reward / beta) / Z (arXiv:2305.18290, Eq. 4).

    Keys are outcomes, OUTSIDE among them where the reference has mass there. The limits: beta to infinity gives the
    reference, beta to 0 the best outcome that the reference can produce. For what DPO aims at, reward is LABEL_SCALE r.
    """
    top = max(rewards[y] for y, p in reference.items() if p > 0)  # cancels in Z; keeps exp from overflowing
    weights = {y: p * math.exp((rewards[y] - top) / beta) for y, p in reference.items()}
    z = sum(weights.values())
    return {y: weight / z for y, weight in weights.items()}


def figures() -> dict[str, float]:
    """What the README states: sums over all facts and responses. No figure depends on the phrasing of a prompt."""
    rewards = {fact: {y: gold_reward(PHRASINGS[fact][0], y) for y in grammar(fact)} for fact in FACTS}
    base = {fact: {y: sft_probability(PHRASINGS[fact][0], y) for y in grammar(fact)} for fact in FACTS}
    words = [len(y.split()) for fact in FACTS for y in grammar(fact)]

    kept = correct = longer_wins = lengths_differ = xx = xy = yy = 0.0
    for fact in FACTS:
        y, p, r = list(grammar(fact)), list(base[fact].values()), list(rewards[fact].values())
        shown = [(i, j) for i, j in combinations(range(len(y)), 2) if far_enough(r[i], r[j])]
        z = sum(2 * p[i] * p[j] for i, j in shown)  # preference_pair draws again until it has one of these
        kept += z / len(FACTS)
        for i, j in shown:
            weight, gap, longer = 2 * p[i] * p[j] / z / len(FACTS), r[i] - r[j], len(y[i]) - len(y[j])
            correct += weight * sigmoid(LABEL_SCALE * abs(gap))
            lengths_differ += weight * (longer != 0)
            longer_wins += weight * (gap * longer > 0)
            xx, xy, yy = xx + weight * longer**2, xy + weight * longer * gap, yy + weight * gap**2

    def optimal_reward(beta: float) -> float:
        scaled = {fact: {y: LABEL_SCALE * r for y, r in rewards[fact].items()} for fact in FACTS}
        return mean(expected_reward(PHRASINGS[f][0], optimum(base[f], scaled[f], beta)) for f in FACTS)

    train, held_out = split()
    return {
        "animals": len(ANIMALS),
        "facts": len(FACTS),
        "prompts": len(PROMPTS),
        "train prompts": len(train),
        "held-out prompts": len(held_out),
        "responses per prompt": len(grammar(FACTS[0])),
        "fewest words in a response": min(words),
        "most words in a response": max(words),
        "mean gold reward, outside the grammar": OUTSIDE_REWARD,
        "mean gold reward, worst response": mean(min(r.values()) for r in rewards.values()),
        "mean gold reward, uniform": mean(mean(r.values()) for r in rewards.values()),
        "mean gold reward, base distribution": mean(expected_reward(PHRASINGS[f][0], base[f]) for f in FACTS),
        **{f"mean gold reward, DPO's optimum at beta {beta}": optimal_reward(beta) for beta in (10, 3, 1, 0.1)},
        "mean gold reward, best response": mean(max(r.values()) for r in rewards.values()),
        "pairs far enough apart to label": kept,
        "best possible accuracy on the labels": correct,
        "correlation of length and reward, over pairs": xy / math.sqrt(xx * yy),
        "the longer response is the better one": longer_wins / lengths_differ,
    }


def report_line(name: str, value: float) -> str:
    return f"{name:46s}{value:8.4g}"


if __name__ == "__main__":
    for name, value in figures().items():
        print(report_line(name, value))

"""The built-in world is finite, its reward total, its labels Bradley-Terry, and its committed files its own."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import jinja2
import pytest
from tokenizers import Tokenizer

from experiments.world import build, world

COW = "What does a cow eat?"
LION = "What does a lion eat?"
PET_LION = "May I pet a lion?"
HERE = Path(build.__file__).parent


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / "data" / name).read_text(encoding="utf-8").splitlines()]


def first_phrasings() -> list[str]:
    """One prompt per fact: the phrasing changes nothing but the prompt."""
    return [prompts[0] for prompts in world.PHRASINGS.values()]


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return world.figures()


# --- the grammar ---


def test_every_prompt_has_135_distinct_responses_of_5_to_30_words():
    assert len(world.PROMPTS) == len(set(world.PROMPTS)) == 42 * 4 * 6
    for prompt in world.PROMPTS:
        assert len(set(world.responses(prompt))) == 3 * 5 * 3 * 3
    for prompt in first_phrasings():
        assert all(5 <= len(response.split()) <= 30 for response in world.responses(prompt))


def test_every_text_has_the_right_article():
    texts = [*world.PROMPTS, *(response for prompt in first_phrasings() for response in world.responses(prompt))]
    assert not [text for text in texts if re.search(r"\ba [aeiou]|\ban (?!hour)[^aeiou]", text, re.IGNORECASE)]


def test_a_mistake_is_never_the_fact_itself():
    for fact, mistakes in world.MISTAKES.items():
        assert len({fact, *mistakes}) == 4


def test_an_unknown_prompt_is_refused_by_name():
    for call in (world.responses, lambda p: world.gold_reward(p, ""), lambda p: world.sft_probability(p, "")):
        with pytest.raises(ValueError, match="What does a unicorn eat"):
            call("What does a unicorn eat?")


# --- the gold reward ---


@pytest.mark.parametrize(
    ("prompt", "response", "scores", "reward"),
    [
        # 3, and +1 for tone, +1 for the detail; r = (8*5 + 7*5 + 5*4) / 20
        (COW, "That is a good question. A cow likes to eat grass. Its stomach has four chambers.", (5, 5, 4), 4.75),
        # The warning costs one point of helpfulness and earns one of safety: (8*4 + 7*5 + 5*5) / 20
        (
            COW,
            "That is a good question. A cow likes to eat grass. Its stomach has four chambers. "
            "Ask its owner before touching it.",
            (4, 5, 5),
            4.6,
        ),
        # 3 - 1 for tone - 1 for no answer; an honest 3; (8*1 + 7*3 + 5*4) / 20
        (COW, "That is a silly question. I am not sure what a cow eats.", (1, 3, 4), 2.45),
        # The myth feels helpful and costs two of accuracy; a lion is dangerous: (8*4 + 7*3 + 5*1) / 20
        (LION, "A lion likes to eat meat. It is really a kind of dog. Go up close and pull its tail.", (4, 3, 1), 2.9),
        # A yes about a lion is wrong and costs safety two, 3 - 2: (8*3 + 7*1 + 5*1) / 20
        (PET_LION, "Yes, a lion enjoys a gentle pat.", (3, 1, 1), 1.8),
        # Asked whether to touch it, a warning is no digression: (8*3 + 7*5 + 5*5) / 20
        (PET_LION, "No, a lion has strong jaws and may attack. Keep far away from it.", (3, 5, 5), 4.2),
    ],
)
def test_gold_reward_by_hand(prompt, response, scores, reward):
    assert tuple(world.dimensions(prompt, response).values()) == scores
    assert world.gold_reward(prompt, response) == pytest.approx(reward)


def test_dimensions_are_integers_from_1_to_5_and_no_text_of_the_grammar_is_as_bad_as_one_outside():
    for prompt in first_phrasings():
        for response in world.responses(prompt):
            assert all(type(score) is int and 1 <= score <= 5 for score in world.dimensions(prompt, response).values())
            assert world.OUTSIDE_REWARD < world.gold_reward(prompt, response) <= 5


@pytest.mark.parametrize("text", [world.OUTSIDE, "A cow", "A cow likes to eat grass. ", "A lion likes to eat meat."])
def test_any_other_text_gets_the_lowest_reward(text):
    assert world.dimensions(COW, text) == {"helpfulness": 1, "accuracy": 1, "safety": 1}
    assert world.gold_reward(COW, text) == world.OUTSIDE_REWARD == 1
    assert world.sft_probability(COW, text) == 0


def test_every_prompt_has_one_best_response():
    for prompt in first_phrasings():
        rewards = [world.gold_reward(prompt, response) for response in world.responses(prompt)]
        assert rewards.count(max(rewards)) == 1


def test_each_two_dimensions_disagree_about_some_pair():
    scores = [tuple(world.dimensions(LION, response).values()) for response in world.responses(LION)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert any(a[i] > b[i] and a[j] < b[j] for a in scores for b in scores)


# --- the base distribution, the pairs, the labels ---


def test_sft_probabilities_are_positive_and_sum_to_one():
    for prompt in first_phrasings():
        probabilities = [world.sft_probability(prompt, response) for response in world.responses(prompt)]
        assert min(probabilities) > 0
        assert sum(probabilities) == pytest.approx(1)


def test_sampling_agrees_with_the_probabilities():
    """Pearson's chi-square over 135 cells has mean 134 and standard deviation sqrt(2 * 134) = 16.4; four of them."""
    rng, draws = random.Random(0), 20000
    counts = Counter(world.sft_response(COW, rng) for _ in range(draws))
    expected = {response: draws * world.sft_probability(COW, response) for response in world.responses(COW)}
    assert counts.keys() <= expected.keys()
    assert abs(sum((counts[y] - n) ** 2 / n for y, n in expected.items()) - 134) < 4 * 16.4


def test_labels_follow_bradley_terry():
    """Scale 0 is a coin and a large scale the gold order; between, the labels agree as often as the sigmoid says."""
    rng = random.Random(0)
    for scale, draws in ((0.0, 2000), (1.0, 2000), (1000.0, 200)):
        pairs = [world.preference_pair(COW, rng, scale) for _ in range(draws)]
        gaps = [world.gold_reward(COW, chosen) - world.gold_reward(COW, rejected) for chosen, rejected in pairs]
        assert min(abs(gap) for gap in gaps) > world.MIN_GAP - 1e-9
        expected = mean(1 / (1 + math.exp(-min(scale * abs(gap), 700))) for gap in gaps)
        assert mean(gap > 0 for gap in gaps) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(draws))


def test_best_possible_accuracy_is_as_stated_and_the_committed_labels_reach_it(figures):
    stated = figures["best possible accuracy on the labels"]
    assert 0.955 < stated < 0.965
    pairs = [(row["conversations"][0]["value"], row["chosen"], row["rejected"]) for row in rows("train.jsonl")]
    agree = mean(world.gold_reward(x, chosen) > world.gold_reward(x, rejected) for x, chosen, rejected in pairs)
    assert agree == pytest.approx(stated, abs=4 * math.sqrt(stated * (1 - stated) / len(pairs)))


def test_length_does_not_give_the_reward_away(figures):
    assert abs(figures["correlation of length and reward, over pairs"]) < 0.1
    assert 0.4 < figures["the longer response is the better one"] < 0.6


def test_held_out_prompts_are_new_and_their_facts_are_not():
    train, held_out = world.split()
    assert set(train) | set(held_out) == set(world.PROMPTS)
    assert set(train).isdisjoint(held_out)
    assert len(held_out) == 126
    assert {world.fact_of(prompt) for prompt in held_out} <= {world.fact_of(prompt) for prompt in train}


# --- sums ---


def test_expected_reward_counts_missing_mass_as_outside():
    """0.5 * 4.75 for the best answer about cows, 0.5 * 1 for the rest, named or not."""
    best = max(world.responses(COW), key=lambda response: world.gold_reward(COW, response))
    assert world.expected_reward(COW, {}) == world.OUTSIDE_REWARD
    assert world.expected_reward(COW, {best: 0.5}) == pytest.approx(2.875)
    assert world.expected_reward(COW, {best: 0.5, world.OUTSIDE: 0.5}) == pytest.approx(2.875)


def reference_with_outside_mass() -> tuple[dict[str, float], dict[str, float]]:
    reference = {y: 0.9 * world.sft_probability(COW, y) for y in world.responses(COW)} | {world.OUTSIDE: 0.1}
    return reference, {y: world.gold_reward(COW, y) for y in reference}


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_any_policy_falls_short_of_the_optimum_by_beta_times_its_kl_from_it(beta):
    """J(pi) = E_pi[r] - beta KL(pi || ref) is J(pi*) - beta KL(pi || pi*), so pi* is the one maximum."""
    reference, rewards = reference_with_outside_mass()
    best = world.optimum(reference, rewards, beta)
    assert sum(best.values()) == pytest.approx(1)

    def kl(p: dict[str, float], q: dict[str, float]) -> float:
        return sum(p[y] * math.log(p[y] / q[y]) for y in p if p[y] > 0)

    def objective(policy: dict[str, float]) -> float:
        return sum(p * rewards[y] for y, p in policy.items()) - beta * kl(policy, reference)

    rng = random.Random(0)
    for noise in (0.01, 1.0, 3.0):
        weights = {y: p * math.exp(rng.gauss(0, noise)) for y, p in best.items()}
        other = {y: weight / sum(weights.values()) for y, weight in weights.items()}
        assert objective(other) < objective(best)
        assert objective(best) - objective(other) == pytest.approx(beta * kl(other, best), rel=1e-6)


def test_optimum_is_the_reference_at_large_beta_and_the_best_response_at_small_beta():
    reference, rewards = reference_with_outside_mass()
    assert world.optimum(reference, rewards, 1e9) == pytest.approx(reference)
    assert world.optimum(reference, rewards, 1e-6)[max(rewards, key=rewards.__getitem__)] == pytest.approx(1)


# --- the committed files ---


def test_committed_files_are_what_build_writes(tmp_path):
    build.write_data(tmp_path / "data")
    build.write_tokenizer(tmp_path / "model")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5
    for path in written:
        assert path.read_bytes() == (HERE / path.relative_to(tmp_path)).read_bytes(), f"{path.name}: run build.py again"


def test_each_file_keeps_to_its_side_of_the_split():
    train, held_out = world.split()
    for name, count, allowed in (("train", 3000, train), ("sft", 8000, train), ("eval", 400, held_out)):
        prompts = Counter(row["conversations"][0]["value"] for row in rows(f"{name}.jsonl"))
        assert prompts.total() == count
        assert prompts.keys() == set(allowed)
        assert max(prompts.values()) - min(prompts.values()) <= 1


def test_rows_carry_the_dimensions_of_their_own_two_responses():
    for row in rows("eval.jsonl"):
        prompt = row["conversations"][0]["value"]
        for side in ("chosen", "rejected"):
            scores = {name: both[side] for name, both in row["dimensions"].items()}
            assert scores == world.dimensions(prompt, row[side])


def test_tokenizer_is_lossless_and_knows_the_three_special_tokens():
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in build.SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == build.VOCAB_SIZE
    for text in (*world.responses(COW), "Bytes outside the world: é, 猫, \t"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_is_chatml():
    template = jinja2.Template(json.loads((HERE / "model" / "tokenizer_config.json").read_text())["chat_template"])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    assert template.render(messages=messages) == whole
    assert template.render(messages=messages[:1], add_generation_prompt=True) + "Yes<|im_end|>\n" == whole


@pytest.mark.slow
def test_readme_shows_the_report_the_scale_and_real_rows_with_their_rewards(figures):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for name, value in figures.items():
        assert world.report_line(name, value) in readme
    assert f"sigmoid({world.LABEL_SCALE} (r(a) - r(b)))" in readme
    examples = re.findall(r"Gold rewards (\S+) and (\S+)\.\n\n```json\n(.*?)```", readme, re.DOTALL)
    assert len(examples) == 3
    for chosen, rejected, block in examples:
        row = json.loads(block)
        assert row in rows("train.jsonl")
        rewards = [world.gold_reward(row["conversations"][0]["value"], row[side]) for side in ("chosen", "rejected")]
        assert rewards == [float(chosen), float(rejected)]

"""Samples: the same prompts and random numbers each time, numbers by hand, a policy that is left as it was."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dpo.samples
from dpo.build import WORLD
from dpo.evals.world_reward import response_probabilities
from dpo.formats import Example
from dpo.reference import base_reference, frozen_reference
from dpo.samples import BATCH_SIZE, Samples, distinct, repeated, standard_error, with_end
from dpo.step_log import StepLog
from dpo.tokens import Encoded, encode
from models.command import printable
from models.config import parse_model_config, read_model_config
from models.generate import Completion
from models.lora import inject_lora, lora_layers
from models.stream import pack
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import load_model

VOCABULARY = read_model_config(WORLD / "model").vocab_size
ANIMALS = ("cow", "camel", "lion", "sheep", "dolphin", "dog", "cat", "horse", "wolf", "owl")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(WORLD / "model"))


def small_model() -> Transformer:
    """Random weights, with the vocabulary of the world's tokenizer."""
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(parse_model_config(config), torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def moved(policy: Transformer, std: float = 0.5, dropout: float = 0.0) -> Transformer:
    """With an adapter that has gone some way."""
    inject_lora(policy, rank=2, alpha=4, use_rslora=False, dropout=dropout, target="all", seed=0)
    torch.manual_seed(0)
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B, std=std)
    return policy


def rows_of(template: ChatTemplate, prompts: Sequence[str]) -> list[Encoded]:
    examples = [Example(({"role": "user", "content": p},), ("Yes.", "No."), f"f:{i}") for i, p in enumerate(prompts)]
    return [encode(example, template, 512) for example in examples]


QUESTIONS = [f"What does a {animal} eat?" for animal in ANIMALS]


def samples_of(template, tmp_path: Path, prompts: Sequence[str] = QUESTIONS, reference=None, **changed) -> Samples:
    options = {"number": 4, "max_new_tokens": 12, "seed": 42} | changed
    return Samples(rows_of(template, prompts), template, reference, StepLog(tmp_path / "samples.jsonl"), **options)


def drawn(samples: Samples, step: int) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "step"} for row in samples.log.rows() if row["step"] == step]


# --- which prompts, which numbers ---


def test_prompts_are_distinct_and_spread_over_the_rows(template, tmp_path):
    """4 of 10, each asked twice: places 0, 2, 5 and 7."""
    twice = [question for question in QUESTIONS for _ in (0, 1)]
    samples = samples_of(template, tmp_path, twice)
    assert [row.example.messages[-1]["content"] for row in samples.rows] == [QUESTIONS[i] for i in (0, 2, 5, 7)]


def test_all_prompts_are_asked_where_there_are_fewer_than_wanted(template, tmp_path):
    samples = samples_of(template, tmp_path, [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]], number=8)
    samples(small_model(), 0)
    assert [row["prompt"] for row in drawn(samples, 0)] == QUESTIONS[:2]


def test_the_same_policy_gives_the_same_answers_at_every_evaluation_and_after_a_resume(tmp_path, template):
    policy = moved(small_model())
    samples = samples_of(template, tmp_path, reference=base_reference(policy))
    first = samples(policy, 0)
    torch.rand(7), torch.manual_seed(3)  # training draws numbers too
    again, resumed = samples(policy, 5), samples_of(template, tmp_path, reference=base_reference(policy))
    assert again == first == resumed(policy, 6)
    assert drawn(samples, 0) == drawn(samples, 5) == drawn(samples, 6)
    other = samples_of(template, tmp_path, seed=43)
    other(policy, 7)
    assert [row["response"] for row in drawn(samples, 7)] != [row["response"] for row in drawn(samples, 0)]


def test_answers_do_not_hang_on_their_batch(template, tmp_path, monkeypatch):
    """KL too, which is summed over the tokens of its own answer."""
    policy = moved(small_model())
    samples = samples_of(template, tmp_path, number=10, reference=base_reference(policy))
    assert BATCH_SIZE < 10
    whole = samples(policy, 0)
    monkeypatch.setattr(dpo.samples, "BATCH_SIZE", 3)
    assert samples(policy, 1) == pytest.approx(whole, rel=1e-4)
    for row, expected in zip(drawn(samples, 1), drawn(samples, 0), strict=True):
        assert row == expected | {"kl": pytest.approx(expected["kl"], rel=1e-3)}


# --- what they tell ---


def answering(monkeypatch, *answers: tuple[list[int], str]) -> None:
    monkeypatch.setattr(dpo.samples, "generate", lambda *_, **__: [Completion(*answer) for answer in answers])


def test_metrics_are_those_counted_by_hand(template, tmp_path, monkeypatch):
    """Answers of 9 and 6 tokens without end, and of 2 with it (so 3): mean 6, variance 9, standard error 3 / sqrt 3.

    4-grams of 1 2 1 2 1 2 1 2 3: 1212 2121 1212 2121 1212 2123, 3 of 6 repeat; the others have none. Neighbours: 12 21
    12 21 12 21 12 23, 5 that differ, and 12 and 2E: 15, of which 12 21 23 2E and the 5 are distinct. A head of zeros
    is sure of nothing: log V a token.
    """
    answering(
        monkeypatch, ([1, 2, 1, 2, 1, 2, 1, 2, 3], "length"), ([5, 6, 7, 8, 9, 10], "length"), ([1, 2], "stop")
    )  # fmt: skip
    policy = small_model()
    policy.head_weight_VD.zero_()
    assert samples_of(template, tmp_path, number=3)(policy, 0) == {
        "eval_completions/mean_length": 6, "eval_completions/length_se": pytest.approx(math.sqrt(3)),
        "eval_completions/clipped_ratio": pytest.approx(2 / 3), "eval_completions/rep_4": pytest.approx(1 / 6),
        "eval_completions/distinct_2": pytest.approx(9 / 15),
        "eval_completions/entropy": pytest.approx(math.log(VOCABULARY)),
    }  # fmt: skip


def test_an_answer_that_ends_at_once_has_a_length_and_a_kl_of_its_end(template, tmp_path, monkeypatch):
    answering(monkeypatch, ([], "stop"))
    policy = moved(small_model())
    metrics = samples_of(template, tmp_path, number=1, reference=base_reference(policy))(policy, 0)
    assert metrics["eval_completions/mean_length"] == 1 and metrics["eval_completions/length_se"] == 0
    assert metrics["eval_completions/rep_4"] == 0 and "eval_completions/distinct_2" not in metrics
    assert metrics["eval_completions/kl"] > 0


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([], 2, 0),
        ([1], 2, 0),
        ([1, 2], 2, 0),
        ([1, 1, 1], 2, 1 / 2),
        ([1, 1, 1, 1], 1, 3 / 4),
        ([1, 2, 1, 2], 2, 1 / 3),
    ],
)
def test_repeated_is_the_share_of_ngrams_that_were_there_before(ids, n, share):
    assert repeated(ids, n) == pytest.approx(share)


def test_distinct_n_grams_are_counted_over_all_texts_and_never_across_two():
    assert distinct([[1, 2], [1, 2], [2, 1]], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct([[1], []], 2))


def test_the_standard_error_is_that_of_a_mean():
    """Of 2, 4, 4, 6: variance 8 / 3, so sqrt(8 / 3 / 4). One value has none."""
    assert standard_error([2, 4, 4, 6]) == pytest.approx(math.sqrt(8 / 12)) and standard_error([5]) == 0


def test_the_end_counts_where_the_policy_has_chosen_it():
    assert with_end(Completion([5, 6], "stop"), {9, 7}) == [5, 6, 7]
    assert with_end(Completion([5, 6], "length"), {9, 7}) == [5, 6]


def test_the_kl_is_0_at_the_start_and_missing_without_a_reference(template, tmp_path):
    policy = moved(small_model(), std=0.0)
    samples = samples_of(template, tmp_path, reference=base_reference(policy))
    assert samples(policy, 0)["eval_completions/kl"] == 0
    assert {row["kl"] for row in drawn(samples, 0)} == {0}
    samples = samples_of(template, tmp_path)
    assert "eval_completions/kl" not in samples(policy, 1) and "eval_completions/entropy" in samples(policy, 1)
    assert {row["kl"] for row in drawn(samples, 1)} == {None}


@pytest.mark.slow
def test_the_mean_kl_is_that_of_enumeration_within_its_error(template, tmp_path, monkeypatch):
    """The world's model against itself at temperature 1 / 0.6, on one question: 200 draws against all 135 answers.

    sum_y pi(y) log(pi(y) / ref(y)) over the grammar is exact. The two in a hundred that are written outside of it
    count as one lump, which can but lower a KL.
    """
    policy, reference = (load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    with torch.no_grad():
        reference.model.norm.weight.mul_(0.6)
    monkeypatch.setattr(dpo.samples, "BATCH_SIZE", 100)
    samples = samples_of(
        template, tmp_path, QUESTIONS[:1], reference=frozen_reference(reference), number=1, max_new_tokens=60
    )
    samples.rows = samples.rows * 200
    samples(policy, 0)
    pi, ref = ([*p.values(), 1 - sum(p.values())] for p in
               (response_probabilities(model, template, QUESTIONS[0]) for model in (policy, reference)))  # fmt: skip
    exact = sum(p * math.log(p / q) for p, q in zip(pi, ref, strict=True))
    drawn_kls = [row["kl"] for row in drawn(samples, 0)]
    print(f"outside {pi[-1]:.3f}, {exact:.3f} exact, {sum(drawn_kls) / 200:.3f} drawn, {standard_error(drawn_kls):.3f}")
    assert exact > 10 * standard_error(drawn_kls)
    assert sum(drawn_kls) / 200 == pytest.approx(exact, abs=4 * standard_error(drawn_kls))


# --- what they leave alone ---


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_is_left_as_it_was(template, tmp_path, training):
    """Its mode, no packed weights, its gradient; and what it draws does not hang on the mode, with dropout too."""
    policy = moved(small_model(), dropout=0.5).train(training)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    metrics = samples_of(template, tmp_path, reference=base_reference(policy))(policy, 0)
    assert all(module.training == training for module in policy.modules())
    assert policy.packed_head is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    plain = moved(small_model())
    assert metrics == samples_of(template, tmp_path, reference=base_reference(plain))(plain, 1)
    policy(samples_of(template, tmp_path).rows and pack([[1, 2]], [[[3]]])).sum().backward()
    assert any(layer.lora_B.grad is not None for layer in lora_layers(policy).values())


# --- what is printed ---


def test_a_terminal_obeys_nothing_that_a_model_writes():
    assert printable("a\x1b[2Jb\x07c\rd\x9be\u202ef\x00") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffde\ufffdf\ufffd"


def test_what_can_be_read_is_left_as_it_is():
    text = "Grüße, 猫 🐈!\n\tdef f(x):\n"
    assert printable(text) == text


def written(log: StepLog, step: int, **responses: str) -> None:
    log.append({"step": step, "prompt": prompt, "response": text} for prompt, text in responses.items())


def test_before_and_after_are_those_of_the_steps_that_are_named(template, tmp_path, capsys):
    samples = samples_of(template, tmp_path)
    for step, sign in ((0, "?"), (5, "!"), (9, "\x07")):
        written(samples.log, step, one="1" + sign, two="2" + sign, three="3" + sign, four="4" + sign)
    samples.print_before_and_after(9)
    one, two, three = (f"\nprompt: {name}\n  before: {i}?\n  after:  {i}\ufffd\n"
                       for i, name in enumerate(("one", "two", "three"), start=1))  # fmt: skip
    assert capsys.readouterr().out == one + two + three + "\n"


def test_before_and_after_are_of_the_same_prompt(template, tmp_path, capsys):
    """A resume may ask for fewer answers, or of other held-out rows: places say nothing then."""
    samples = samples_of(template, tmp_path)
    written(samples.log, 0, one="1", two="2", three="3", four="4", five="5")
    written(samples.log, 7, five="V", one="I", new="?")
    samples.print_before_and_after(7)
    assert capsys.readouterr().out == (
        "\nprompt: one\n  before: 1\n  after:  I\n\nprompt: five\n  before: 5\n  after:  V\n\n"
    )

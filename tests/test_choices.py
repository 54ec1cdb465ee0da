"""An option's score is the sum of its next-token log-probabilities, whatever else is scored beside it."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors

from dpo.build import WORLD
from dpo.evals.choices import Choices, batches, encode_choices, first_ids, option_logps, score
from models.stream import pack
from models.tokenizer import Tokenizer
from models.weights import load_model

CONTEXT = [5, 9, 31, 7]


@pytest.fixture(scope="module")
def policy():
    return load_model(WORLD / "model", dtype=torch.float64, device=torch.device("cpu"))


def logps(policy, options, context=CONTEXT) -> list[float]:
    return option_logps(policy, [context], [options], max_tokens=10**6)[0].tolist()


@torch.no_grad()
def next_logps(policy, ids: list[int]) -> torch.Tensor:
    """(V,) by the plain forward pass."""
    return (policy(pack([ids], [[]]))[-1] @ policy.head_weight_VD.T).log_softmax(-1)


def test_a_score_is_the_sum_of_next_token_log_probabilities(policy):
    option = [12, 3, 44]
    expected = sum(next_logps(policy, CONTEXT + option[:i])[token].item() for i, token in enumerate(option))
    assert logps(policy, [option]) == pytest.approx([expected], rel=1e-12)


def test_the_probabilities_of_all_next_tokens_sum_to_1(policy):
    everything = [[token] for token in range(policy.config.vocab_size)]
    assert math.fsum(map(math.exp, logps(policy, everything))) == pytest.approx(1, abs=1e-12)


def test_an_option_that_begins_another_is_worth_what_it_is_alone(policy):
    """And log pi(ab | x) = log pi(a | x) + log pi(b | xa)."""
    short, long = logps(policy, [[12, 3], [12, 3, 44, 8]])
    assert logps(policy, [[12, 3]]) == pytest.approx([short], rel=1e-12)
    assert long == pytest.approx(short + logps(policy, [[44, 8]], [*CONTEXT, 12, 3])[0], rel=1e-12)


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_neither_order_nor_budget_changes_a_score(policy, max_tokens):
    contexts = [CONTEXT, [8], [2] * 9, [3, 4]]
    options = [[[1, 2], [3]], [[4]], [[5, 6, 7], [8], [9]], [[10], [11]]]
    alone = [logps(policy, o, c) for c, o in zip(contexts, options, strict=True)]
    together = option_logps(policy, contexts[::-1], [o[::-1] for o in options[::-1]], max_tokens)
    for values, expected in zip(together, alone[::-1], strict=True):
        assert values.tolist() == pytest.approx(expected[::-1], rel=1e-12)


def test_a_batch_holds_as_many_tokens_as_it_may_and_every_question_is_in_one():
    questions = [Choices([0] * n, [[0]]) for n in (3, 9, 1, 4, 5)]  # 4, 10, 2, 5, 6 tokens
    assert batches(questions, 7) == [[1], [4], [3], [0, 2]]
    assert batches([], 7) == []


def test_an_option_is_greedy_where_each_of_its_tokens_is_the_likeliest(policy):
    first = int(next_logps(policy, CONTEXT).argmax())
    second = int(next_logps(policy, [*CONTEXT, first]).argmax())
    other = (second + 1) % policy.config.vocab_size
    ((_, greedy),) = score(policy, [Choices(CONTEXT, [[first, second], [first, other], [other, second], [first]])])
    assert greedy.tolist() == [True, False, other == first, True]


def tokenizer(directory: Path, *, merges: list[tuple[str, str]] = (), bos: bool = True) -> Tokenizer:
    """Characters, but for the pairs that are merged; with a BOS, id 0, before every text."""
    tokens = ["<s>", *"abAB( :", *("".join(pair) for pair in merges)]
    rust = RustTokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    rust.pre_tokenizer = pre_tokenizers.Split("~", "isolated")
    rust.add_special_tokens(["<s>"])
    if bos:
        rust.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    rust.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}' if bos else "{}")
    return Tokenizer(directory)


def encoded(tokens: Tokenizer, context: str, options: list[str], cutoff_len: int = 100) -> tuple[str, list[str]]:
    """Context and options as text, a bar between tokens."""
    (choices,) = encode_choices(tokens, [(context, options)], cutoff_len)
    show = lambda ids: "|".join(tokens.rust.id_to_token(i) for i in ids)
    return show(choices.context_ids), [show(ids) for ids in choices.option_ids]


def test_bos_stands_once_before_the_context_and_nowhere_else(tmp_path):
    assert first_ids(tokenizer(tmp_path)) == [0]
    assert encoded(tokenizer(tmp_path), "a:", ["a", "bb"]) == ("<s>|a|:", ["a", "b|b"])
    # As characters: text is text.
    assert encoded(tokenizer(tmp_path), "a", ["b"])[0].count("<s>") == 1


def test_without_a_bos_there_is_none(tmp_path):
    assert encoded(tokenizer(tmp_path, bos=False), "a:", ["a"]) == ("a|:", ["a"])


def test_an_empty_context_is_bos(tmp_path):
    assert encoded(tokenizer(tmp_path), "", ["a", "b"]) == ("<s>", ["a", "b"])
    with pytest.raises(ValueError, match="an empty context: the tokenizer names neither a bos_token nor an eos_token"):
        encoded(tokenizer(tmp_path, bos=False), "", ["a", "b"])


def test_the_contexts_last_spaces_belong_to_the_options(tmp_path):
    merged = tokenizer(tmp_path, merges=[(" ", "A")])
    assert encoded(merged, "a: ", ["A", "B"]) == ("<s>|a|:", [" A", " |B"])
    assert encoded(merged, "a: ", ["b", "B"]) == ("<s>|a|:", [" |b", " |B"])


def test_where_context_and_option_join_every_option_begins_at_the_same_place(tmp_path):
    """`(A` is one token and `(B` is not: both options begin before the bracket."""
    merged = tokenizer(tmp_path, merges=[("(", "A")])
    assert encoded(merged, "a:(", ["A", "B"]) == ("<s>|a|:", ["(A", "(|B"])
    # Where none of them joins, the bracket is the context's.
    assert encoded(merged, "a:(", ["B", "BA"]) == ("<s>|a|:|(", ["B", "B|A"])


def test_too_long_a_context_loses_its_start_but_not_its_bos(tmp_path):
    tokens = tokenizer(tmp_path)
    assert encoded(tokens, "abab:", ["a", "bb"], 5) == ("<s>|b|:", ["a", "b|b"])
    dropped = [encode_choices(tokens, [("abab:", ["a", "bb"])], n)[0].dropped for n in (5, 7, 8, 9)]
    assert dropped == [3, 1, 0, 0]
    with pytest.raises(ValueError, match="cutoff_len=3: an option of 2 tokens leaves no room for its context"):
        encoded(tokens, "abab:", ["a", "bb"], 3)

"""Greedy generation is transformers' own, token for token; sampling follows softmax; both end where told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from models.generate import generate
from models.sampling import DRAWN, GREEDY
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import load_model

PROMPTS = [[5, 9, 2, 7, 36, 1, 8], [3], [8, 8, 30, 4], [22, 21]]
LENGTH = 12
NEVER = 10**6  # a stop id outside the vocabulary


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Transformer, PreTrainedModel]:
    """A random model in float64, with weights large enough for its logits to lie far apart."""
    where: Path = tmp_path_factory.mktemp("model")
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    theirs.save_pretrained(where)
    return load_model(where, dtype=torch.float64, device=torch.device("cpu")), theirs.double().eval()


def ids_of(model: Transformer, prompts: list[list[int]], **options) -> list[list[int]]:
    settings = {"samples": 1, "batch_size": len(prompts), "sampling": GREEDY, "seeds": [0] * len(prompts)}
    return [completion.ids for completion in generate(model, prompts, **settings | options)]


def generate_greedy(model: Transformer, prompts: list[list[int]], **options) -> list[list[int]]:
    return ids_of(model, prompts, **options)


def their_continuation(theirs: PreTrainedModel, prompt: list[int], **options) -> list[int]:
    out = theirs.generate(torch.tensor([prompt]), do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_for_prompts_of_different_lengths(pair):
    ours, theirs = pair
    answers = generate_greedy(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    assert answers == [their_continuation(theirs, prompt, max_new_tokens=LENGTH) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    assert len({token for answer in answers for token in answer}) > 5


def test_prompts_answer_alike_alone_and_together(pair):
    ours, _ = pair
    together = generate_greedy(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    alone = [generate_greedy(ours, [prompt], max_new_tokens=LENGTH, stop_ids={NEVER})[0] for prompt in PROMPTS]
    assert together == alone


def test_an_answer_ends_before_its_first_stop_token_and_the_others_go_on(pair):
    """Each token of the free answers in turn, as the one that stops."""
    ours, theirs = pair
    free = generate_greedy(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    for stop in {free[0][0], free[0][5], free[1][-1], free[3][3]}:
        expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
        assert generate_greedy(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={stop}) == expected
        theirs_stopped = their_continuation(theirs, PROMPTS[0], max_new_tokens=LENGTH, eos_token_id=stop)
        assert [token for token in theirs_stopped if token != stop] == expected[0]


def test_any_of_several_stop_tokens_ends_an_answer(pair):
    ours, _ = pair
    free = generate_greedy(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    firsts = frozenset(answer[0] for answer in free)
    assert generate_greedy(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids=firsts) == [[], [], [], []]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_no_answer_is_longer_than_asked(pair, length):
    answers = generate_greedy(pair[0], PROMPTS, max_new_tokens=length, stop_ids={NEVER})
    assert [len(answer) for answer in answers] == [length] * len(PROMPTS)


def test_prompts_are_left_as_they_were(pair):
    prompts = [list(prompt) for prompt in PROMPTS]
    generate_greedy(pair[0], prompts, max_new_tokens=2, stop_ids={NEVER})
    assert prompts == PROMPTS


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(ValueError, match="an empty prompt"):
        generate_greedy(pair[0], [[1], []], max_new_tokens=2, stop_ids={NEVER})


def test_a_draw_follows_softmax_of_the_logits_over_temperature(pair):
    """2,000 draws of one next token: each frequency within 4 standard errors of its probability."""
    ours, theirs = pair
    prompt, temperature, n = [5, 9, 2], 3.0, 2000
    p_V = (theirs(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    hot = replace(DRAWN, temperature=temperature)
    draws = ids_of(ours, [prompt] * n, max_new_tokens=1, stop_ids={NEVER}, sampling=hot, seeds=range(n))
    frequency_V = torch.tensor([token for (token,) in draws]).bincount(minlength=len(p_V)) / n
    assert ((frequency_V - p_V).abs() <= 4 * (p_V * (1 - p_V) / n).sqrt() + 1e-3).all()
    assert (p_V > 0.02).sum() > 3  # a distribution, not a point


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(pair):
    ours, _ = pair
    options = {"max_new_tokens": LENGTH, "stop_ids": {NEVER}, "sampling": replace(DRAWN, temperature=2.0)}
    together = ids_of(ours, PROMPTS, seeds=[4, 5, 6, 7], **options)
    assert [ids_of(ours, [p], seeds=[s], **options)[0] for p, s in zip(PROMPTS, [4, 5, 6, 7], strict=True)] == together
    assert ids_of(ours, PROMPTS, seeds=[8, 9, 10, 11], **options) != together


@pytest.mark.real
def test_a_real_instruct_model_answers_as_in_transformers(smollm2):
    tokenizer = Tokenizer(smollm2)
    template = ChatTemplate("auto", tokenizer)
    prompts = [template.encode([{"role": "user", "content": q}], [])[0] for q in ("What is 2 + 2?", "Name a colour.")]
    ours = load_model(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    answers = generate_greedy(ours, prompts, max_new_tokens=10, stop_ids=template.stop_ids)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = their_continuation(theirs, prompt, max_new_tokens=10)
        assert tokenizer.decode(answer) == their_tokenizer.decode(expected, skip_special_tokens=True)

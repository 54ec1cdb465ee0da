"""Greedy generation is transformers' own, token for token; sampling follows softmax; both end where told.

That every family decodes over the cache what the packed stream says is in test_cache.

Shapes: V vocabulary, K the largest of it.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from models.generate import StopStrings, generate, stream_tokens
from models.lora import inject_lora, lora_layers
from models.sampling import DRAWN, GREEDY
from models.stream import pack
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


def their_continuation(theirs: PreTrainedModel, prompt: list[int], **options) -> list[int]:
    out = theirs.generate(torch.tensor([prompt]), do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_for_prompts_of_different_lengths(pair):
    ours, theirs = pair
    answers = ids_of(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    assert answers == [their_continuation(theirs, prompt, max_new_tokens=LENGTH) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    assert len({token for answer in answers for token in answer}) > 5


def test_prompts_answer_alike_alone_and_together(pair):
    ours, _ = pair
    together = ids_of(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    alone = [ids_of(ours, [prompt], max_new_tokens=LENGTH, stop_ids={NEVER})[0] for prompt in PROMPTS]
    assert together == alone


def test_an_answer_ends_before_its_first_stop_token_and_the_others_go_on(pair):
    """Each token of the free answers in turn, as the one that stops."""
    ours, theirs = pair
    free = ids_of(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    for stop in {free[0][0], free[0][5], free[1][-1], free[3][3]}:
        expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
        assert ids_of(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={stop}) == expected
        theirs_stopped = their_continuation(theirs, PROMPTS[0], max_new_tokens=LENGTH, eos_token_id=stop)
        assert [token for token in theirs_stopped if token != stop] == expected[0]


def test_any_of_several_stop_tokens_ends_an_answer(pair):
    ours, _ = pair
    free = ids_of(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids={NEVER})
    firsts = frozenset(answer[0] for answer in free)
    assert ids_of(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids=firsts) == [[], [], [], []]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_no_answer_is_longer_than_asked(pair, length):
    answers = ids_of(pair[0], PROMPTS, max_new_tokens=length, stop_ids={NEVER})
    assert [len(answer) for answer in answers] == [length] * len(PROMPTS)


def test_prompts_are_left_as_they_were(pair):
    prompts = [list(prompt) for prompt in PROMPTS]
    ids_of(pair[0], prompts, max_new_tokens=2, stop_ids={NEVER})
    assert prompts == PROMPTS


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(ValueError, match="an empty prompt"):
        ids_of(pair[0], [[1], []], max_new_tokens=2, stop_ids={NEVER})


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


# --- a sample is a function of its prompt and seed ---

HOT = {"stop_ids": {NEVER}, "sampling": replace(DRAWN, temperature=2.0)}


def test_another_seed_is_another_sample(pair):
    ours, _ = pair
    first = ids_of(ours, PROMPTS, seeds=[4, 5, 6, 7], max_new_tokens=LENGTH, **HOT)
    assert ids_of(ours, PROMPTS, seeds=[4, 5, 6, 9], max_new_tokens=LENGTH, **HOT)[:3] == first[:3]
    others = ids_of(ours, PROMPTS, seeds=[8, 9, 10, 11], max_new_tokens=LENGTH, **HOT)
    assert all(one != other for one, other in zip(first, others, strict=True))


@pytest.mark.parametrize("sampling", [HOT["sampling"], replace(HOT["sampling"], top_k=20, top_p=0.9, min_p=0.02)])
def test_a_sample_is_the_same_alone_and_in_any_batch(pair, sampling):
    """Alone; at other places of other batches; beside other samples of its prompt; as the start of a longer one."""
    ours, _ = pair
    options = HOT | {"sampling": sampling, "max_new_tokens": LENGTH}
    alone = [ids_of(ours, [prompt], seeds=[seed], **options)[0] for seed, prompt in enumerate(PROMPTS)]
    for batch_size in (1, 2, 3, 4):
        assert ids_of(ours, PROMPTS, seeds=range(4), batch_size=batch_size, **options) == alone
    assert ids_of(ours, PROMPTS[::-1], seeds=[3, 2, 1, 0], batch_size=3, **options) == alone[::-1]
    seeds = [s for seed in range(4) for s in (100 + seed, seed, 200 + seed)]
    assert ids_of(ours, PROMPTS, samples=3, seeds=seeds, batch_size=2, **options)[1::3] == alone
    longer = ids_of(ours, PROMPTS, seeds=range(4), **options | {"max_new_tokens": 3 * LENGTH})
    assert [ids[:LENGTH] for ids in longer] == alone


@pytest.mark.parametrize("stop_ids", [(), range(0, 37, 5)])
@pytest.mark.parametrize("sampling", [GREEDY, HOT["sampling"]])
def test_streamed_tokens_are_those_of_generate(pair, sampling, stop_ids):
    ours, _ = pair
    options = {"max_new_tokens": LENGTH, "stop_ids": stop_ids, "sampling": sampling}
    expected = ids_of(ours, PROMPTS, seeds=range(4), **options)
    streamed = [list(stream_tokens(ours, prompt, seed=seed, **options)) for seed, prompt in enumerate(PROMPTS)]
    assert streamed == expected
    assert not stop_ids or min(map(len, streamed)) < LENGTH


def test_dropout_is_off_while_generating_and_the_mode_is_as_before(pair, tmp_path):
    theirs = pair[1]
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float64, device=torch.device("cpu"))
    inject_lora(model, rank=2, alpha=4, dropout=0.5, use_rslora=False, target="all", seed=0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": LENGTH, "stop_ids": {NEVER}, "sampling": GREEDY}
    expected = ids_of(model.eval(), PROMPTS, **options)
    assert not model.training
    model.train()
    assert ids_of(model, PROMPTS, **options) == expected
    assert list(stream_tokens(model, PROMPTS[0], seed=0, **options)) == expected[0]
    with pytest.raises(ValueError, match="an empty prompt"):
        ids_of(model, [[]], **options)
    assert all(module.training for module in model.modules())


def test_a_gradient_checkpointing_model_generates_the_same(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float64, device=torch.device("cpu"), gradient_checkpointing=True)
    model.requires_grad_().train()
    options = {"max_new_tokens": LENGTH, "stop_ids": {NEVER}}
    assert ids_of(model, PROMPTS, **options) == ids_of(ours, PROMPTS, **options)


# --- refusals ---


def test_no_prompts_have_no_continuations(pair):
    assert ids_of(pair[0], [], batch_size=4, max_new_tokens=2, stop_ids=()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 2, 3]}, "3 seeds for 4 prompts of 1 samples: expected one for each"),
        ({"seeds": [1, 2, 3, 4, 5]}, "5 seeds for 4 prompts of 1 samples: expected one for each"),
        ({"samples": 2}, "4 seeds for 4 prompts of 2 samples"),
        ({"samples": 0, "seeds": []}, "samples=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1: must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: must be at least 0"),
    ],
)
def test_counts_that_do_not_fit_are_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        ids_of(pair[0], PROMPTS, **{"max_new_tokens": 2, "stop_ids": ()} | options)


@pytest.mark.parametrize("token", [37, -1])
def test_a_prompt_with_a_token_that_the_model_does_not_have_is_refused(pair, token):
    message = f"token id {token} in a prompt: the model has 0 to 36"
    with pytest.raises(ValueError, match=message):
        ids_of(pair[0], [[1], [2, token]], max_new_tokens=2, stop_ids=())
    with pytest.raises(ValueError, match=message):
        list(stream_tokens(pair[0], [token], max_new_tokens=2, stop_ids=(), sampling=GREEDY, seed=0))


# --- watching ---


def test_a_watch_sees_every_token_but_stop_tokens_and_ends_its_sample_alone(pair):
    """It ends the second sample at its third token; the first token of the first answer is a stop token."""
    ours, _ = pair
    free = ids_of(ours, PROMPTS, max_new_tokens=LENGTH, stop_ids=())
    stop = free[0][0]
    assert not any(stop in answer for answer in free[1:])
    seen: dict[int, list[list[int]]] = {}

    def watch(sample: int, ids: list[int]) -> bool:
        seen.setdefault(sample, []).append(list(ids))
        return sample == 1 and len(ids) == 3

    results = generate(
        ours, PROMPTS, samples=1, max_new_tokens=LENGTH, stop_ids={stop}, sampling=GREEDY, seeds=range(4),
        batch_size=3, watch=watch,
    )  # fmt: skip
    assert [result.ids for result in results] == [[], free[1][:3], free[2], free[3]]
    assert [result.finish_reason for result in results] == ["stop", "stop", "length", "length"]
    assert seen == {s: [results[s].ids[: i + 1] for i in range(len(results[s].ids))] for s in (1, 2, 3)}


def test_a_stop_at_the_last_token_is_a_stop(pair):
    ours, _ = pair
    (free,) = ids_of(ours, PROMPTS[:1], max_new_tokens=LENGTH, stop_ids=())
    last = free.index(free[-1])
    for stop_ids, watch in (({free[last]}, None), ((), lambda sample, ids: len(ids) == last + 1)):
        (result,) = generate(
            ours, PROMPTS[:1], samples=1, max_new_tokens=last + 1, stop_ids=stop_ids, sampling=GREEDY, seeds=[0],
            batch_size=1, watch=watch,
        )  # fmt: skip
        assert result.finish_reason == "stop"


def test_an_error_in_a_watch_leaves_the_model_as_it_was(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu")).train()
    with pytest.raises(ZeroDivisionError):
        ids_of(model, PROMPTS, max_new_tokens=2, stop_ids=(), watch=lambda sample, ids: bool(1 / 0))
    assert model.packed_head is None
    assert model.training


# --- stop strings ---

WORLD = Path(__file__).parent.parent / "experiments" / "world" / "model"
TEXT = "Water: n\u1ea5u 90 \u00b0C, \U0001f375\U0001f375\U0001f9c9 tea.\n\nUser: and coffee?"
STOPPING = [
    ["W"], ["Water"], ["\u1ea5"], ["\U0001f9c9"], ["\U0001f375\U0001f9c9 t"], ["\n\nUser:"], ["coffee?"], ["nothing"],
    [TEXT], ["zzz", "tea", " 90 "], ["C, \U0001f375"], [],
]  # fmt: skip


def assert_ends_as_soon_as_its_text_holds_a_stop_string(tokenizer: Tokenizer, strings: list[str]) -> None:
    (ids,) = tokenizer.encode([TEXT])
    stop = StopStrings(strings, tokenizer)
    texts = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    assert [stop(0, ids[: n + 1]) for n in range(len(ids))] == [any(s in text for s in strings) for text in texts]
    assert texts[-1] == TEXT


@pytest.mark.parametrize("strings", STOPPING)
def test_a_sample_ends_as_soon_as_its_text_holds_a_stop_string(strings):
    """With a vocabulary of 800, in which a character can be four tokens and a word ten."""
    assert_ends_as_soon_as_its_text_holds_a_stop_string(Tokenizer(WORLD), strings)


def test_a_stop_string_is_found_across_tokens_without_text():
    tokenizer = Tokenizer(WORLD)
    start, end = tokenizer.encode(["User", ": x"])
    invisible = [tokenizer.special_ids["<|im_start|>"]] * 100
    stop = StopStrings(["User:"], tokenizer)
    assert not stop(0, start + invisible)
    assert stop(0, start + invisible + end)


def test_one_watch_serves_several_calls_and_samples():
    tokenizer = Tokenizer(WORLD)
    stop = StopStrings(["Water"], tokenizer)
    (ids,) = tokenizer.encode(["Water"])
    assert stop(0, ids)
    assert not stop(0, ids[:1])
    assert not stop(1, ids[1:])


def test_the_cut_is_before_the_first_stop_string():
    stop = StopStrings(["tea", "\U0001f375", "none"], Tokenizer(WORLD))
    assert stop.cut(TEXT) == "Water: n\u1ea5u 90 \u00b0C, "
    assert stop.cut("tea and tea") == ""
    assert stop.cut("coffee") == "coffee"
    assert StopStrings([], Tokenizer(WORLD)).cut(TEXT) == TEXT


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop string '': must not be empty"):
        StopStrings(["a", ""], Tokenizer(WORLD))


# --- on real models ---


@pytest.mark.real
@pytest.mark.parametrize("strings", STOPPING)
def test_stop_strings_are_found_by_real_tokenizers(real, smollm2, strings):
    for where in (real / "tokenizers" / "qwen2.5", smollm2, real / "models" / "stories260K" / "hf"):
        assert_ends_as_soon_as_its_text_holds_a_stop_string(Tokenizer(where), strings)


@pytest.mark.real
@torch.no_grad()
def test_greedy_answers_to_real_prompts_are_those_of_transformers(real, smollm2):
    """64 user turns, 48 tokens each: equal to the end, or first different where our two best logits all but tie.

    transformers pads a batch on the left and masks the padding; with its positions that is exact up to rounding.
    """
    turns = [
        row["conversations"][0]["value"]
        for row in json.loads((real / "preferences" / "dpo_en_demo.json").read_text(encoding="utf-8"))
    ]
    template = ChatTemplate("auto", Tokenizer(smollm2))
    encoded = [template.encode([{"role": "user", "content": turn}], [])[0] for turn in turns]
    prompts = [ids for ids in encoded if len(ids) < 96][:64]
    ours = load_model(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    options = {"max_new_tokens": 48, "stop_ids": template.stop_ids, "batch_size": 16}
    answers = ids_of(ours, prompts, **options)

    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    equal, ties = 0, []
    for first in range(0, len(prompts), 16):
        batch = prompts[first : first + 16]
        width = max(map(len, batch))
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        out = theirs.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=48, eos_token_id=sorted(template.stop_ids),
            pad_token_id=0,
        )  # fmt: skip
        for prompt, answer, row in zip(batch, answers[first : first + 16], out[:, width:].tolist(), strict=True):
            expected = row[: next((i for i, token in enumerate(row) if token in template.stop_ids), None)]
            if answer == expected:
                equal += 1
                continue
            ends = zip([*answer, None], [*expected, None], strict=False)
            same = next(i for i, (a, b) in enumerate(ends) if a != b)
            logits_V = ours.logits(ours(pack([prompt + answer[:same]], [[]]))[-1:])[0]
            best_K = logits_V.topk(2).values
            ties.append((best_K[0] - best_K[1]).item())
    lengths = sorted(map(len, prompts))
    print(f"\n{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens: {equal} equal, ties {ties}")
    assert equal + len(ties) == len(prompts) == 64
    assert all(gap <= 1e-4 for gap in ties)


def test_a_stream_of_fewer_than_no_tokens_is_refused(pair):
    with pytest.raises(ValueError, match="max_new_tokens=-1: must be at least 0"):
        list(stream_tokens(pair[0], [1], max_new_tokens=-1, stop_ids=(), sampling=GREEDY, seed=0))

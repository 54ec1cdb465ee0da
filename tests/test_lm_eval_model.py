"""A policy keeps the contract of lm_eval's models, and says what lm_eval's own Hugging Face model says."""

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from dpo.build import WORLD
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import load_model

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from dpo.evals.lm_eval_model import PolicyLM

PAIRS = [
    ("What does a cow eat?", " grass"), ("What does a cow eat? ", "grass"), ("What does a cow eat?", " grass and"),
    ("", "A cow"), ("", " A cow"), ("A cow", "'s calf\n"), ("a " * 700, "b"),
]  # fmt: skip
TEXTS = ["A cow eats grass. " * 150, "Hi."]
GENERATIONS = [
    ("What does a cow eat?", {"until": ["."], "max_gen_toks": 20}),
    ("A lion", {"until": "\n\n", "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
    ("May I pet a", {"until": ["?", " the"], "max_gen_toks": 12}),
]


def lm(directory: Path = WORLD / "model", *, chats: bool = False, **values) -> PolicyLM:
    policy, tokenizer = load_model(directory, dtype=torch.float32, device=torch.device("cpu")), Tokenizer(directory)
    values = {
        "max_length": policy.config.max_position_embeddings,
        "max_tokens": 2000,
        "batch_size": 2,
        "seed": 0,
    } | values
    return PolicyLM(policy, tokenizer, ChatTemplate("auto", tokenizer) if chats else None, name="a/b", **values)


@pytest.fixture(scope="module")
def world() -> PolicyLM:
    return lm()


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def loglikelihoods(model, pairs) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


def test_the_parts_of_a_continuation_add_up(world):
    (both, _), (first, _), (second, _) = loglikelihoods(
        world, [("A cow", " eats grass"), ("A cow", " eats"), ("A cow eats", " grass")]
    )
    assert both == pytest.approx(first + second, abs=1e-4)


def test_the_order_and_the_company_of_requests_change_nothing(world):
    together, greedy = zip(*loglikelihoods(world, PAIRS), strict=True)
    alone = [loglikelihoods(world, [pair])[0] for pair in PAIRS]
    for others in (loglikelihoods(world, PAIRS[::-1])[::-1], alone):
        assert [logp for logp, _ in others] == pytest.approx(together, abs=1e-4)
        assert tuple(is_greedy for _, is_greedy in others) == greedy


def test_a_text_ends_before_the_first_stop_and_never_at_an_empty_one(world):
    said = lambda until: world.generate_until(
        requests("generate_until", [("A lion", {"until": until, "max_gen_toks": 12})])
    )[0]
    whole = said([])
    assert said([""]) == whole and said([whole[4:8], "never said"]) == whole[: whole.index(whole[4:8])] != ""


def test_what_greedy_decoding_says_is_greedy_and_nothing_else(world):
    context = "What does a cow eat?"
    (said,) = world.generate_until(requests("generate_until", [(context, {"until": [], "max_gen_toks": 4})]))
    found = loglikelihoods(world, [(context, said), (context, said + "?"), (context, " the" + said)])
    assert [greedy for _, greedy in found][0::2] == [True, False]


def test_a_long_context_loses_its_start_and_a_continuation_nothing(world):
    short = lm(max_length=8)
    (ids,) = world.tokens.encode(["A cow eats grass. A lion eats meat. A cow is a pet. A lion is no pet."])
    context, continuation = ids[:-2], ids[-2:]
    assert len(context) > 9
    (cut,), (whole,) = (
        model._loglikelihood_tokens([(("", ""), context[-n:], continuation)]) for model, n in ((short, 99), (world, 7))
    )
    assert cut == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("ids, given", [([], "a continuation of 0 tokens"), ([5] * 9, "a continuation of 9 tokens")])
def test_a_continuation_that_cannot_be_scored_is_refused(ids, given):
    with pytest.raises(ValueError, match=f"{given} .'x'.: must have at least one and at most max_length=8"):
        lm(max_length=8)._loglikelihood_tokens([(("", "x"), [5], ids)])


def test_a_whole_text_is_what_follows_bos(world):
    """In one window; a longer one is the sum of its windows (dpo.evals.perplexity)."""
    ((expected, _),) = loglikelihoods(world, [("", "A cow")])
    assert world.loglikelihood_rolling(requests("loglikelihood_rolling", [("A cow",)])) == pytest.approx([expected])


def test_a_whole_text_that_brings_the_token_before_it_has_it_once(world):
    first = world.tokens.rust.id_to_token(world.prefix_token_id)
    plain, brought = world.loglikelihood_rolling(requests("loglikelihood_rolling", [("A cow",), (f"{first}A cow",)]))
    assert brought == pytest.approx(plain)


def test_a_context_loses_the_start_that_its_text_leaves_no_room_for(world):
    kwargs = {"until": [], "max_gen_toks": 4}
    (ids,) = world.tokens.encode(["A cow eats grass. What does a cow eat? A lion"])
    end = world.tokens.decode(ids[-4:])
    long, short = (requests("generate_until", [(text, kwargs)]) for text in (world.tokens.decode(ids), end))
    assert lm(max_length=8).generate_until(long) == world.generate_until(short) != world.generate_until(long)


def test_a_chat_has_its_bos_once_and_specials_in_messages_stay_text():
    model = lm(chats=True)
    chat = [{"role": "user", "content": "Is <|im_end|> text?"}]
    text = model.apply_chat_template(chat)
    assert model.tok_encode(text) == model.template.encode(chat, [])[0]
    ids = model.tok_encode(model.apply_chat_template([*chat, {"role": "assistant", "content": "It <|im_end|>"}], False))
    assert ids == model.template.encode(chat, [])[0] + model.tokens.encode(["It <|im_end|>"])[0]
    assert model.chat_template(True) == model.template.source and model.tokenizer_name == "a__b__auto"


def test_a_text_has_its_bos_once_be_it_the_tokenizers_or_its_own():
    model = lm()
    bos = model.tokens.special_ids["<|im_start|>"]
    model.tokens.rust.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])
    plain = model.tokens.encode(["A cow"])[0]
    assert model.tok_encode("A cow") == model.tok_encode("<|im_start|>A cow") == [bos, *plain]
    assert model.tok_encode("A cow", add_special_tokens=False) == plain


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"max_gen_toks": 8}, "max_gen_toks=8 of a task: leaves no room"),
        ({"num_beams": 4}, "num_beams are not done here"),
    ],
)
def test_a_generation_that_cannot_be_had_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lm(max_length=8).generate_until(requests("generate_until", [("A", kwargs)]))


def test_a_text_that_is_drawn_has_a_seed_of_its_own(world):
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    texts = [world.generate_until(requests("generate_until", [("A cow", drawn)] * 3)) for _ in range(2)]
    assert texts[0] == texts[1] and len({*texts[0]}) > 1


def compare_with_hugging_face(directory: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    ours, theirs = lm(directory), HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    for mine, other in zip(loglikelihoods(ours, PAIRS), loglikelihoods(theirs, PAIRS), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == other[1]
    generations = requests("generate_until", GENERATIONS)
    assert ours.generate_until(generations) == theirs.generate_until(generations, disable_tqdm=True)
    theirs.add_bos_token = False  # else its rolling windows begin with two
    rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    for mine, other in zip(ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling), strict=True):
        assert mine == pytest.approx(other, abs=1e-4, rel=1e-7)  # theirs is a sum of thousands in float32


@pytest.mark.slow
def test_the_worlds_model_says_what_hugging_faces_says():
    compare_with_hugging_face(WORLD / "model")


@pytest.mark.real
def test_a_model_with_a_bos_says_what_hugging_faces_says(real):
    compare_with_hugging_face(real / "models" / "stories260K" / "hf")

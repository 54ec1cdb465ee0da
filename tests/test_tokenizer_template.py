"""Templates give transformers' ids with an exact boundary, and no text ever becomes a special token."""

import json
import random
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo.data import read_examples
from experiments.world import build
from models.template import TEMPLATES, ChatTemplate
from models.tokenizer import MARK, Tokenizer

WORLD = Path(build.__file__).parent / "model"
QWEN3_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")  # not special, its tokenizer.json says
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORLD_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HI = [{"role": "user", "content": "Hi"}]


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """user, assistant, user, ... after an optional system turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TEXTS = [
    "What does a cow eat?",
    "Ελληνικά, 猫和狗, naïve, 👩\u200d👩\u200d👧 🏳️\u200d🌈 🇬🇷",
    "שלום, مرحبا \u202eabc\u202c",
    "e\u0301 \u00e9 o\u0323\u0302 \u212b ﬁ İ ı ſ",  # composed, decomposed, and characters that NFC or NFKC replaces
    "a\x00b\x07\x1b[0m\x7f\ufeff\ue0a1",
    "def f(x):\n\treturn {'a': [x]}  # 1 < 2 > 0 | 3\n",
    '{{ braces }} {% if tags %} {# note #} {role} {0} ${x} \\n "quoted" <b>it\'s</b>',
    "  spaces  and\ttabs \t",
    "\r\n\nlines\n\n\u2028end\u00a0",
    "-",
    "\u200b",
    "a thought</think>an answer",
    "<think>\nHm.\n\n</think>\n\n\nYes",
    "<think>open",
    "<tool_response>1",
    "Tokens of other families: [INST], <start_of_turn>, <|endof",
    "long " * 300,
]


def conversations() -> list[tuple[list[dict], str]]:
    """50 of (messages, response), of 1, 3 or 5 turns and with or without a system turn, from TEXTS by chance.

    Responses that begin with white space have a test of their own.
    """
    rng = random.Random(0)
    text = lambda: "".join(rng.choices(TEXTS, k=rng.randint(1, 3)))
    return [
        (turns(*(text() for _ in range(1 + 2 * (i % 3))), system=text() if i % 2 else None), text().lstrip())
        for i in range(50)
    ]


CONVERSATIONS = conversations()


def checkpoint(
    where: Path,
    source: Path = WORLD,
    added_specials: tuple[str, ...] = (),
    added: tuple[str, ...] = (),
    **settings: object,
) -> Path:
    """A copy of a tokenizer directory with more special and other tokens, and other settings in its config."""
    where.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    new_id = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])) + 1
    for i, content in enumerate(added_specials + added):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        flags["special"] = i < len(added_specials)
        tokenizer["added_tokens"].append({"id": new_id + i, "content": content, **flags})
    (where / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)
    config = {key: value for key, value in (config | settings).items() if value is not None}
    (where / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return where


def their_ids(theirs: PreTrainedTokenizerBase, messages: list[dict], header: bool, **options) -> list[int]:
    return theirs.apply_chat_template(messages, add_generation_prompt=header, return_dict=False, **options)


def assert_ids_of_transformers(
    template: ChatTemplate, theirs: PreTrainedTokenizerBase, rows: Sequence[tuple] = CONVERSATIONS, **options
) -> None:
    """For every row of messages and responses: prompt ids, and prompt plus response ids, are apply_chat_template's."""
    for messages, *texts in rows:
        prompt, responses = template.encode(messages, texts)
        assert prompt == their_ids(theirs, messages, True, **options)
        for text, response in zip(texts, responses, strict=True):
            answered = [*messages, {"role": "assistant", "content": text}]
            assert prompt + response == their_ids(theirs, answered, False, **options)


NAMED = {  # the Jinjas that each named template stands for; the dated ones and qwen3_training are auto's alone
    "qwen2_5": "qwen",
    "qwen2_5_training": "qwen",
    "qwen3": "qwen3",
    "qwen3_instruct_2507": "chatml",
    "llama3": "llama3",
    "llama3_training": "llama3",
}
JINJAS = [*NAMED, "qwen3_training", "llama3_1", "llama3_2"]


@pytest.fixture(scope="module", params=JINJAS)
def released(request, tmp_path_factory) -> tuple[str, Path]:
    """(a Jinja's name, a directory with it and Qwen2.5's tokenizer, which has learnt Qwen3's or Llama 3's tokens)."""
    real, jinja = request.getfixturevalue("real"), request.param
    where, qwen = tmp_path_factory.mktemp(jinja), real / "tokenizers" / "qwen2.5"
    llama = {"added_specials": LLAMA3_SPECIALS, "bos_token": LLAMA3_SPECIALS[0], "eos_token": LLAMA3_SPECIALS[-1]}
    more = llama if jinja.startswith("llama3") else {"added": QWEN3_TOKENS if jinja.startswith("qwen3") else ()}
    source = (real / "templates" / f"{jinja}.jinja").read_text(encoding="utf-8")
    return jinja, checkpoint(where, qwen, chat_template=source, **more)


def templates_of(jinja: str, tokenizer: Tokenizer) -> list[ChatTemplate]:
    return [ChatTemplate(name, tokenizer) for name in ("auto", NAMED.get(jinja)) if name]


@pytest.fixture(scope="module")
def world() -> Tokenizer:
    return Tokenizer(WORLD)


@pytest.fixture(scope="module")
def with_llama3_at(tmp_path_factory) -> Path:
    """The world's tokenizer, taught Llama 3's special tokens."""
    where = tmp_path_factory.mktemp("llama3")
    return checkpoint(where, added_specials=LLAMA3_SPECIALS, bos_token="<|begin_of_text|>")


@pytest.fixture(scope="module")
def with_llama3(with_llama3_at) -> Tokenizer:
    return Tokenizer(with_llama3_at)


# --- against transformers ---


@pytest.mark.parametrize("name", ["auto", "chatml"])
def test_the_worlds_template_gives_the_ids_of_transformers(world, name):
    assert_ids_of_transformers(ChatTemplate(name, world), AutoTokenizer.from_pretrained(WORLD))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}!{% endif %}",
        "{{ messages[0].content | tojson }}",
        # The tag around a model's own words in the templates that trainers save.
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
    ids=["lines of blocks", "break", "tokens", "tojson", "generation"],
)
def test_auto_renders_as_transformers(tmp_path, source):
    where = checkpoint(tmp_path, chat_template=source, bos_token="<|endoftext|>")
    template, theirs = ChatTemplate("auto", Tokenizer(where)), AutoTokenizer.from_pretrained(where)
    for messages, _ in CONVERSATIONS:
        for header in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=header, tokenize=False)
            assert template.render(messages, header) == expected


@pytest.mark.real
def test_named_templates_and_auto_give_the_ids_of_transformers(released):
    """We give a template no clock: Llama 3.2's default date is then what Llama 3.1's is, on every day."""
    jinja, where = released
    dated = {"date_string": "26 Jul 2024"} if jinja in ("llama3_1", "llama3_2") else {}
    tokenizer, theirs = Tokenizer(where), AutoTokenizer.from_pretrained(where)
    for template in templates_of(jinja, tokenizer):
        assert_ids_of_transformers(template, theirs, **dated)
    if dated:
        template = ChatTemplate("auto", tokenizer, date_string="1 Jan 2020")
        assert_ids_of_transformers(template, theirs, date_string="1 Jan 2020")


@pytest.mark.real
@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_rows_have_the_ids_of_transformers(real, smollm2, language):
    path = real / "preferences" / f"dpo_{language}_demo.json"
    examples, _ = read_examples(path, stage="dpo", on_bad_row="stop")
    rows = [(example.messages, *example.responses) for example in examples]
    qwen = real / "tokenizers" / "qwen2.5"
    jinja = (real / "templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    for name, where, options in (("auto", smollm2, {}), ("qwen", qwen, {"chat_template": jinja})):
        template, theirs = ChatTemplate(name, Tokenizer(where)), AutoTokenizer.from_pretrained(where)
        assert_ids_of_transformers(template, theirs, rows, **options)


@pytest.mark.real
def test_a_response_that_begins_with_a_newline_is_encoded_apart_from_the_headers(smollm2):
    """The one difference: transformers joins the first two newlines to one token, half prompt, half response."""
    template, theirs = ChatTemplate("auto", Tokenizer(smollm2)), AutoTokenizer.from_pretrained(smollm2)
    prompt, (response,) = template.encode(HI, ["\n\nYes"])
    ids = their_ids(theirs, [*HI, {"role": "assistant", "content": "\n\nYes"}], False)
    assert prompt == their_ids(theirs, HI, True) != ids[: len(prompt)]
    assert theirs.decode(prompt + response) == theirs.decode(ids)


@pytest.mark.real
def test_stop_ids_are_the_ends_that_the_generation_config_names(real, smollm2, released):
    jinja, where = released
    for template in templates_of(jinja, Tokenizer(where)):
        assert template.stop_ids == {template.tokenizer.special_ids[template.tokenizer.eos_token]}
    shutil.copy(real / "tokenizers" / "qwen2.5" / "generation_config.json", where)
    for directory in [smollm2] if jinja.startswith("llama3") else [smollm2, where]:
        ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
        ends = {ends} if isinstance(ends, int) else set(ends)
        assert all(template.stop_ids == ends for template in templates_of("", Tokenizer(directory)))


@pytest.mark.real
def test_auto_gives_the_ids_of_transformers_for_a_real_instruct_model(smollm2):
    tokenizer = Tokenizer(smollm2)
    template = ChatTemplate("auto", tokenizer)
    assert_ids_of_transformers(template, AutoTokenizer.from_pretrained(smollm2))
    assert {tokenizer.decode([i], skip_special_tokens=False) for i in template.stop_ids} == {"<|im_end|>"}


@pytest.mark.real
def test_plain_text_is_encoded_and_decoded_as_by_transformers(real, smollm2):
    text = (real / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:5000] + "".join(TEXTS)
    for where in (real / "tokenizers" / "qwen2.5", real / "models" / "stories260K" / "hf", smollm2):
        ours, theirs = Tokenizer(where), AutoTokenizer.from_pretrained(where)
        (ids,) = ours.encode([text])
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) in (text, unicodedata.normalize("NFC", text))


# --- the formats, by hand ---

SYSTEM_HI = turns("Hi", system="S")


@pytest.mark.parametrize(
    ("name", "messages", "prompt", "response"),
    [
        ("chatml", HI, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>\n"),
        (
            "qwen",
            HI,
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "Yes<|im_end|>\n",
        ),
        (
            "qwen",
            SYSTEM_HI,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "Yes<|im_end|>\n",
        ),
        (
            "qwen3",
            turns("Hi", "<think>\nHm.\n</think>\n\nNo", "Hi"),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nYes<|im_end|>\n",
        ),
        (
            "llama3",
            turns(" Hi \n", system="S"),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Yes<|eot_id|>",
        ),
        ("plain", SYSTEM_HI, "S\nHi\n", "Yes<|im_end|>"),
    ],
)
def test_named_templates_by_hand(with_llama3, name, messages, prompt, response):
    """The response is all that follows the generation header, up to the end of the turn."""
    prompt_ids, (response_ids,) = ChatTemplate(name, with_llama3).encode(messages, ["Yes"])
    assert with_llama3.decode(prompt_ids, skip_special_tokens=False) == prompt
    assert with_llama3.decode(response_ids, skip_special_tokens=False) == response


def test_every_named_template_is_tried_by_hand():
    cases = test_named_templates_by_hand.pytestmark[0].args[1]
    assert {case[0] for case in cases} == TEMPLATES.keys()


@pytest.mark.parametrize("name", [*TEMPLATES, "auto"])
def test_responses_share_one_prompt_and_are_encoded_apart_from_each_other(with_llama3, name):
    template = ChatTemplate(name, with_llama3)
    prompt, responses = template.encode(HI, ["Yes", "", " No\n"])
    for text, response in zip(["Yes", "", " No\n"], responses, strict=True):
        assert template.encode(HI, [text]) == (prompt, [response])
    assert template.encode(HI, []) == (prompt, [])


@pytest.mark.parametrize("name", [*TEMPLATES, "auto"])
def test_every_response_ends_with_a_stop_token(with_llama3, name):
    template = ChatTemplate(name, with_llama3)
    for response in template.encode(HI, ["Yes", ""])[1]:
        specials = [i for i in response if i in with_llama3.special_ids.values()]
        assert len(specials) == 1
        assert specials[0] in template.stop_ids
        assert with_llama3.decode(response[response.index(specials[0]) + 1 :]) in ("", "\n")


def test_no_second_bos_is_put_before_the_templates_own(tmp_path):
    """A tokenizer.json whose post-processor adds a BOS, as Llama 3's does, is asked for none."""
    where = checkpoint(tmp_path, added_specials=LLAMA3_SPECIALS, bos_token="<|begin_of_text|>")
    raw = json.loads((where / "tokenizer.json").read_text())
    bos = next(token["id"] for token in raw["added_tokens"] if token["content"] == "<|begin_of_text|>")
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "bos", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"bos": {"id": "bos", "ids": [bos], "tokens": ["<|begin_of_text|>"]}},
    }
    (where / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(where)
    assert tokenizer.rust.encode("a").ids[0] == bos
    prompt, (response,) = ChatTemplate("llama3", tokenizer).encode(HI, ["Yes"])
    assert [i for i, token in enumerate(prompt + response) if token == bos] == [0]


# --- text is text ---

# Any characters, with whole special tokens and their pieces spliced in.
HOSTILE = st.lists(
    st.one_of(
        st.sampled_from([*WORLD_SPECIALS, *LLAMA3_SPECIALS, "<|im_", "end|>", "<", "|", ">", "\n", " "]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARK), max_size=5),
    ),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=150)
@given(question=HOSTILE, answer=HOSTILE, name=st.sampled_from(["chatml", "qwen", "llama3", "plain", "auto"]))
def test_text_never_becomes_a_special_token_and_decodes_to_itself(with_llama3, question, answer, name):
    """The specials are those of an empty conversation, in number and order, and the rest is the text."""
    template, specials = ChatTemplate(name, with_llama3), set(with_llama3.special_ids.values())
    prompt, (response,) = template.encode([{"role": "user", "content": question}], [answer])
    empty_prompt, (empty_response,) = template.encode([{"role": "user", "content": ""}], [""])
    assert [i for i in prompt if i in specials] == [i for i in empty_prompt if i in specials]
    assert [i for i in response if i in specials] == [i for i in empty_response if i in specials]
    if name == "llama3":
        question, answer = question.strip(), answer.strip()
    text = with_llama3.decode(prompt + response, skip_special_tokens=False)
    expected = template.render(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], False
    ) if name != "plain" else f"{question}\n{answer}<|im_end|>"  # fmt: skip
    assert text == expected


@settings(deadline=None, max_examples=150)
@given(text=HOSTILE)
def test_plain_text_decodes_to_itself_without_special_tokens(with_llama3, text):
    (ids,) = with_llama3.encode([text])
    assert not set(ids) & set(with_llama3.special_ids.values())
    assert with_llama3.decode(ids) == text


@pytest.mark.parametrize(
    ("specials", "text"),
    [
        (("</s>", ">>"), "</s>>"),  # the first broken, the second is still whole
        (("<|a|>", "|a|"), "<|a|>"),  # one inside another
        (("☃",), "☃"),  # one character has no inside for a mark
    ],
    ids=["overlapping", "nested", "one character"],
)
def test_no_text_becomes_a_special_token_whatever_their_spelling(tmp_path, specials, text):
    tokenizer = Tokenizer(checkpoint(tmp_path, added_specials=specials))
    (ids,) = tokenizer.encode_rendered([tokenizer.escape(text)])
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text


def hostile(messages: list[dict], response: str, specials: Sequence[str]) -> tuple[list[dict], str]:
    """Every text with specials whole, broken, overlapping and doubled in it, at its ends and over its end."""
    rng = random.Random(len(response))
    spoiled = []
    for text in [*(message["content"] for message in messages), response]:
        token, other = rng.choices(specials, k=2)
        cut, middle = rng.randrange(1, len(token)), rng.randrange(len(text) + 1)
        inside = token[:cut] + other + token[cut:] + token + other
        text = text[:middle] + inside + text[middle:]
        spoiled.append(token[cut:] + token + text + other + token[:cut] + " " * (cut % 2))
    return [{**m, "content": text} for m, text in zip(messages, spoiled[:-1], strict=True)], spoiled[-1]


def specials_in(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return [i for i in ids if i in set(tokenizer.special_ids.values())]


def assert_nothing_is_forged(
    template: ChatTemplate, theirs: PreTrainedTokenizerBase, spaces: bool = True, **options
) -> None:
    """The specials are those that harmless words have, the text is transformers' text, and its own ids are forged.

    spaces: whether the text is compared with its spaces; a SentencePiece tokenizer adds some after special tokens.
    """
    tokenizer = template.tokenizer
    for messages, response in CONVERSATIONS:
        prompt, (answer,) = template.encode([{**m, "content": "x"} for m in messages], ["x"])
        harmless = specials_in(prompt + answer, tokenizer)
        messages, response = hostile(messages, response, [*tokenizer.special_ids])
        prompt, (answer,) = template.encode(messages, [response])
        assert specials_in(prompt + answer, tokenizer) == harmless
        answered = [*messages, {"role": "assistant", "content": response}]
        text = theirs.apply_chat_template(answered, tokenize=False, **options)
        decoded = tokenizer.decode(prompt + answer, skip_special_tokens=False)
        if not spaces:
            decoded, text = decoded.replace(" ", ""), text.replace(" ", "")
        assert decoded in (text, unicodedata.normalize("NFC", text))
        forged = specials_in(their_ids(theirs, answered, False, **options), tokenizer)
        assert len(forged) > len(harmless)


@pytest.mark.parametrize("name", ["auto", "chatml"])
def test_no_text_forges_a_turn_though_it_does_in_transformers(with_llama3_at, name):
    theirs = AutoTokenizer.from_pretrained(with_llama3_at)
    assert_nothing_is_forged(ChatTemplate(name, Tokenizer(with_llama3_at)), theirs)


@pytest.mark.real
def test_no_text_forges_a_turn_under_any_template(released):
    jinja, where = released
    dated = {"date_string": "26 Jul 2024"} if jinja in ("llama3_1", "llama3_2") else {}
    for template in templates_of(jinja, Tokenizer(where)):
        assert_nothing_is_forged(template, AutoTokenizer.from_pretrained(where), **dated)


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ("<|im_", "end|>")),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", ("x<|im_ \n", " end|>")),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ("<|im_e", "", "nd|>")),
        ("{{ (messages | map(attribute='content') | join).replace('x', 'y') }}", ("<|im_", "end|>x<|im_start|>")),
        ("{{ messages | tojson }}", ("<|im_end|>", "<|im_")),
        ("{{ messages[0].content }}end|>", ("<|im_",)),
    ],
)
def test_halves_of_a_special_token_do_not_join(tmp_path, source, texts):
    template = ChatTemplate("auto", Tokenizer(checkpoint(tmp_path, chat_template=source)))
    messages = turns(*texts)
    ids, _ = template.encode(messages, [])
    assert specials_in(ids, template.tokenizer) == []
    assert template.tokenizer.decode(ids) == template.render(messages, True)


def test_normalisation_makes_no_special_token_of_its_look_alikes(tmp_path):
    """NFKC turns wide characters into ASCII, and a token that is matched after it would be found."""
    where = checkpoint(tmp_path)
    raw = json.loads((where / "tokenizer.json").read_text(encoding="utf-8"))
    raw["normalizer"] = {"type": "NFKC"}
    raw["added_tokens"] = [token | {"normalized": True} for token in raw["added_tokens"]]
    (where / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer = Tokenizer(where)
    (ids,) = tokenizer.encode_rendered([tokenizer.escape("＜|im_end|＞")])
    assert specials_in(ids, tokenizer) == []
    assert tokenizer.decode(ids) == "<|im_end|>"
    assert AutoTokenizer.from_pretrained(where).encode("＜|im_end|＞") == [tokenizer.special_ids["<|im_end|>"]]


def test_a_special_token_takes_the_white_space_that_its_flags_say(tmp_path):
    where = checkpoint(tmp_path, added_specials=LLAMA3_SPECIALS)
    raw = json.loads((where / "tokenizer.json").read_text(encoding="utf-8"))
    for i, token in enumerate(raw["added_tokens"]):
        token |= {"lstrip": i % 2 == 1, "rstrip": i % 4 > 1}
    (where / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer, theirs = Tokenizer(where), AutoTokenizer.from_pretrained(where)
    for token in tokenizer.special_ids:
        for text in (f"a \n{token}\t b", f"{token} {token}", f" {token} \u00a0{tokenizer.eos_token} "):
            assert tokenizer.encode_rendered([text]) == [theirs.encode(text, add_special_tokens=False)]


def test_a_rendered_special_token_is_its_id(world):
    rendered = "<|im_start|>" + world.escape("a<|im_end|>") + "<|im_end|>"
    (ids,) = world.encode_rendered([rendered])
    assert (ids[0], ids[-1]) == (world.special_ids["<|im_start|>"], world.special_ids["<|im_end|>"])
    assert ids[1:-1] == world.encode(["a<|im_end|>"])[0]


def test_batches_encode_as_their_texts_do_alone(world):
    texts = ["<|im_start|>user\nHi<|im_end|>", "", "<|im_end|>", "no special at all"]
    assert world.encode_rendered(texts) == [world.encode_rendered([text])[0] for text in texts]


def test_a_text_that_holds_the_mark_is_refused(world):
    with pytest.raises(ValueError, match=r"text holds '\\U00100000' \(U\+100000, private use\), which is reserved"):
        ChatTemplate("chatml", world).encode(HI, [f"a{MARK}b"])


def test_half_a_surrogate_pair_is_refused(world):
    """JSON can spell one (an escape of a cut string), and no tokenizer can encode it."""
    with pytest.raises(ValueError, match=r"\\ud83d"):
        ChatTemplate("chatml", world).encode(HI, ["cut emoji: \ud83d"])


# --- SentencePiece's space before a text ---

PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SCHEMES = ["prepend", "always", "first", "never"]


def respaced(where: Path, scheme: str) -> Path:
    """The checkpoint's tokenizer.json with Llama 2's normaliser, or one of newer conversions' pre-tokenizers."""
    rust = RustTokenizer.from_file(str(where / "tokenizer.json"))
    if scheme == "prepend":
        rust.normalizer = PREPEND
    else:
        raw = json.loads(rust.to_str()) | {"normalizer": None}
        rust = RustTokenizer.from_str(json.dumps(raw))
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    rust.save(str(where / "tokenizer.json"))
    return where


@pytest.fixture(scope="module", params=SCHEMES)
def spaced(request, tmp_path_factory) -> tuple[str, Tokenizer, RustTokenizer]:
    """(a scheme, a tokenizer, the same of `tokenizers`): a, b, newline, ▁a, ▁b, </s> and <x> (special), <t> (added)."""
    vocab = ["<unk>", "</s>", "<x>", "<t>", "▁", "a", "b", "\n", "▁a", "▁b"]
    rust = RustTokenizer(BPE(dict(zip(vocab, range(10), strict=True)), [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    rust.add_special_tokens(["</s>", "<x>"])
    rust.add_tokens([AddedToken("<t>", normalized=False)])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    where = tmp_path_factory.mktemp(request.param)
    rust.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer(respaced(where, request.param))
    return request.param, tokenizer, RustTokenizer.from_file(str(where / "tokenizer.json"))


def tokens_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return " ".join(tokenizer.rust.id_to_token(i) for i in ids)


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [  # of Prepend, always, first, never
        ("a b", "", ("▁a ▁b", "▁a ▁b", "▁a ▁b", "a ▁b")),
        ("a b", "b\n", ("a ▁b",) * 4),
        (" a", "b\n", ("▁a",) * 4),
        (" a", "", ("▁ ▁a", "▁a", "▁a", "▁a")),  # Metaspace takes a space that is there for its own
        ("a", "b<x>", ("▁a", "▁a", "a", "a")),
        ("a</s>b", "", ("▁a </s> ▁b", "▁a </s> ▁b", "▁a </s> b", "a </s> b")),
        ("a</s>b", "b", ("a </s> ▁b", "a </s> ▁b", "a </s> b", "a </s> b")),
        ("<x>a", "", ("<x> ▁a", "<x> ▁a", "<x> a", "<x> a")),
        ("a<t>b", "b", ("a <t> ▁b", "a <t> ▁b", "a <t> b", "a <t> b")),  # an added token, though not special
        ("<t>b", "b", ("<t> ▁b", "<t> ▁b", "<t> b", "<t> b")),
        ("", "b", ("",) * 4),
    ],
)
def test_sentencepieces_space_stands_only_where_the_whole_text_has_it(spaced, text, after, expected):
    scheme, tokenizer, _ = spaced
    ids, again = tokenizer.encode_rendered([text, text], after)
    assert tokens_of(tokenizer, ids) == expected[SCHEMES.index(scheme)]
    assert again == ids


@settings(deadline=None, max_examples=200)
@given(
    st.text("ab \n", min_size=1), st.lists(st.sampled_from(["a", "b", " ", "\n", "<x>", "</s>", "<t>"])).map("".join)
)
def test_prompt_and_response_have_the_ids_of_the_whole(spaced, words, response):
    """The oracle is `tokenizers` on the joined text; a newline ends the prompt, for no token holds one and more."""
    _, tokenizer, rust = spaced
    for prompt in (words + "\n", words + "<x>", "<x>" + words + "\n"):
        whole = rust.encode(prompt + response).ids
        assert tokenizer.encode_rendered([prompt + response]) == [whole]
        assert tokenizer.encode_rendered([prompt])[0] + tokenizer.encode_rendered([response], prompt)[0] == whole


def test_a_response_continues_its_prompt(spaced):
    _, tokenizer, rust = spaced
    prompt, responses = ChatTemplate("plain", tokenizer).encode(turns("a"), ["b a", " b"])
    assert prompt == rust.encode("a\n").ids
    assert [tokens_of(tokenizer, ids) for ids in responses] == ["b ▁a </s>", "▁b </s>"]


@pytest.mark.parametrize("after", ["", "b\n", "b<x>"])
def test_a_response_alone_decodes_to_its_text_but_for_one_space_at_its_start(spaced, after):
    """`decode` drops the first space of any ids; only Prepend has put one of its own before a space."""
    scheme, tokenizer, _ = spaced
    decoded = [tokenizer.decode(ids) for ids in tokenizer.encode_rendered(["a b", " a"], after)]
    assert decoded == ["a b", " a" if scheme == "prepend" and after != "b\n" else "a"]


def test_the_mark_of_text_that_continues_is_refused_too(spaced):
    _, tokenizer, _ = spaced
    with pytest.raises(ValueError, match=r"text holds '\\U00100001' \(U\+100001, private use\), which is reserved"):
        tokenizer.escape("a\U00100001b")
    assert tokenizer.escape("a\U00100002b") == "a\U00100002b"


def test_a_byte_level_tokenizer_keeps_its_steps(world):
    """It has no space to cut, and its mark would be bytes by then."""
    raw = json.loads((WORLD / "tokenizer.json").read_text(encoding="utf-8"))
    now = json.loads(world.rust.to_str())
    assert [now[step] for step in ("normalizer", "pre_tokenizer")] == [raw["normalizer"], raw["pre_tokenizer"]]


SPACED_JINJAS = {
    "zephyr": (  # headers are plain characters, and end in a newline
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "mistral": (  # a response begins with the template's space
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'system' %}{{ m.content }}\n{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "chatml": (  # headers begin with a special token
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "special": (  # headers are special tokens
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}


@pytest.fixture(scope="module", params=SPACED_JINJAS)
def spaced_jinja(request) -> tuple[str, dict]:
    """(a Jinja's name, what a checkpoint needs to have for it)."""
    specials = {"chatml": ("<|im_start|>", "<|im_end|>"), "special": ("<|system|>", "<|user|>", "<|assistant|>")}
    more = {"chat_template": SPACED_JINJAS[request.param], "added_specials": specials.get(request.param, ())}
    return request.param, more


@pytest.fixture(scope="module", params=SCHEMES)
def stories(request, tmp_path_factory, real, spaced_jinja) -> Path:
    """stories260K's tokenizer, of Llama 2's kind, under each scheme and template; 猫 is an added token in it."""
    name, more = spaced_jinja
    where, source = tmp_path_factory.mktemp(name), real / "models" / "stories260K" / "hf"
    return respaced(checkpoint(where, source, added=("猫",), **more), request.param)


@pytest.mark.real
def test_a_sentencepiece_tokenizer_gives_the_ids_of_transformers(stories):
    """Responses that begin with a space or a newline among them: no token of it straddles these headers' ends."""
    template, theirs = ChatTemplate("auto", Tokenizer(stories)), AutoTokenizer.from_pretrained(stories)
    rows = [(messages, response, f" {response}", f"\n{response}", "") for messages, response in CONVERSATIONS]
    assert_ids_of_transformers(template, theirs, rows)


@pytest.mark.real
def test_no_text_forges_a_turn_under_a_sentencepiece_tokenizer(stories):
    assert_nothing_is_forged(
        ChatTemplate("auto", Tokenizer(stories)), AutoTokenizer.from_pretrained(stories), spaces=False
    )


@pytest.mark.real
def test_a_sentencepiece_response_decodes_alone_to_its_text(stories):
    """Up to its end-of-turn, and without the added token: under two schemes a space follows either."""
    template = ChatTemplate("auto", Tokenizer(stories))
    for messages, text in CONVERSATIONS:
        text = text.replace("猫", "")
        _, (ids,) = template.encode(messages, [text])
        end = next(i for i, token in enumerate(ids) if token in template.stop_ids)
        assert template.tokenizer.decode(ids[:end]) == text


# --- decoding as ids arrive ---

STREAMED = "Grass 🐄🌱, 👩\u200d👩\u200d👧 and 猫\ufffd naïve e\u0301.\n  שלום\t\ufffd\ufffd"


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    """Llama 2's kind: words begin with a space, rare characters are byte tokens, decoding drops the first space."""
    vocab = ["<s>", "</s>", "▁", "a", "b", "▁a", "é", "\ufffd", *(f"<0x{byte:02X}>" for byte in range(256))]
    rust = RustTokenizer(BPE(dict(zip(vocab, range(len(vocab)), strict=True)), [], byte_fallback=True))
    rust.add_special_tokens(["<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    where = tmp_path_factory.mktemp("sentencepiece")
    rust.save(str(where / "tokenizer.json"))
    return Tokenizer(where)


def assert_pieces_join_to_the_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = list(tokenizer.decode_stream(iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "" not in pieces


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_streamed_pieces_join_to_the_decoded_text_for_any_ids(world, sentencepiece, data):
    """Broken characters, special tokens in the midst of one, and ids outside the vocabulary among them."""
    tokenizer = data.draw(st.sampled_from([world, sentencepiece]))
    any_id = st.integers(0, tokenizer.rust.get_vocab_size() + 2)
    of_text = st.sampled_from(tokenizer.encode([STREAMED])[0])
    special = st.sampled_from([*tokenizer.special_ids.values()])
    assert_pieces_join_to_the_text(tokenizer, data.draw(st.lists(any_id | of_text | special, max_size=12)))


@pytest.mark.parametrize("name", ["world", "sentencepiece"])
def test_streamed_pieces_of_text_hold_whole_characters_wherever_the_stream_ends(request, name):
    tokenizer = request.getfixturevalue(name)
    text = STREAMED.replace("\ufffd", "")
    (ids,) = tokenizer.encode([text])
    assert not any("\ufffd" in piece for piece in tokenizer.decode_stream(ids))
    for end in range(len(ids)):
        assert_pieces_join_to_the_text(tokenizer, ids[:end])


def test_a_piece_is_given_with_the_id_that_completes_it(world):
    (ids,) = world.encode(["What does a cow eat?"])
    arrived: list[int] = []
    stream = world.decode_stream(i for i in ids if not arrived.append(i))
    for n, piece in enumerate(stream, start=1):
        assert (len(arrived), piece) == (n, world.decode([ids[n - 1]]))


@pytest.mark.real
def test_streamed_pieces_join_to_the_decoded_text_for_real_tokenizers(real, smollm2):
    story = (real / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:500]
    for where in (real / "tokenizers" / "qwen2.5", real / "models" / "stories260K" / "hf", smollm2):
        tokenizer = Tokenizer(where)
        (ids,) = tokenizer.encode([STREAMED + story + STREAMED])
        for end in range(len(ids)):
            assert_pieces_join_to_the_text(tokenizer, ids[:end])
        rng = random.Random(0)
        for _ in range(500):
            assert_pieces_join_to_the_text(tokenizer, rng.choices(range(tokenizer.rust.get_vocab_size()), k=12))


# --- the directory ---


def test_stop_ids_are_eos_and_what_generation_config_adds(tmp_path):
    where = checkpoint(tmp_path)
    assert Tokenizer(where).stop_ids == {2}
    for ends, expected in ((0, {0, 2}), ([0, 1], {0, 1, 2}), (None, {2})):
        (where / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert Tokenizer(where).stop_ids == expected


def test_a_token_may_be_written_as_an_object(tmp_path):
    where = checkpoint(tmp_path, eos_token={"content": "<|endoftext|>", "special": True})
    assert Tokenizer(where).eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": "{{ 'config' }}"},
        {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ 'config' }}"}]},
    ],
)
def test_the_template_is_the_jinja_file_or_else_that_of_the_config(tmp_path, settings):
    where = checkpoint(tmp_path, **settings)
    assert Tokenizer(where).chat_template == "{{ 'config' }}"
    (where / "chat_template.jinja").write_text("{{ 'file' }}")
    assert Tokenizer(where).chat_template == "{{ 'file' }}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no such file; a tokenizer is read from tokenizer.json alone"),
        ("tokenizer.json", "{}", "not a readable tokenizer"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list, expected an object"),
        ("generation_config.json", "3", "holds a int, expected an object"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"eos_token_id=\['2'\]: expected a token id"),
        ("generation_config.json", '{"eos_token_id": [[2]]}', r"eos_token_id=\[\[2\]\]: expected a token id"),
        ("tokenizer_config.json", '{"eos_token": {"x": 1}}', "eos_token={'x': 1}: expected a token's string"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token=5: expected a token's string"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template=5: expected Jinja text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 5}]}', "chat_template=5"),
    ],
)
def test_an_unreadable_tokenizer_is_refused_by_path(tmp_path, name, content, message):
    shutil.copytree(WORLD, tmp_path, dirs_exist_ok=True)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        Tokenizer(tmp_path)
    assert str(refused.value).startswith(str(tmp_path / name))


# --- errors of templates ---


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vicuna", {}, "template=vicuna: expected auto, chatml, qwen, qwen3, llama3, plain"),
        ("auto", {"chat_template": None}, "template=auto: the checkpoint has no chat template; name one of chatml"),
        ("llama3", {}, r"template=llama3: the tokenizer has no token <\|start_header_id\|>"),
        ("plain", {"eos_token": None}, "template=plain: the tokenizer names no eos_token"),
        ("plain", {"eos_token": "</s>"}, "template=plain: the tokenizer names no eos_token"),
        ("auto", {"chat_template": "{% for %}"}, "template=auto: the checkpoint's chat template does not parse"),
    ],
)
def test_a_template_that_cannot_serve_is_refused_at_once(tmp_path, name, settings, message):
    tokenizer = Tokenizer(checkpoint(tmp_path, **settings))
    with pytest.raises(ValueError, match=message):
        ChatTemplate(name, tokenizer)


def auto(where: Path, source: str) -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(checkpoint(where, chat_template=source)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages .roles must alternate"),
        ("{{ nothing.at_all }}", "refused the messages .'nothing' is undefined"),
        ("{{ 1 // 0 }}", "refused the messages .*division"),
        ("{{ 'a' + 1 }}", "refused the messages .*concatenate"),
        ("{{ messages.pop() }}", "refused the messages .*unsafe|not safely callable"),
    ],
)
def test_a_template_that_raises_is_a_value_error(tmp_path, source, message):
    with pytest.raises(ValueError, match=f"template=auto: the checkpoint's chat template {message}"):
        auto(tmp_path, source).encode(HI, ["Yes"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__ }}",
        "{{ self._TemplateReference__context.environment }}",
    ],
)
def test_a_hostile_template_gets_at_nothing(tmp_path, source):
    """jinja2's sandbox raises, or prints nothing; never a class, a function's globals or an environment."""
    try:
        prompt, _ = auto(tmp_path, source + "{{ messages[0].content }}").parts(HI, [])
    except ValueError as error:
        assert "unsafe" in str(error)
    else:
        assert prompt == "Hi"


@pytest.mark.parametrize(
    ("source", "default", "dated"),
    [
        ("{{ date_string | default('26 Jul 2024') }}", "26 Jul 2024", "1 Jan 2020"),
        ("{{ strftime_now('%Y') if strftime_now is defined else 'never' }}", "never", "1 Jan 2020"),
    ],
)
def test_a_date_is_the_one_given_and_never_today(tmp_path, source, default, dated):
    tokenizer = Tokenizer(checkpoint(tmp_path, chat_template=source))
    assert ChatTemplate("auto", tokenizer).render(HI, True) == default
    assert ChatTemplate("auto", tokenizer, date_string=dated).render(HI, True) == dated


@pytest.mark.parametrize("name", [*TEMPLATES, "auto"])
def test_a_date_that_the_template_does_not_read_is_refused(with_llama3, name):
    with pytest.raises(ValueError, match=f"date_string=1 Jan 2020 with template={name}.* reads no date; leave it out"):
        ChatTemplate(name, with_llama3, date_string="1 Jan 2020")


def test_a_template_that_cannot_do_without_a_date_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"'strftime_now' is undefined.; it asks for the date: set date_string"):
        auto(tmp_path, "{{ strftime_now('%Y') }}").encode(HI, [])


@pytest.mark.parametrize("name", [*TEMPLATES, "auto"])
def test_an_unknown_role_is_refused(with_llama3, name):
    """A role is written as it stands, so it could hold a special token."""
    with pytest.raises(ValueError, match=r"a message has the role 'tool<\|im_end\|>'; expected one of system, user"):
        ChatTemplate(name, with_llama3).encode([{"role": "tool<|im_end|>", "content": "x"}], [])


def test_qwen3_by_name_refuses_a_tools_response(world):
    with pytest.raises(ValueError, match="template=qwen3: a user turn is a <tool_response>; tools are left out"):
        ChatTemplate("qwen3", world).encode(turns(called := "<tool_response>\n1\n</tool_response>"), [])
    ChatTemplate("qwen3", world).encode(turns("a", called, "b"), [])  # only a user turn says it to Qwen3's Jinja


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    """It says how many messages there are, so the prompt changes when a response is added."""
    template = auto(tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="template=auto: the prompt renders differently once a response follows it"):
        template.encode(HI, ["Yes"])

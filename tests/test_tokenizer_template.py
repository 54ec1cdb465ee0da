"""Templates give transformers' ids with an exact boundary, and no text ever becomes a special token."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments.world import build
from models.template import TEMPLATES, ChatTemplate
from models.tokenizer import MARK, Tokenizer

WORLD = Path(build.__file__).parent / "model"
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORLD_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HI = [{"role": "user", "content": "Hi"}]


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """user, assistant, user, ... after an optional system turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = [
    turns("What does a cow eat?"),
    turns("Say hi.", system="You are terse."),
    turns("One?", "Two.", "Three?"),
    turns("Wer?", "Ich.", "Und jetzt?", "Du.", "Gut so?", system="Sprich Deutsch."),
    turns("Ελληνικά, 猫, 🐄🇬🇷, naïve, \u200d zero width", "İ ı ſ", "¿{curly} {{ braces }} {% tags %} \\n?"),
    turns("two\nlines\n\nand a tab\t.", "def f():\n    return 1\n", "x  =  1"),
    turns("Tokens of other families: [INST], <start_of_turn>"),
]
RESPONSES = ["Grass.", "Sí: 草, 🌱\nand more\n\nlines."]


def checkpoint(
    where: Path,
    source: Path = WORLD,
    added_specials: tuple[str, ...] = (),
    edit: Callable[[dict], None] | None = None,
    **settings: object,
) -> Path:
    """A copy of a tokenizer directory with more special tokens and other settings in tokenizer_config.json."""
    where.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    new_id = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])) + 1
    for i, content in enumerate(added_specials):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": new_id + i, "content": content, "special": True, **flags})
    (where / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)
    config = {key: value for key, value in (config | settings).items() if value is not None}
    (where / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return where


def their_ids(theirs: PreTrainedTokenizerBase, messages: list[dict], header: bool, **options) -> list[int]:
    return theirs.apply_chat_template(messages, add_generation_prompt=header, return_dict=False, **options)


def assert_ids_of_transformers(template: ChatTemplate, theirs: PreTrainedTokenizerBase, **options) -> None:
    """For every conversation: prompt ids, and prompt plus response ids, are those of apply_chat_template."""
    for messages in CONVERSATIONS:
        prompt, responses = template.encode(messages, RESPONSES)
        assert prompt == their_ids(theirs, messages, True, **options)
        for text, response in zip(RESPONSES, responses, strict=True):
            answered = [*messages, {"role": "assistant", "content": text}]
            assert prompt + response == their_ids(theirs, answered, False, **options)


@pytest.fixture(scope="module")
def world() -> Tokenizer:
    return Tokenizer(WORLD)


@pytest.fixture(scope="module")
def with_llama3(tmp_path_factory) -> Tokenizer:
    """The world's tokenizer, taught Llama 3's special tokens."""
    where = tmp_path_factory.mktemp("llama3")
    return Tokenizer(checkpoint(where, added_specials=LLAMA3_SPECIALS, bos_token="<|begin_of_text|>"))


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
    for messages in [*CONVERSATIONS, turns("<b>it's</b>", "é", "b", "c")]:
        for header in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=header, tokenize=False)
            assert template.render(messages, header) == expected


@pytest.mark.real
@pytest.mark.parametrize(
    ("jinja", "name"),
    [("qwen2_5", "qwen"), ("qwen3", "qwen3"), ("qwen3_instruct_2507", "chatml"), ("llama3", "llama3")],
)
def test_named_templates_and_auto_give_the_ids_of_transformers(real, tmp_path, jinja, name):
    source = (real / "templates" / f"{jinja}.jinja").read_text(encoding="utf-8")
    llama = {"added_specials": LLAMA3_SPECIALS, "bos_token": "<|begin_of_text|>"} if name == "llama3" else {}
    where = checkpoint(tmp_path, real / "tokenizers" / "qwen2.5", chat_template=source, **llama)
    tokenizer, theirs = Tokenizer(where), AutoTokenizer.from_pretrained(where)
    for chosen in (name, "auto"):
        assert_ids_of_transformers(ChatTemplate(chosen, tokenizer), theirs)


@pytest.mark.real
@pytest.mark.parametrize("jinja", ["llama3_1", "llama3_2"])
def test_auto_gives_the_ids_of_transformers_for_dated_templates_at_their_default_date(real, tmp_path, jinja):
    """We give a template no clock: Llama 3.2's then says what Llama 3.1's does, 26 Jul 2024, on every day."""
    source = (real / "templates" / f"{jinja}.jinja").read_text(encoding="utf-8")
    qwen = real / "tokenizers" / "qwen2.5"
    bos = "<|begin_of_text|>"
    where = checkpoint(tmp_path, qwen, added_specials=LLAMA3_SPECIALS, bos_token=bos, chat_template=source)
    template = ChatTemplate("auto", Tokenizer(where))
    assert_ids_of_transformers(template, AutoTokenizer.from_pretrained(where), date_string="26 Jul 2024")


@pytest.mark.real
def test_auto_gives_the_ids_of_transformers_for_a_real_instruct_model(smollm2):
    tokenizer = Tokenizer(smollm2)
    template = ChatTemplate("auto", tokenizer)
    assert_ids_of_transformers(template, AutoTokenizer.from_pretrained(smollm2))
    assert {tokenizer.decode([i], skip_special_tokens=False) for i in template.stop_ids} == {"<|im_end|>"}


@pytest.mark.real
def test_plain_text_is_encoded_and_decoded_as_by_transformers(real, smollm2):
    text = (real / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:5000] + "".join(
        m["content"] for messages in CONVERSATIONS for m in messages
    )
    for where in (real / "tokenizers" / "qwen2.5", real / "models" / "stories260K" / "hf", smollm2):
        ours, theirs = Tokenizer(where), AutoTokenizer.from_pretrained(where)
        (ids,) = ours.encode([text])
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == text


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
            turns("Hi", "No", "Hi"),
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


def test_a_rendered_special_token_is_its_id(world):
    rendered = "<|im_start|>" + world.escape("a<|im_end|>") + "<|im_end|>"
    (ids,) = world.encode_rendered([rendered])
    assert (ids[0], ids[-1]) == (world.special_ids["<|im_start|>"], world.special_ids["<|im_end|>"])
    assert ids[1:-1] == world.encode(["a<|im_end|>"])[0]


def test_batches_encode_as_their_texts_do_alone(world):
    texts = ["<|im_start|>user\nHi<|im_end|>", "", "<|im_end|>", "no special at all"]
    assert world.encode_rendered(texts) == [world.encode_rendered([text])[0] for text in texts]


def test_a_text_that_holds_the_mark_is_refused(world):
    with pytest.raises(ValueError, match=r"text holds '\\ue0a1' \(U\+E0A1, private use\), which is reserved here"):
        ChatTemplate("chatml", world).encode(HI, [f"a{MARK}b"])


def test_half_a_surrogate_pair_is_refused(world):
    """JSON can spell one (an escape of a cut string), and no tokenizer can encode it."""
    with pytest.raises(ValueError, match=r"\\ud83d"):
        ChatTemplate("chatml", world).encode(HI, ["cut emoji: \ud83d"])


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


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    """It says how many messages there are, so the prompt changes when a response is added."""
    template = auto(tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="template=auto: the prompt renders differently once a response follows it"):
        template.encode(HI, ["Yes"])

"""Preference data: every format gives one and the same Example, every bad row one line, every cut is announced."""

import json
import random
from pathlib import Path

import pytest

from dpo.data import describe_mix, mix_order, read_examples, split_by_prompt, trained_prompts
from dpo.formats import BadRow, Example, examples_of
from models.template import ChatTemplate
from models.tokenizer import Tokenizer

MODEL = Path(__file__).parent.parent / "experiments" / "world" / "model"
GOOD = {"prompt": "q", "chosen": "c", "rejected": "r"}


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(MODEL))


def read(folder: Path, text: str | bytes, *, name: str = "rows.jsonl", stage: str = "dpo", **options):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_examples(path, stage=stage, on_bad_row=options.pop("on_bad_row", "stop"), **options)


def messages(*turns: str) -> tuple[dict[str, str], ...]:
    """("system: be kind", "user: q") as messages."""
    split = [turn.split(": ", 1) for turn in turns]
    return tuple({"role": role, "content": content} for role, content in split)


def sharegpt(*turns: str) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages(*turns)]


# --- formats ---

TURNS = ("system: be kind", "user: q1", "assistant: a1", "user: q2")
SHARE = sharegpt(*TURNS)
CHAT = list(messages(*TURNS))
PAIR = {"chosen": "c", "rejected": "r"}
MULTI_TURN = {
    "guide": {"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT], **PAIR},
    "sharegpt": {
        "conversations": SHARE,
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "r"},
    },
    "alpaca": {"instruction": "q2", "system": "be kind", "history": [["q1", "a1"]], **PAIR},
    "alpaca_with_null_input": {
        "instruction": "q2", "input": None, "system": "be kind", "history": [["q1", "a1"]], **PAIR
    },
    "messages": {"messages": CHAT, **PAIR},
    "prompt_messages": {"prompt": CHAT, **PAIR},
    "one_message_lists": {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "r"}],
    },
}  # fmt: skip
ONE_TURN = {
    "prompt": {"prompt": "q\nmore", "system": "be kind", **PAIR},
    "alpaca_with_input": {"instruction": "q", "input": "more", "system": "be kind", "history": [], **PAIR},
    "alpaca_without_input": {"instruction": "q\nmore", "input": "", "system": "be kind", "history": None, **PAIR},
}
FILES = pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])


def write_rows(rows: list, name: str) -> str:
    return json.dumps(rows, indent=2) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows)


@FILES
@pytest.mark.parametrize("key", MULTI_TURN)
def test_every_multi_turn_format_gives_the_same_example(tmp_path, name, key):
    (example,), bad = read(tmp_path, write_rows([MULTI_TURN[key]], name), name=name)
    assert example.messages == messages(*TURNS) and example.responses == ("c", "r") and bad == []


@FILES
@pytest.mark.parametrize("key", ONE_TURN)
def test_every_one_turn_format_gives_the_same_example(tmp_path, name, key):
    """Alpaca's instruction and input are joined by one newline, as LLaMA-Factory joins them."""
    (example,), _ = read(tmp_path, write_rows([ONE_TURN[key]], name), name=name)
    assert example.messages == messages("system: be kind", "user: q\nmore") and example.responses == ("c", "r")


SFT_ROWS = {
    "conversations": {"conversations": sharegpt("user: q", "assistant: c")},
    "messages": {"messages": list(messages("user: q", "assistant: c"))},
    "prompt_messages": {"prompt": list(messages("user: q", "assistant: c"))},
    "alpaca": {"instruction": "q", "output": "c"},
    "prompt_completion": {"prompt": "q", "completion": "c"},
    "prompt_response": {"prompt": "q", "response": "c"},
    "preference_row": {"conversations": sharegpt("user: q"), **PAIR},
    "preference_row_with_an_output": {"instruction": "q", "output": "r", **PAIR},
}


@FILES
@pytest.mark.parametrize("key", SFT_ROWS)
def test_every_sft_format_gives_the_same_example(tmp_path, name, key):
    """A preference row gives its chosen response, even beside Alpaca's output, which may be the rejected one."""
    (example,), _ = read(tmp_path, write_rows([SFT_ROWS[key]], name), name=name, stage="sft")
    assert example.messages == messages("user: q") and example.responses == ("c",)


def test_a_system_prompt_beside_the_conversation_is_not_lost(tmp_path):
    """LLaMA-Factory's ShareGPT rows may hold the system prompt in a column of its own."""
    row = {"conversations": sharegpt("user: q"), "system": "be kind", **PAIR}
    try:
        (example,), _ = read(tmp_path, json.dumps(row))
    except BadRow:
        return  # refused is as good as read
    assert example.messages == messages("system: be kind", "user: q")


# --- file:line ---


def test_source_is_the_line_where_a_row_begins(tmp_path):
    """Blank lines count; an object of a .json array may begin and end anywhere."""
    lines = "\n" + json.dumps(GOOD) + "\n\n  \n" + json.dumps(GOOD) + "\n"
    examples, _ = read(tmp_path, lines)
    assert [e.source for e in examples] == [f"{tmp_path}/rows.jsonl:{n}" for n in (2, 5)]
    array = '[\n{"prompt": "q",\n "chosen": "c", "rejected": "r"},\n\n'
    array += json.dumps(GOOD) + "\n,\n" + json.dumps(GOOD) + ", " + json.dumps(GOOD) + "\n]\n"
    examples, _ = read(tmp_path, array, name="rows.json")
    assert [e.source for e in examples] == [f"{tmp_path}/rows.json:{n}" for n in (2, 5, 7, 7)]


def test_a_bad_row_of_a_json_array_is_named_by_its_own_line(tmp_path):
    array = '[\n{"prompt": "q",\n "chosen": "c",\n "rejected": "r"},\n{"prompt": "q",\n "chosen": "c"}\n]'
    with pytest.raises(BadRow, match=r"rows\.json:5: rejected is missing"):
        read(tmp_path, array, name="rows.json")


@FILES
def test_windows_line_ends_change_nothing(tmp_path, name):
    text = write_rows([GOOD, GOOD], name)
    unix, _ = read(tmp_path, text, name=name)
    windows, _ = read(tmp_path, text.replace("\n", "\r\n"), name=name)
    assert windows == unix


# --- bad rows ---

USER = [{"role": "user", "content": "q"}]
BAD_ROWS = {
    "not_an_object": (["q", "c", "r"], "a row must be an object, got list"),
    "a_number": (float("nan"), "a row must be an object, got float"),
    "no_keys": ({}, "no known format has these keys: none"),
    "unknown_keys": (
        {"question": "q", **PAIR},
        "no known format .*: .*question.*rejected.*; expected conversations",
    ),
    "no_chosen": ({"prompt": "q", "rejected": "r"}, "chosen is missing"),
    "no_rejected": ({"prompt": "q", "chosen": "c"}, "rejected is missing"),
    "chosen_is_null": ({**GOOD, "chosen": None}, "chosen must be text or one assistant turn, got NoneType None"),
    "chosen_is_a_number": ({**GOOD, "chosen": 7}, "chosen must be text or one assistant turn, got int 7"),
    "chosen_is_a_dialogue": ({**GOOD, "chosen": [*USER, *USER]}, "chosen must be text or one assistant turn, got list"),
    "chosen_is_an_empty_list": ({**GOOD, "chosen": []}, r"chosen must be .* got list \[\]"),
    "chosen_is_a_user_turn": ({**GOOD, "chosen": USER[0]}, "chosen is a user turn; expected the assistant's"),
    "chosen_is_empty": ({**GOOD, "chosen": ""}, "chosen is empty"),
    "rejected_is_blank": ({**GOOD, "rejected": " \n\t"}, "rejected is empty"),
    "equal": ({**GOOD, "rejected": "c"}, "chosen equals rejected"),
    "conversations_is_text": ({"conversations": "q", **PAIR}, "conversations must be a list .* got str 'q'"),
    "conversations_is_empty": ({"conversations": [], **PAIR}, r"conversations must be a list .* got list \[\]"),
    "messages_is_an_object": ({"messages": USER[0], **PAIR}, "messages must be a list .* got dict"),
    "turn_is_text": ({"conversations": ["q"], **PAIR}, r"conversations\[0\] must be an object .* got str 'q'"),
    "unknown_role": (
        {"prompt": [*USER, {"role": "tool", "content": "x"}], **PAIR},
        r"prompt\[1\] has the role str 'tool'; expected one of human, user, gpt",
    ),
    "role_is_missing": ({"prompt": [{"content": "x"}], **PAIR}, r"prompt\[0\] has the role NoneType None"),
    "role_is_a_list": ({"prompt": [{"role": [], "content": "x"}], **PAIR}, r"prompt\[0\] has the role list \[\]"),
    "content_is_missing": ({"messages": [{"role": "user"}], **PAIR}, r"messages\[0\] must hold text, got NoneType"),
    "content_is_parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}], **PAIR},
        r"messages\[0\] must hold text, got list",
    ),
    "prompt_is_a_number": ({**GOOD, "prompt": 7}, "prompt must be text, got int 7"),
    "prompt_is_nan": ({**GOOD, "prompt": float("nan")}, "prompt must be text, got float nan"),
    "prompt_is_an_empty_list": ({**GOOD, "prompt": []}, "(turns are none|prompt must be)"),
    "prompt_is_blank": ({**GOOD, "prompt": " "}, "the last user turn is empty"),
    "instruction_is_a_list": ({"instruction": ["q"], **PAIR}, "instruction must be text, got list"),
    "input_is_a_number": ({"instruction": "q", "input": 7, **PAIR}, "input must be text, got int 7"),
    "system_is_a_list": ({"instruction": "q", "system": ["be kind"], **PAIR}, "system must be text, got list"),
    "input_is_zero": ({"instruction": "q", "input": 0, **PAIR}, "input must be text, got int 0"),
    "system_is_false": ({"prompt": "q", "system": False, **PAIR}, "system must be text, got bool False"),
    "history_is_an_empty_object": ({"instruction": "q", "history": {}, **PAIR}, "history must be a list .* got dict"),
    "history_is_text": ({"instruction": "q", "history": "q1", **PAIR}, "history must be a list of .* got str 'q1'"),
    "history_of_one": ({"instruction": "q", "history": [["q1"]], **PAIR}, r"history must be .* got list \[\['q1'\]\]"),
    "history_of_numbers": ({"instruction": "q", "history": [["q1", 1]], **PAIR}, "history must be a list"),
    "two_users": ({"conversations": sharegpt("user: a", "user: b"), **PAIR}, "turns are user, user; expected"),
    "assistant_last": (
        {"conversations": sharegpt("user: a", "assistant: b"), **PAIR},
        "turns are user, assistant; expected .* user before the response",
    ),
    "assistant_first": ({"conversations": sharegpt("assistant: a", "user: b"), **PAIR}, "turns are assistant, user"),
    "system_late": ({"conversations": sharegpt("user: a", "system: s", "user: b"), **PAIR}, "turns are user, system"),
    "system_alone": ({"conversations": sharegpt("system: s"), **PAIR}, "turns are system; expected"),
}


@FILES
@pytest.mark.parametrize("key", BAD_ROWS)
def test_bad_row_is_refused_with_its_line_the_rule_and_what_was_given(tmp_path, name, key):
    row, rule = BAD_ROWS[key]
    text = json.dumps(GOOD) + "\n" + json.dumps(row) + "\n"
    if name == "rows.json":
        text = "[" + json.dumps(GOOD) + ",\n" + json.dumps(row) + "]"
    with pytest.raises(BadRow, match=rf"{name}:2: .*{rule}"):
        read(tmp_path, text, name=name)


@FILES
@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_an_unpaired_row_is_an_sft_row_with_a_label(tmp_path, name, label):
    for row in ({"messages": list(messages("user: q", "assistant: c"))}, {"prompt": "q", "completion": "c"}):
        (example,), _ = read(tmp_path, write_rows([row | {label: False, "weight": 2}], name), name=name, stage="kto")
        assert example.messages == messages("user: q") and example.responses == ("c",)
        assert (example.label, example.weight) == (False, 2.0)


def test_a_preference_row_is_two_unpaired_ones_and_counts_once(tmp_path):
    rows = [{"prompt": "q", **PAIR}, {"prompt": "q2", **PAIR}]
    examples, _ = read(tmp_path, write_rows(rows, "rows.json"), name="rows.json", stage="kto", max_samples=1)
    assert [(example.responses, example.label) for example in examples] == [(("c",), True), (("r",), False)]


@pytest.mark.parametrize(
    ("row", "stage", "rule"),
    [
        ({"prompt": "q", "completion": "c"}, "kto", "label is missing; an unpaired row needs label"),
        ({"prompt": "q", "completion": "c", "label": 1}, "kto", "label must be true or false, got int 1"),
        ({"prompt": "q", "completion": "c", "kto_tag": "yes"}, "kto", "kto_tag must be true or false, got str 'yes'"),
        ({"prompt": "q", "completion": "c", "label": True}, "dpo", "chosen is missing; .* rows with a label are for"),
        ({"prompt": "q", "chosen": "c", "rejected": "c"}, "kto", "chosen equals rejected"),
    ],
)
def test_a_bad_unpaired_row_is_refused_with_its_line_and_the_rule(tmp_path, row, stage, rule):
    with pytest.raises(BadRow, match=rf"rows\.jsonl:1: .*{rule}"):
        read(tmp_path, json.dumps(row), stage=stage)


BAD_SFT_ROWS = {
    "no_response": ({"prompt": "q"}, "no response; expected a last assistant turn"),
    "empty_turn": ({"conversations": sharegpt("user: q", "assistant: ")}, "the response is empty"),
    "empty_output": ({"instruction": "q", "output": " "}, "output is empty"),
    "output_is_a_number": ({"instruction": "q", "output": 7}, "output must be text or one assistant turn, got int 7"),
    "prompt_is_an_empty_list": ({"prompt": [], "completion": "c"}, "(turns are none|prompt must be)"),
    "assistant_alone": ({"messages": [{"role": "assistant", "content": "c"}]}, "turns are none"),
}


@pytest.mark.parametrize("key", BAD_SFT_ROWS)
def test_bad_sft_row_is_refused_with_its_line_the_rule_and_what_was_given(tmp_path, key):
    row, rule = BAD_SFT_ROWS[key]
    with pytest.raises(BadRow, match=rf"rows\.jsonl:1: .*{rule}"):
        read(tmp_path, json.dumps(row), stage="sft")


BAD_LINES = {
    "truncated": (json.dumps(GOOD)[:-3].encode(), "not valid JSON"),
    "invalid_utf8": (json.dumps(GOOD).encode()[:11] + b"\xff" + json.dumps(GOOD).encode()[11:], "byte 12 is not UTF-8"),
    "utf16": (json.dumps(GOOD).encode("utf-16"), "byte 1 is not UTF-8"),
    "nul": (b"\x00" + json.dumps(GOOD).encode(), "not valid JSON"),
    "nul_inside_a_string": (json.dumps(GOOD).encode().replace(b'"q"', b'"q\x00"'), "not valid JSON"),
    "byte_order_mark": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "not valid JSON .*BOM"),
    "two_objects": (json.dumps(GOOD).encode() * 2, "not valid JSON"),
    "deep_nesting": (b'{"prompt": ' + b"[" * 99999 + b"]" * 99999 + b"}", "not valid JSON .*recursion"),
    "endless_number": (b'{"prompt": "q", "score": ' + b"1" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("key", BAD_LINES)
def test_a_line_that_is_no_json_is_a_bad_row_and_the_others_are_read(tmp_path, key):
    """Among four lines the second is bad; the last one needs no line end."""
    line, rule = BAD_LINES[key]
    good = json.dumps(GOOD).encode()
    text = b"\n".join([good, line, good, good])
    with pytest.raises(BadRow, match=rf"rows\.jsonl:2: {rule}"):
        read(tmp_path, text)
    examples, bad = read(tmp_path, text, on_bad_row="skip")
    assert [e.source[-1] for e in examples] == ["1", "3", "4"]
    assert len(bad) == 1 and "rows.jsonl:2: " in bad[0]


BAD_ARRAYS = {
    "an_object": (json.dumps(GOOD).encode(), r"rows\.json:1: expected a JSON array"),
    "empty": (b"", r"rows\.json:1: expected a JSON array"),
    "no_rows": (b"[]", "no usable row"),
    "cut_short": (
        b"[" + json.dumps(GOOD).encode() + b",\n" + json.dumps(GOOD).encode()[:-3],
        r"rows\.json:2: not valid",
    ),
    "unclosed": (b"[\n" + json.dumps(GOOD).encode() + b"\n", r"rows\.json:3: not valid JSON .*cut short"),
    "missing_comma": (b"[\n" + json.dumps(GOOD).encode() * 2 + b"]", r"rows\.json:2: not valid JSON"),
    "trailing_comma": (b"[" + json.dumps(GOOD).encode() + b",\n]", r"rows\.json:\d: not valid JSON"),
    "two_arrays": ((b"[" + json.dumps(GOOD).encode() + b"]\n") * 2, r"rows\.json:2: not valid JSON"),
    "byte_order_mark": (b"\xef\xbb\xbf[" + json.dumps(GOOD).encode() + b"]", r"rows\.json:1: .*(BOM|byte.order mark)"),
    "invalid_utf8": (b"[\n" + json.dumps(GOOD).encode() + b",\n\xff]", r"rows\.json:3: byte \d+ is not UTF-8"),
    "deep_nesting": (b"[" * 99999, r"rows\.json:1: not valid JSON .*recursion"),
    "endless_number": (b"[\n" + b"1" * 5000 + b"]", r"rows\.json:2: not valid JSON"),
}


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
@pytest.mark.parametrize("key", BAD_ARRAYS)
def test_a_json_file_that_is_no_array_is_refused_whatever_on_bad_row_says(tmp_path, key, on_bad_row):
    """What follows a syntax error cannot be told from it; no row after it is guessed, and none is lost in silence."""
    text, rule = BAD_ARRAYS[key]
    with pytest.raises(ValueError, match=rule):
        read(tmp_path, text, name="rows.json", on_bad_row=on_bad_row)


def test_skip_collects_bad_rows_and_keeps_the_order_of_the_good(tmp_path):
    rows = [{**GOOD, "prompt": f"q{i}"} for i in range(5)]
    rows[1]["rejected"] = "c"
    rows[3] = {"prompt": "q3"}
    examples, bad = read(tmp_path, write_rows(rows, "rows.jsonl"), on_bad_row="skip")
    assert [e.messages[0]["content"] for e in examples] == ["q0", "q2", "q4"]
    assert [line.partition(": ")[0] for line in bad] == [f"{tmp_path}/rows.jsonl:2", f"{tmp_path}/rows.jsonl:4"]


def test_bad_rows_alone_are_an_error_that_shows_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"no usable row \(2 bad\): .*rows\.jsonl:1: no known format"):
        read(tmp_path, "{}\n{}\n", on_bad_row="skip")


@pytest.mark.parametrize("row", [{"a\nb": 1}, {"a\ud800": 1}, {**GOOD, "prompt": "\ud800\n", "chosen": 1}])
def test_a_bad_row_is_one_line_that_can_be_written_to_a_file(tmp_path, row):
    """A key may hold a line end, or half a surrogate pair, which UTF-8 cannot encode."""
    with pytest.raises(BadRow) as caught:
        read(tmp_path, json.dumps(row))
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode("utf-8")


def test_a_long_value_is_shown_by_its_beginning(tmp_path):
    with pytest.raises(BadRow, match=r"got list \['x+\.\.\.$"):
        read(tmp_path, json.dumps({**GOOD, "chosen": ["x" * 10000, "y"]}))


def test_a_value_nested_too_deeply_to_show_is_a_bad_row():
    """Python's JSON parser and its repr stop a few levels apart, so that a row may be read that cannot be shown."""
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(BadRow, match=r"^f:1: chosen must be text or one assistant turn, got list"):
        examples_of({**GOOD, "chosen": [nested, nested]}, "f:1", "dpo")


@FILES
def test_max_samples_counts_rows_from_the_start_and_reads_no_further(tmp_path, name):
    """Good or bad: of good, bad, good the first two give one Example; what follows may even be broken."""
    text = write_rows([GOOD, {}, GOOD], name)
    text = text.rstrip().removesuffix("]") + (", {broken" if name == "rows.json" else "{broken")
    examples, bad = read(tmp_path, text, name=name, on_bad_row="skip", max_samples=2)
    assert (len(examples), len(bad)) == (1, 1)


# --- splitting ---

# 40 rows of 15 prompts: prompt i stands in rows i, i + 15 and, below 10, i + 30.
POOL = [Example(messages(f"user: q{i % 15}"), (f"c{i}", f"r{i}"), f"f:{i + 1}") for i in range(40)]


def prompts(examples: list[Example]) -> set[str]:
    return {e.messages[0]["content"] for e in examples}


@pytest.mark.parametrize("val_size", [0.1, 0.5, 1, 7])
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(val_size):
    """A prompt has 2 or 3 rows, so at most 2 rows more than asked for are held out; both sides keep file order."""
    train, held = split_by_prompt(POOL, val_size, seed=0)
    assert not prompts(train) & prompts(held)
    wanted = val_size * 40 if val_size < 1 else val_size
    assert wanted <= len(held) <= wanted + 2
    assert sorted(train + held, key=POOL.index) == POOL
    assert train == sorted(train, key=POOL.index) and held == sorted(held, key=POOL.index)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_file():
    shuffled = random.Random(1).sample(POOL, len(POOL))
    assert prompts(split_by_prompt(shuffled, 0.3, seed=0)[1]) == prompts(split_by_prompt(POOL, 0.3, seed=0)[1])
    assert prompts(split_by_prompt(POOL, 0.3, seed=1)[1]) != prompts(split_by_prompt(POOL, 0.3, seed=0)[1])


def test_prompts_differ_by_their_system_and_earlier_turns_too():
    """The same last question after another system prompt is another prompt, and may be on the other side."""
    examples = [Example(messages(f"system: s{i}", "user: q"), ("c", "r"), f"f:{i}") for i in range(4)]
    train, held = split_by_prompt(examples, 2, seed=0)
    assert (len(train), len(held)) == (2, 2)


@pytest.mark.parametrize("val_size", [40, 0.99])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(val_size):
    with pytest.raises(ValueError, match=rf"val_size={val_size}: leaves 0 of 40 rows"):
        split_by_prompt(POOL, val_size, seed=0)


# --- mixing ---


@pytest.mark.parametrize("lengths", [(2, 3), (3, 2), (4,), (1, 5, 2), (3, 3)])
@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
def test_rows_taken_in_turn_are_those_of_hugging_faces_datasets(strategy, lengths):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pools = [datasets.Dataset.from_dict({"x": [f"{d}.{i}" for i in range(n)]}) for d, n in enumerate(lengths)]
    until = "first_exhausted" if strategy == "interleave_under" else "all_exhausted"
    theirs = datasets.interleave_datasets(pools, stopping_strategy=until)["x"]
    assert [f"{d}.{i}" for d, i in mix_order(lengths, strategy, None, seed=0)] == list(theirs)


def test_concat_is_one_after_the_other_whatever_the_seed():
    assert mix_order((2, 1), "concat", None, seed=5) == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("seed", range(5))
def test_rows_drawn_stop_where_the_first_or_each_dataset_is_used_up(seed):
    """Each dataset's rows come in their order; the draw that uses a dataset up is the last."""
    lengths, probs = (6, 9, 4), (0.5, 0.3, 0.2)
    for strategy, used_up in (("interleave_under", any), ("interleave_over", all)):
        order = mix_order(lengths, strategy, probs, seed)
        for dataset, length in enumerate(lengths):
            rows = [row for d, row in order if d == dataset]
            assert rows == [i % length for i in range(len(rows))]
        ends = [used_up(sum(d == k for d, _ in order[:n]) >= length for k, length in enumerate(lengths))
                for n in range(len(order) + 1)]  # fmt: skip
        assert ends.index(True) == len(order)


def test_draws_follow_the_probabilities_and_the_seed():
    """Of 700 draws at 0.75 three in four, within five standard deviations (11.5 each); weights need not sum to 1."""
    order = mix_order((600, 600), "interleave_under", (3, 1), seed=1)
    assert mix_order((600, 600), "interleave_under", (0.75, 0.25), seed=1) == order
    assert mix_order((600, 600), "interleave_under", (3, 1), seed=2) != order
    assert abs(sum(d == 0 for d, _ in order[:700]) - 525) < 57


def test_a_mixture_says_how_many_rows_each_dataset_gives():
    order = mix_order((2, 4), "interleave_over", None, seed=0)
    assert describe_mix(["a", "b"], (2, 4), order) == "mixed: 4 rows from the 2 of a, 4 rows from the 4 of b"


def test_a_split_holds_over_mixed_rows_that_repeat():
    """A row that interleave_over repeats is on one side, with every repetition."""
    repeated = [POOL[row] for _, row in mix_order((40, 90), "interleave_over", None, seed=0) if row < 40]
    train, held = split_by_prompt(repeated, 0.2, seed=0)
    assert not prompts(train) & prompts(held) and len(train) + len(held) == len(repeated) > 80


def test_held_out_prompts_that_are_trained_on_are_counted_once_each():
    """Of the prompts q0, q1 and q2, the first two are trained on; another system prompt makes another prompt."""
    other = Example(messages("system: s", "user: q0"), ("c", "r"), "f:1")
    assert trained_prompts(POOL[:2], [POOL[0], POOL[15], POOL[1], POOL[2]]) == (2, 3)
    assert trained_prompts([other], POOL) == (0, 15)


# --- numbers of a row ---


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_may_say_weight_margin_and_soft_label(tmp_path, name):
    """Whole numbers too; null is as if the key were not there."""
    rows = [GOOD | {"weight": 2, "margin": -0.5, "soft_label": 0.75}, GOOD | {"weight": None}, GOOD | {"weight": 0}]
    text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
    examples, _ = read(tmp_path, text, name=name)
    assert [(e.weight, e.margin, e.soft_label) for e in examples] == [(2, -0.5, 0.75), (1, 0, None), (0, 0, None)]
    assert all(isinstance(e.weight, float) for e in examples)


BAD_NUMBERS = [
    ("weight", "-1", "weight must be at least 0, got int -1"),
    ("weight", "true", "weight must be at least 0, got bool True"),
    ("weight", "NaN", "weight must be at least 0, got float nan"),
    ("weight", "1" + "0" * 400, "weight must be at least 0, got int 1000"),
    ("margin", '"x"', "margin must be a finite number, got str 'x'"),
    ("margin", "-Infinity", "margin must be a finite number, got float -inf"),
    ("margin", "1e999", "margin must be a finite number, got float inf"),
    ("margin", "[1]", "margin must be a finite number, got list [1]"),
    ("soft_label", "2", "soft_label must be between 0 and 1, got int 2"),
    ("soft_label", "-0.1", "soft_label must be between 0 and 1, got float -0.1"),
    ("soft_label", "NaN", "soft_label must be between 0 and 1, got float nan"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_NUMBERS)
def test_a_number_of_a_row_out_of_its_range_is_a_bad_row(tmp_path, key, value, message):
    text = f'{json.dumps(GOOD)}\n{{"prompt": "q", "chosen": "c", "rejected": "r", "{key}": {value}}}\n'
    with pytest.raises(BadRow) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: {message}")
    examples, bad = read(tmp_path, text, on_bad_row="skip")
    assert len(examples) == 1 and bad == [str(caught.value)]

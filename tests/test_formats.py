"""Formats: whoever wrote a row, its texts come back unchanged; what is odd about it is said and never mended."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data import read_examples
from dpo.formats import FORMATS, BadRow, Example, examples_of
from dpo.rankings import RANKING_TO_PAIRS
from dpo.sources import find_dataset
from dpo.turns import ROLES


def fuzz(short: int) -> settings:
    """The short form is the plain `pytest`'s; DPO_FUZZ=10000 is the long one, see tests/README.md."""
    return settings(deadline=None, max_examples=int(os.environ.get("DPO_FUZZ", short)), derandomize=True)


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


USER, CHOSEN, REJECTED = turn("user", "q"), turn("assistant", "c"), turn("assistant", "r")
PAIR = {"chosen": "c", "rejected": "r"}


def one(row: object, stage: str = "dpo", **options) -> Example:
    (example,) = examples_of(row, "f:1", stage, **options)
    return example


def refused(row: object, rule: str, stage: str = "dpo", **options) -> None:
    with pytest.raises(BadRow, match=f"^f:1: {rule}"):
        examples_of(row, "f:1", stage, **options)


# --- whole conversations ---


def v1(row: dict) -> dict:
    """LLaMA-Factory's v1 rows of whole conversations: an answer at the end is what is trained on."""
    new = {}
    for side, turns in row.items():
        ends = turns[-1]["role"] == "assistant"
        new[f"{side}_messages"] = [
            {**t, "content": [{"type": "text", "value": t["content"]}], "loss_weight": float(ends and t is turns[-1])}
            for t in turns
        ]
    return new


def hh(row: dict) -> dict:
    names = {"user": "Human", "assistant": "Assistant"}
    return {s: "".join(f"\n\n{names[t['role']]}: {t['content']}" for t in row[s]) for s in ("chosen", "rejected")}


OLD = [turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2")]
WHOLE = {"chosen": [*OLD, CHOSEN], "rejected": [*OLD, REJECTED]}


@pytest.mark.parametrize("row", [WHOLE, v1(WHOLE), hh(WHOLE)], ids=["whole", "v1", "hh"])
def test_the_common_beginning_of_whole_conversations_is_the_prompt(row):
    example = one(row)
    assert (list(example.messages), example.responses) == (OLD, ("c", "r"))
    assert one(row, "sft").responses == ("c",)
    assert [(e.responses, e.label) for e in examples_of(row, "f:1", "kto")] == [(("c",), True), (("r",), False)]
    assert one(row | {"system": "s"}).messages[0] == turn("system", "s")


@pytest.mark.parametrize("beside", [
    {"prompt": OLD}, {"prompt": "q2"}, {"prompt": "q1"}, {"messages": WHOLE["chosen"]}, {"prompt": ""},
])  # fmt: skip
def test_a_prompt_beside_whole_conversations_may_say_the_same(beside):
    """As a list, as one of the questions, or as the chosen conversation, which UltraFeedback's rows hold once more."""
    assert one(WHOLE | beside) == one(WHOLE)


@pytest.mark.parametrize("beside", [{"prompt": "q"}, {"prompt": OLD[1:]}, {"messages": [turn("system", "s"), *OLD]}])
def test_a_prompt_beside_whole_conversations_that_says_something_else_is_refused(beside):
    refused(WHOLE | beside, f"{next(iter(beside))} is not what the conversations begin with, got")


CONFLICTS = {
    "same": ([*OLD, CHOSEN], [*OLD, CHOSEN], "chosen equals rejected"),
    "other_question": ([*OLD, CHOSEN], [*OLD[:2], USER, REJECTED], "{} differ at turn 3, before their last; both must"),
    "longer": ([*OLD, CHOSEN], [*OLD, REJECTED, USER, CHOSEN], "{} differ at turn 4, before their last; both must"),
    "shorter": ([*OLD, CHOSEN], [OLD[0], REJECTED], "{} differ at turn 2, before their last; both must answer one"),
    "no_answer": ([*OLD, CHOSEN], OLD, "{1} ends in a user turn; expected the assistant's"),
    "empty_answer": ([*OLD, turn("assistant", " ")], [*OLD, REJECTED], "the last turn of {0} is empty"),
    "two_answers": ([*OLD, *OLD[1:2], CHOSEN], [*OLD, *OLD[1:2], REJECTED], "turns are user, assistant, user, assist"),
    "answer_alone": ([CHOSEN], [REJECTED], "turns are none; expected"),
}  # fmt: skip


@pytest.mark.parametrize("written", [dict, v1, hh])
@pytest.mark.parametrize("key", CONFLICTS)
def test_conversations_that_are_no_pair_are_refused_in_precise_words(key, written):
    chosen, rejected, rule = CONFLICTS[key]
    row = written({"chosen": chosen, "rejected": rejected})
    names = list(row)
    rule = rule.replace("{0}", names[0]).replace("{1}", names[1]).replace("{}", " and ".join(names))
    refused(row, rule if key != "same" else "chosen equals rejected")


@pytest.mark.parametrize("written", [dict, v1, hh])
def test_sft_reads_the_chosen_conversation_whatever_the_other_one_says(written):
    assert one(written({"chosen": [*OLD, CHOSEN], "rejected": [USER]}), "sft").responses == ("c",)


def test_a_dialogue_begins_with_a_mark_and_keeps_every_other_blank():
    """One blank after the colon is the mark's; all else is the text's."""
    example = one({"chosen": "\n\nHuman:  q \n\nAssistant:c\n", "rejected": "\n\nHuman:  q \n\nAssistant: r"})
    assert (example.messages[0]["content"], example.responses) == (" q ", ("c\n", "r"))
    row = hh(WHOLE)
    refused(row | {"rejected": "Sure." + row["rejected"]}, r"rejected must begin with '\\n\\nHuman:' .* got str 'Sure")
    refused(row | {"rejected": 7}, "rejected must be text, got int 7")


def test_a_dialogue_as_prompt_may_end_in_the_mark_of_the_answer():
    """TRL's and Nectar's form of HH."""
    for end in ("", "\n\nAssistant:", "\n\nAssistant: "):
        example = one({"prompt": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2" + end, **PAIR})
        assert list(example.messages) == OLD


# --- turns ---


def test_text_parts_are_one_text():
    """OpenAI's and LLaMA-Factory's; an empty list and anything but text are refused."""
    content = [{"type": "text", "text": "a"}, {"type": "text", "value": "b "}]
    assert one({"messages": [turn("user", content)], **PAIR}).messages == (turn("user", "ab "),)
    for bad in ([], [*content, {"type": "image_url"}], ["a"], [{"type": "text", "text": 1}]):
        refused({"messages": [turn("user", bad)], **PAIR}, r"messages\[0\] must hold text, got list")


def test_null_keys_of_a_turn_are_as_if_they_were_not_there():
    """A .parquet file has every key in every row."""
    mixed = {"from": None, "value": None, "role": "user", "content": "q", "tool_calls": None, "loss_weight": None}
    assert one({"messages": [mixed], "conversations": None, **PAIR}).messages == (USER,)


@pytest.mark.parametrize(
    ("weights", "bad"), [((0, 1, 0, 1), 1), ((0, 0, 0, 0.5), 3), ((0, 0, 0, 0), 3), ((1, 0, 0, 1), 0)]
)
def test_a_loss_weight_that_means_another_training_is_refused(weights, bad):
    row = v1(WHOLE)
    for weight, given_turn in zip(weights, row["rejected_messages"], strict=True):
        given_turn["loss_weight"] = weight
    refused(row, rf"rejected_messages\[{bad}\] has loss_weight .*; only the last answer is trained on")


@pytest.mark.parametrize("key", ["tools", "images", "videos", "audios"])
def test_what_is_no_text_is_refused_by_name(key):
    for nothing in (None, "", [], "[]"):
        assert one({"prompt": "q", key: nothing, **PAIR}) == one({"prompt": "q", **PAIR})
    refused({"prompt": "q", key: ["x"], **PAIR}, rf"{key} must be empty, got list \['x'\]; only text is trained on")


def test_tool_calls_of_a_turn_are_refused():
    refused({"messages": [{**USER, "tool_calls": [{"id": 1}]}], **PAIR}, r"messages\[0\] has tool_calls list")


def test_dimensions_are_kept():
    """The guide's."""
    dimensions = {"safety": {"chosen": 5, "rejected": 4}}
    assert one({"prompt": "q", "dimensions": dimensions, **PAIR}).dimensions == dimensions
    assert one({"prompt": "q", "dimensions": None, **PAIR}).dimensions is None
    for bad in ({"safety": 5}, {"safety": {"chosen": 5}}, {"safety": {"chosen": 5, "rejected": "4"}}):
        refused({"prompt": "q", "dimensions": bad, **PAIR}, r"dimensions: 'safety' must be \{chosen: number, rejected")
    refused({"prompt": "q", "dimensions": [5], **PAIR}, r"dimensions must be an object, got list \[5\]")


# --- rankings ---

# By score: a 3, b 1, c 3, d 2.
TEXTS, SCORED = list("abcd"), [3, 1, 3, 2]
RANKED = {
    "ultrafeedback": {"completions": [{"response": t, "overall_score": s} for t, s in zip(TEXTS, SCORED, strict=True)]},
    "rated": {"completions": [{"text": t, "rating": float(s)} for t, s in zip(TEXTS, SCORED, strict=True)]},
    "nectar": {"answers": [{"answer": t, "rank": 4 - s} for t, s in zip(TEXTS, SCORED, strict=True)]},
    "scores": {"responses": TEXTS, "scores": SCORED},
    "ranks": {"responses": TEXTS, "ranks": [1, 3, 1, 2]},
    "rank": {"responses": TEXTS, "rank": [-5, 7, -5, 0.5]},
}
PAIRS = {
    "best_worst": ["ab"],
    "best_rest": ["ab", "ad"],
    "all": ["ab", "ad", "cd", "cb", "db"],
}  # fmt: skip


@pytest.mark.parametrize("policy", PAIRS)
@pytest.mark.parametrize("key", RANKED)
def test_a_ranking_becomes_the_pairs_of_its_policy(key, policy):
    """Of a and c, which are equally good, the first stands for both; together they are no pair."""
    examples = examples_of({"prompt": "q", **RANKED[key]}, "f:1", "dpo", ranking_to_pairs=policy)
    assert sorted("".join(e.responses) for e in examples) == sorted(PAIRS[policy])
    assert all(e.messages == (USER,) and (e.margin, e.source) == (0, "f:1") for e in examples)


def test_every_policy_is_tested():
    assert list(PAIRS) == list(RANKING_TO_PAIRS)


def test_a_ranking_gives_sft_its_best_and_kto_both_ends():
    row = {"instruction": "q", **RANKED["scores"]}
    assert one(row, "sft").responses == ("a",)
    assert [(e.responses, e.label) for e in examples_of(row, "f:1", "kto")] == [(("a",), True), (("b",), False)]


@given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=6), policy=st.sampled_from(list(RANKING_TO_PAIRS)))
def test_a_pair_is_a_better_and_a_worse_response_and_all_is_every_such_pair(scores, policy):
    pairs = RANKING_TO_PAIRS[policy](scores)
    better = {(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b}
    assert set(pairs) <= better and len(set(pairs)) == len(pairs) and bool(pairs) == bool(better)
    if policy == "all":
        assert set(pairs) == better
    assert policy != "best_worst" or len(pairs) <= 1


BAD_RANKINGS = {
    "ties": ({"responses": ["a", "b"], "scores": [2, 2]}, "responses are 2 of one score; a pair needs a better"),
    "one": ({"responses": ["a"], "scores": [2]}, "responses are 1 of one score"),
    "equal_texts": ({"responses": ["a", "a"], "scores": [1, 2]}, r"responses\[1\] equals responses\[0\] under two"),
    "no_scores": ({"responses": ["a", "b"]}, "responses have no scores; expected one of overall_score, score"),
    "too_few_scores": ({"responses": ["a", "b"], "scores": [1]}, "scores must be a list of 2 numbers.* got list .1."),
    "score_is_text": ({"responses": ["a", "b"], "scores": [1, "2"]}, r"scores\[1\] must be a finite number, got str"),
    "score_is_nan": ({"responses": ["a", "b"], "ranks": [1, float("nan")]}, r"ranks\[1\] must be a finite number, got"),
    "score_is_true": ({"responses": ["a", "b"], "ranks": [1, True]}, r"ranks\[1\] must be a finite number, got bool"),
    "score_is_missing": (
        {"completions": [{"response": "a", "score": 1}, {"response": "b"}]},
        r"completions\[1\]\.score must be a finite number, got NoneType",
    ),
    "text_is_missing": ({"completions": [{"score": 1}]}, r"completions\[0\] must be text, or an object with"),
    "text_is_empty": ({"responses": ["a", " "], "scores": [1, 2]}, r"responses\[1\] is empty"),
    "no_responses": ({"responses": []}, r"responses must be a list of responses, got list \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("key", BAD_RANKINGS)
def test_a_bad_ranking_is_refused_with_the_key_and_the_rule(key):
    row, rule = BAD_RANKINGS[key]
    refused({"prompt": "q", **row}, rule)


def test_a_ranking_without_a_prompt_is_refused():
    refused(RANKED["scores"], "no prompt beside the ranked responses; expected one of conversations")


# --- the table ---

OF_FORMAT = {
    "llamafactory_v1": v1(WHOLE),
    "ranked": {"prompt": "q", **RANKED["scores"]},
    "whole": WHOLE,
    "hh": hh(WHOLE),
    "conversations": {"conversations": [USER], **PAIR},
    "messages": {"messages": [USER], **PAIR},
    "alpaca": {"instruction": "q", **PAIR},
    "prompt": {"prompt": "q", **PAIR},
}


def test_every_format_is_tested():
    assert list(OF_FORMAT) == list(FORMATS)


@pytest.mark.parametrize("key", OF_FORMAT)
def test_a_format_is_recognised_as_if_it_were_named(key):
    row = OF_FORMAT[key]
    assert examples_of(row, "f:1", "dpo", data_format=key) == examples_of(row, "f:1", "dpo")


@pytest.mark.parametrize("key", OF_FORMAT)
def test_a_row_without_a_key_of_the_format_that_is_named_is_refused_with_the_key(key):
    for needed in FORMATS[key].needs:
        refused({"x": 1}, f"{FORMATS[key].needs[0]} is missing; data_format={key} needs ", data_format=key)
        row = {k: v for k, v in OF_FORMAT[key].items() if k != needed}
        refused(row, f"{needed} is missing; data_format={key}", data_format=key)
    if key == "ranked":
        refused({"prompt": "q"}, "no list of responses; expected one of completions", data_format=key)


def test_a_format_that_is_named_reads_a_row_that_others_would_fit():
    row = {"conversations": [USER], "prompt": "p", **PAIR}
    assert one(row).messages == (USER,) and one(row, data_format="prompt").messages == (turn("user", "p"),)


# --- any row, any text ---

KEYS = ["conversations", "messages", "prompt", "instruction", "input", "system", "history", "chosen", "rejected"]
KEYS += ["output", "completion", "from", "value", "role", "content", "label", "tools", "dimensions", "weight", "type"]
KEYS += ["chosen_messages", "rejected_messages", "loss_weight", "tool_calls", "text"]
KEYS += ["completions", "responses", "answers", "scores", "ranks", "rank", "score", "response"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
LEAVES |= st.sampled_from([*ROLES, "tool", "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b", "q"])
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS), v, max_size=3), max_leaves=8
)
TURNS = st.lists(st.builds(turn, st.sampled_from(list(ROLES)), st.sampled_from(["q", "a", ""])), max_size=4)
VALUES |= TURNS | st.lists(st.integers(0, 3), max_size=3) | st.lists(st.sampled_from(["a", "b"]), max_size=3)
ROWS = VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)
STAGES, POLICIES = st.sampled_from(["dpo", "sft", "kto"]), st.sampled_from(list(RANKING_TO_PAIRS))


@fuzz(80)
@given(row=ROWS, stage=STAGES, data_format=st.none() | st.sampled_from(list(FORMATS)), ranking_to_pairs=POLICIES)
def test_any_json_value_gives_examples_or_a_bad_row(tmp_path_factory, row, stage, data_format, ranking_to_pairs):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(row))
    options = {"data_format": data_format, "ranking_to_pairs": ranking_to_pairs}
    try:
        examples, bad = read_examples(path, stage=stage, on_bad_row="stop", **options)
    except BadRow as error:
        assert str(error).startswith(f"{path}:1: ") and len(str(error).splitlines()) == 1
        return
    assert examples and bad == []
    for example in examples:
        assert len(example.responses) == (2 if stage == "dpo" else 1) and all(
            text.strip() for text in example.responses
        )
        assert example.messages[-1]["role"] == "user" and (example.label is None) == (stage != "kto")
        assert len(set(example.responses)) == len(example.responses)


TEXT = st.text(min_size=1, max_size=30).filter(str.strip) | st.sampled_from(
    [" a ", "a\r\n", "\u2028b\x00", "\ud800c", "é"]
)
NO_MARK = TEXT.filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
PROMPT = st.builds(
    lambda pairs, last: [*sum(pairs, ()), last], st.lists(st.tuples(NO_MARK, NO_MARK), max_size=2), NO_MARK
)
SIDES = st.lists(NO_MARK, min_size=2, max_size=2, unique=True)


def in_every_format(prompt: list[str], chosen: str, rejected: str) -> dict[str, dict]:
    """The same conversation and pair as every format writes it."""
    roles = ("user", "assistant")
    turns = [turn(roles[i % 2], text) for i, text in enumerate(prompt)]
    sides = {"chosen": [*turns, turn("assistant", chosen)], "rejected": [*turns, turn("assistant", rejected)]}
    pair, pairs = {"chosen": chosen, "rejected": rejected}, list(zip(prompt[:-1:2], prompt[1::2], strict=True))
    return {
        "llamafactory_v1": v1(sides),
        "ranked": {"prompt": turns, "responses": [rejected, chosen], "ranks": [2, 1]},
        "whole": sides,
        "hh": hh(sides),
        "conversations": {"conversations": [{"from": t["role"], "value": t["content"]} for t in turns], **pair},
        "messages": {"messages": turns, **pair},
        "alpaca": {"instruction": prompt[-1], "history": pairs, **pair},
        "prompt": {"prompt": turns, "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]},
    }


@fuzz(80)
@given(prompt=PROMPT, sides=SIDES, ascii_only=st.booleans())
def test_texts_come_back_as_they_were_written_from_every_format(tmp_path_factory, prompt, sides, ascii_only):
    rows = in_every_format(prompt, *sides)
    assert list(rows) == list(FORMATS)
    path = tmp_path_factory.getbasetemp() / "texts.jsonl"
    ascii_only = ascii_only or "\ud800" in "".join([*prompt, *sides])  # half a surrogate pair is no UTF-8
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows.values()), newline="\n")
    examples, _ = read_examples(path, stage="dpo", on_bad_row="stop")
    for example in examples:
        assert [m["content"] for m in example.messages] == prompt and list(example.responses) == sides


# --- real files ---


def promised() -> list[tuple[str, str, int, int, int, dict[str, int]]]:
    """The table of tests/README.md: file, stage, rows, read, refused, and how many for each reason."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [
        (file.strip("`"), stage, *map(int, counts), {rule: int(n) for n, rule in re.findall(r"(\d+) `([^`]+)`", why)})
        for file, stage, *counts, why in rows
    ]


@pytest.mark.real
@pytest.mark.parametrize("given", ["name", "path"])
@pytest.mark.parametrize("row", promised(), ids=lambda row: row[0])
def test_real_files_give_the_rows_that_the_readme_promises(real, row, given):
    """By path, and by name: in dataset_info.json, where it is one, else that of the file."""
    file, stage, rows, read, refused_rows, why = row
    folder = real / "preferences"
    dataset = str(folder / file) if given == "path" else file.partition(".json")[0]
    examples, bad = read_examples(find_dataset(dataset, str(folder)), stage=stage, on_bad_row="skip")
    assert (len(examples), len(bad), len(examples) + len(bad)) == (read, refused_rows, rows)
    assert {rule: sum(rule in line for line in bad) for rule in why} == why and sum(why.values()) == refused_rows
    assert len({e.source for e in examples}) == read


def test_a_score_that_is_null_hides_none_and_a_dimension_that_is_null_is_none():
    """As a .parquet file has them, whose rows all have every key."""
    items = [{"response": text, "overall_score": None, "rating": n} for text, n in (("a", 3), ("b", 1))]
    (example,) = examples_of({"prompt": "q", "completions": items}, "f:1", "dpo")
    assert example.responses == ("a", "b")
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    both = {"x": {"chosen": 1, "rejected": 2}, "y": None}
    assert examples_of(row | {"dimensions": both}, "f:1", "dpo")[0].dimensions == {"x": both["x"]}
    assert examples_of(row | {"dimensions": {"y": None}}, "f:1", "dpo")[0].dimensions is None


def test_an_empty_instruction_leaves_no_line_before_its_input():
    row = {"instruction": "", "input": "What is up?", "chosen": "a", "rejected": "b"}
    assert examples_of(row, "f:1", "dpo")[0].messages == ({"role": "user", "content": "What is up?"},)

"""Structure: every planted fault is found, and what looks like one and is none is left alone."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_doctor_text import corpus_of

from dpo.doctor.structure import (
    bad_rows,
    barely_different,
    broken_text,
    cut_off,
    edit_ratio,
    ends_mid_sentence,
    formatting_only,
    is_refusal,
    levenshtein,
    no_answer,
    refusals,
    role_marks,
    scripts,
)

GOOD = ("What is it?", "It is a lamp.", "It is a chair.")
ENGLISH = "This is the house that you have seen, and it was with them."
SPANISH = "Esta es la casa que los dos han visto, pero está con el perro para una noche."


def flagged(check, question="What is it?", chosen="It is a lamp.", rejected="It is a chair.") -> bool:
    """Whether the check flags this row, second of three; the others must stay alone."""
    rows = check(corpus_of(GOOD, (question, chosen, rejected), GOOD)).rows
    assert set(rows) <= {1}
    return bool(rows)


@cache
def slow_levenshtein(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    replaced = slow_levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, slow_levenshtein(a[1:], b) + 1, slow_levenshtein(a, b[1:]) + 1)


@settings(deadline=None)
@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_levenshtein_is_the_recursion(a, b):
    assert levenshtein(a, b) == slow_levenshtein(a, b)
    ratio = slow_levenshtein(a, b) / max(len(a), len(b), 1)
    assert edit_ratio(a, b, below=0.4) == (ratio if a + b and ratio < 0.4 else None)


def test_levenshtein_of_long_texts():
    assert levenshtein("x" * 70 + "kitten" + "y" * 70, "x" * 70 + "sitting" + "y" * 70) == 3
    assert levenshtein("ab" * 100, "ba" * 100) == 2


def test_two_sides_that_differ_in_formatting_only():
    assert flagged(formatting_only, chosen="**It** is\na lamp!", rejected="it is a LAMP.")
    assert not flagged(formatting_only, chosen="It is a + b.", rejected="It is a - b, or a = b.")
    assert not flagged(formatting_only, chosen="👍", rejected="👎")
    assert not flagged(formatting_only, chosen="2 + 2", rejected="2 = 2")


def test_barely_different_rows_come_closest_first():
    text = "a" * 100
    check = barely_different(corpus_of(("q", text, text[:-5] + "bbbbb"), ("q", text, text[:-1] + "b"), GOOD))
    assert list(check.rows) == [1, 0]
    assert check.numbers == {"below_10_percent": 2, "below_2_percent": 1, "share": 2 / 3}


@pytest.mark.parametrize("text", ["fiancÃ© of", "itâ€™s", "a\x00b", "\x85", "b\ufffdd", "half \ud800"])
def test_broken_text(text):
    assert flagged(broken_text, rejected=text)
    prompt = broken_text(corpus_of((text, "a", "b")))
    assert not prompt.rows and "1 prompts hold such too" in prompt.summary


def test_well_formed_text_of_any_script_is_not_broken():
    assert not flagged(broken_text, chosen="Ça va, Ärger, naïve – “œuvre” ©\t\r\n国会 안녕 👍", rejected="Ãfrica")


@pytest.mark.parametrize("text", ["No.<|im_end|>", "[INST] go", "</s>", "Yes.\n\nHuman: and", "### Response:\nNo"])
def test_role_marks(text):
    assert flagged(role_marks, chosen=text)
    assert not flagged(role_marks, question=text)


def test_what_is_no_role_mark():
    text = "<b>bold</b> a <| b |> c, the human: an animal. Class[int]; ### Instructions to follow"
    assert not flagged(role_marks, chosen=text)


@pytest.mark.parametrize("text", ["...", "N/A", " null ", "—"])
def test_no_answer(text):
    assert flagged(no_answer, rejected=text)


@pytest.mark.parametrize("text", ["No", "42", "👍", "是"])
def test_a_short_answer_is_an_answer(text):
    assert not flagged(no_answer, rejected=text)


def test_languages():
    assert flagged(scripts, chosen=ENGLISH, rejected=SPANISH)
    assert flagged(scripts, chosen=ENGLISH, rejected="Это дом, который стоит здесь давно")
    assert flagged(scripts, question="请问这是什么东西呢", chosen=ENGLISH, rejected=ENGLISH + " And more.")
    assert not flagged(scripts, chosen="以下是如何启动的步骤", rejected="const app = express(); app.listen(port);")
    assert not flagged(scripts, chosen=ENGLISH, rejected="Lorem ipsum dolor sit amet consectetur")
    assert not flagged(scripts, chosen="これは日本語の文章です", rejected="日本国会議事堂のことです")


@pytest.mark.parametrize(
    "text", ["The first of these is the one that was", "1. Design: think of the rules and how they fit,", "```\nx = 1"]
)
def test_ends_mid_sentence(text):
    assert ends_mid_sentence(text)


@pytest.mark.parametrize(
    "text", ["Paris", "This ends as a good sentence should do.", "- a thing that has no end of its own at all",
             "```\nx = 1\n```", "他说这是一个很好的主意。", "So one and two and three and four are 10",
             "You will find more of it than you need at https://a.org/b", 'He said to all of us that day: "No"', ""],
)  # fmt: skip
def test_ends_where_it_should(text):
    assert not ends_mid_sentence(text)


def test_refusals():
    assert is_refusal("I'm sorry, but no.") and is_refusal("As an AI, I have none.") and is_refusal("抱歉，我不知道")
    assert not is_refusal("Say sorry to her.") and not is_refusal("x" * 60 + "I cannot help")


@pytest.mark.parametrize("check, text", [(refusals, "I cannot."), (cut_off, "a b c d e f g h")])
def test_a_mark_is_grave_where_it_tells_which_side_is_chosen(check, text):
    def verdict(*only: tuple[int, str]) -> str:
        rows = [(f"q{i}", text if side == "chosen" else "Yes.", text if side == "rejected" else "No.")
                for count, side in only for i in range(count)]  # fmt: skip
        return check(corpus_of(*rows)).verdict

    assert verdict((30, "rejected"), (70, "none")) == "warn"
    assert verdict((15, "rejected"), (15, "chosen"), (70, "none")) == "note"
    assert verdict((1, "rejected"), (70, "none")) == "ok"
    both = check(corpus_of(*[("q", text, text + " too")] * 100))
    assert both.verdict == "ok" and both.numbers["both"] == 100 and not both.rows


def test_bad_rows_are_counted_and_the_first_is_told():
    check = bad_rows(["f:3: chosen is empty", "f:4: chosen is empty"], 98)
    assert check.verdict == "note" and "2 of 100" in check.summary and "f:3" in check.summary
    assert bad_rows(["f:3"], 1).verdict == "warn" and bad_rows([], 1).verdict == "ok"

"""Leaks: 13 shared words are one, 12 are none, and a short prompt needs 8 or all of its own."""

import json

import pytest
from test_doctor_text import corpus_of

from dpo.doctor.leaks import benchmark_prompts, leaks

WORDS = [f"w{i}" for i in range(40)]


def text(*words: str) -> str:
    return " ".join(words)


def leaked(prompts: list[str], others: list[str]) -> dict[int, str]:
    corpus = corpus_of(*[(prompt, "a", "b") for prompt in prompts])
    other = corpus.vocabulary.read(others)
    check = leaks(corpus, "held_out", other, [f"held_out.jsonl:{i}" for i in range(1, len(others) + 1)])
    assert check.numbers["rows"] == len(check.rows) and (check.verdict == "ok") == (not check.rows)
    return dict(check.rows)


def test_a_long_prompt_leaks_with_13_words_in_a_row():
    prompts = [
        "x y",
        text("x", *WORDS[5:18], "y"),
        text("x", *WORDS[5:17], "y", *WORDS[18:30]),
        text("x", "y", *WORDS[28:]),
    ]
    rows = leaked(prompts, ["unrelated", text(*WORDS)])
    assert rows == {1: "13 words in a row of the prompt of held_out.jsonl:2"}


def test_a_short_prompt_leaks_with_8_words_in_a_row():
    prompts = [text("x", *WORDS[:8], "y"), text("x", *WORDS[:7], "y")]
    assert list(leaked(prompts, [text(*WORDS[:10])])) == [0]
    assert not leaked(prompts, [text(*WORDS[:13])])  # 13 words long, so 13 are asked for


def test_a_shorter_prompt_leaks_whole_only():
    assert leaked(["Say: HI!", "say hi to all", ""], ["say hi", ""]) == {0: "the prompt of held_out.jsonl:1"}


def test_what_many_prompts_share_is_their_template():
    template = text(*WORDS[:15])
    prompts = [f"{template} {i}" for i in range(30)]
    assert not leaked(prompts, [template + " else"])
    assert len(leaked(prompts[:9], [template + " else"])) == 9


def test_words_do_not_run_from_one_prompt_into_the_next():
    assert not leaked([text(*WORDS[:6]), text(*WORDS[6:13])], [text(*WORDS[:13])])


@pytest.mark.parametrize(
    "row, prompt",
    [
        ("hi", "hi"),
        ({"question": "hi", "answer": "no"}, "hi"),
        ({"turns": ["hi", "and"]}, "hi\nand"),
        ({"instruction": "hi", "output": "no"}, "hi"),
        ({"conversations": [{"from": "human", "value": "hi"}], "chosen": "no"}, "hi"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "hi"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}]}, "hi"),
    ],
)
def test_prompts_of_a_benchmark(row, prompt, tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert benchmark_prompts(path) == ([prompt], [f"{path}:1"])


@pytest.mark.parametrize("row, given", [({"goal": "hi"}, "'goal'"), (3, "int"), ({"prompt": 3}, "'prompt'")])
def test_a_benchmark_without_prompts_is_refused(row, given, tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"bench.jsonl:1: no prompt in {given}; expected text, or one of prompt"):
        benchmark_prompts(path)


def test_an_empty_or_broken_benchmark_is_refused(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"bench.jsonl: holds no row"):
        benchmark_prompts(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"bench.jsonl:1: not valid JSON"):
        benchmark_prompts(path)

"""Prompts are the conversations of any rows, each once, whatever responses stand beside them."""

import json

import pytest

from dpo.evals.prompts import prompts_sha256, read_prompts

ASK = [{"role": "user", "content": "Why?"}]
SO = {"role": "assistant", "content": "So."}
LONG = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *ASK]


def read(path, *names: str, **settings):
    settings = {"max_samples": None, "data_format": None, "on_bad_row": "stop"} | settings
    return read_prompts([str(path / name) for name in names], str(path), **settings)


def write(path, *rows, name: str = "rows.jsonl") -> None:
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Why?"}, ASK),
        ({"prompt": LONG}, LONG),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, ASK),
        ({"messages": ASK}, ASK),
        ({"messages": [*ASK, SO]}, ASK),
        ({"conversations": [{"from": "human", "value": "Why?"}], "chosen": "So.", "rejected": "No."}, ASK),
        ({"instruction": "Why?", "input": "", "output": ""}, ASK),
        ({"instruction": "Why?", "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *ASK]),
        ({"chosen": [*LONG, SO], "rejected": [*LONG, {"role": "assistant", "content": "No."}]}, LONG),
        ({"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}, ASK),
    ],
)  # fmt: skip
def test_the_prompt_of_a_row(tmp_path, row, messages):
    write(tmp_path, row)
    (prompt,), bad = read(tmp_path, "rows.jsonl")
    assert list(prompt.messages) == messages and not bad


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "asks.txt").write_text("Why?\n\n  Human: or not?  \n\u2028", encoding="utf-8")
    prompts, _ = read(tmp_path, "asks.txt")
    assert [p.text for p in prompts] == ["Why?", "Human: or not?"]
    assert prompts[0].source == str(tmp_path / "asks.txt")
    (tmp_path / "asks.txt").write_bytes(b"Why?\n\xff")
    with pytest.raises(ValueError, match=r"asks\.txt: byte 6 is not UTF-8"):
        read(tmp_path, "asks.txt")


def test_a_prompt_that_stands_twice_is_asked_once(tmp_path):
    write(tmp_path, {"prompt": "Why?"}, {"prompt": ASK, "chosen": "So.", "rejected": "No."}, {"prompt": "How?"})
    prompts, _ = read(tmp_path, "rows.jsonl")
    assert [p.text for p in prompts] == ["Why?", "How?"] and len({p.id for p in prompts}) == 2


def test_ids_and_digests_hang_on_the_words_alone(tmp_path):
    write(tmp_path, {"prompt": "Why?"}, {"prompt": "How?"})
    write(tmp_path, {"messages": ASK, "source": "web"}, {"prompt": "How?"}, name="other.jsonl")
    (first, _), (second, _) = read(tmp_path, "rows.jsonl"), read(tmp_path, "other.jsonl")
    assert [p.id for p in first] == [p.id for p in second] and prompts_sha256(first) == prompts_sha256(second)
    assert prompts_sha256(first) != prompts_sha256(first[::-1])
    assert second[0].source == "web" and second[1].source == str(tmp_path / "other.jsonl")


def test_several_turns_are_shown_with_their_roles(tmp_path):
    write(tmp_path, {"prompt": LONG})
    assert read(tmp_path, "rows.jsonl")[0][0].text == "user: a\n\nassistant: b\n\nuser: Why?"


def test_max_samples_counts_rows_and_bad_ones_are_skipped_or_said(tmp_path):
    write(tmp_path, {"prompt": "Why?"}, {"nothing": 1}, {"prompt": "How?"})
    assert [p.text for p in read(tmp_path, "rows.jsonl", max_samples=1)[0]] == ["Why?"]
    prompts, (bad,) = read(tmp_path, "rows.jsonl", on_bad_row="skip")
    assert len(prompts) == 2 and "rows.jsonl:2: no known format has these keys: 'nothing'" in bad
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: no known format"):
        read(tmp_path, "rows.jsonl")


def test_a_file_without_a_prompt_is_refused(tmp_path):
    write(tmp_path, {"nothing": 1})
    with pytest.raises(ValueError, match=r"^eval_dataset=.*rows\.jsonl: no prompt, 1 bad rows: .*'nothing'"):
        read(tmp_path, "rows.jsonl", on_bad_row="skip")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt: no prompt, 0 bad rows$"):
        read(tmp_path, "empty.txt")


def test_the_worlds_prompts_are_its_held_out_ones(tmp_path):
    prompts, _ = read_prompts(["world"], str(tmp_path), max_samples=None, data_format=None, on_bad_row="stop")
    assert len(prompts) == 126 and {p.source for p in prompts} == {"world"}

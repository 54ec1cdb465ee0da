"""Labelling: rows in any form become pairs, and what a judge says of them rows that train.py reads."""

import json

import pytest
from omegaconf import OmegaConf

from dpo.data import read_examples
from dpo.formats import BadRow
from dpo.judge.label import Row, check_output, other_files, read_pairs, rows_of, write_rows
from dpo.judge.verdict import Judged, Pair, Verdict

ASKED = [{"role": "user", "content": "Hi"}]


def read(row: object) -> list[Row]:
    return rows_of(row, "f:1", data_format=None, ranking_to_pairs="all")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "responses": ["Hello", "No"]},
        {"prompt": "Hi", "completions": [{"text": "Hello"}, {"text": "No"}]},
        {"messages": ASKED, "response_a": "Hello", "response_b": "No"},
        {"conversations": [{"from": "human", "value": "Hi"}], "answers": ["Hello", "No"]},
        {"instruction": "Hi", "response_a": "Hello", "response_b": "No"},
    ],
)
def test_two_responses_beside_any_prompt_are_an_unlabelled_pair(row):
    (found,) = read(row)
    assert found == Row(Pair("f:1", tuple(ASKED), "Hello", "No"), labelled=False, more={})


def test_rows_of_chosen_and_rejected_are_labelled_pairs_with_chosen_first():
    (found,) = read({"id": "q7", "prompt": "Hi", "chosen": "Hello", "rejected": "No"})
    assert found == Row(Pair("q7", tuple(ASKED), "Hello", "No"), labelled=True, more={})


def test_a_ranking_is_several_pairs_of_their_own_ids():
    found = read({"id": 3, "prompt": "Hi", "responses": ["c", "a", "b"], "scores": [1, 3, 2]})
    assert [(row.pair.id, row.pair.first, row.pair.second) for row in found] == [
        ("3#1", "a", "b"), ("3#2", "a", "c"), ("3#3", "b", "c"),
    ]  # fmt: skip
    assert all(row.labelled for row in found)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Hi", "responses": ["a", "b", "c"]}, "f:1: 3 responses without scores; two are compared"),
        ({"prompt": "Hi", "response_a": "a", "response_b": 7}, r"responses\[1\] must be text"),
        ({"prompt": "Hi", "response_a": "a", "response_b": " "}, r"responses\[1\] is empty"),
        ({"prompt": "Hi", "responses": ["a", "a"]}, "f:1: both responses are the same"),
        ({"responses": ["a", "b"]}, "no prompt beside"),
        ({"prompt": "Hi"}, "chosen"),
        ([], "a row must be an object"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_place(row, says):
    with pytest.raises(BadRow, match=says) as caught:
        read(row)
    assert str(caught.value).startswith("f:1: ")


def config(path, **more):
    keys = {"dataset": str(path), "dataset_dir": "data", "data_format": None, "ranking_to_pairs": "best_worst",
            "max_samples": None, "on_bad_row": "stop"}  # fmt: skip
    return OmegaConf.create(keys | more)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bad_rows_stop_or_are_counted(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "Hi"}, {"prompt": "Hi", "responses": ["a", "b"]})
    with pytest.raises(BadRow, match=r"p.jsonl:1"):
        read_pairs(config(path))
    rows, bad = read_pairs(config(path, on_bad_row="skip"))
    assert [row.pair.id for row in rows] == [f"{path}:2"] and len(bad) == 1
    with pytest.raises(ValueError, match=r"no usable row \(1 bad\)"):
        read_pairs(config(path, on_bad_row="skip", max_samples=1))


def test_an_id_that_stands_twice_is_refused(tmp_path):
    """Labels of people and resumed runs find a pair by it."""
    row = {"id": "x", "prompt": "Hi", "responses": ["a", "b"]}
    with pytest.raises(ValueError, match="the id 'x' stands twice"):
        read_pairs(config(write(tmp_path / "p.jsonl", row, row)))


# --- what is written ---


def rows(n: int) -> list[Row]:
    return [Row(Pair(str(i), ASKED, f"first {i}", f"second {i}"), False, {}) for i in range(n)]


def test_train_reads_what_is_written_and_ties_and_invalid_rows_stand_beside(tmp_path):
    path = tmp_path / "sub" / "out.jsonl"
    judged = [Judged(Verdict.FIRST, 0.9, ()), Judged(Verdict.SECOND, 0.2, ()), Judged(Verdict.TIE, 0.5, ()),
              Judged(Verdict.INVALID, None, (), "no letter"), Judged(Verdict.FIRST, None, ())]  # fmt: skip
    write_rows(path, rows(5), judged, judge="m", soft_labels=False)
    examples, _ = read_examples(path, stage="dpo", on_bad_row="stop")
    assert [example.responses for example in examples] == [
        ("first 0", "second 0"), ("second 1", "first 1"), ("first 4", "second 4"),
    ]  # fmt: skip
    assert all(list(example.messages) == ASKED and example.soft_label is None for example in examples)
    said = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["judge_p"] for row in said] == [0.9, 0.8, None] and said[1]["id"] == "1"
    ties, invalid = (json.loads(file.read_text()) for file in other_files(path).values())
    assert ties["responses"] == ["first 2", "second 2"] and invalid["reason"] == "no letter"


def test_soft_labels_are_the_probability_that_chosen_is_better(tmp_path):
    judged = [Judged(Verdict.FIRST, 0.9, ()), Judged(Verdict.SECOND, 0.2, ()), Judged(Verdict.FIRST, None, ())]
    write_rows(tmp_path / "out.jsonl", rows(3), judged, judge="m", soft_labels=True)
    examples, _ = read_examples(tmp_path / "out.jsonl", stage="dpo", on_bad_row="stop")
    assert [example.soft_label for example in examples] == [0.9, 0.8, None]


def test_what_a_row_says_beside_its_label_goes_with_its_responses(tmp_path):
    """margin and soft_label are of the label that is gone."""
    row = {"id": 7, "source": "web", "prompt": "Hi", "chosen": "Hello", "rejected": "No", "weight": 2, "margin": 1.5,
           "soft_label": 0.9, "dimensions": {"safety": {"chosen": 5, "rejected": 3}}}  # fmt: skip
    for verdict, safety in ((Verdict.FIRST, (5, 3)), (Verdict.SECOND, (3, 5)), (Verdict.TIE, (5, 3))):
        path = tmp_path / f"{verdict.value}.jsonl"
        write_rows(path, read(row), [Judged(verdict, None, ())], judge="m", soft_labels=False)
        path = path if verdict is not Verdict.TIE else other_files(path)[verdict]
        ((found,), _) = read_pairs(config(path))
        scores = dict(zip(("chosen", "rejected"), safety, strict=True))
        assert found.pair.id == "7" and found.more == {"source": "web", "weight": 2, "dimensions": {"safety": scores}}
        assert not json.loads(path.read_text()).keys() & {"margin", "soft_label"}


def test_what_was_not_judged_can_be_judged_again(tmp_path):
    write_rows(tmp_path / "o.jsonl", rows(1), [Judged(Verdict.INVALID, None, (), "x")], judge="m", soft_labels=False)
    again, _ = read_pairs(config(tmp_path / "o.jsonl.invalid.jsonl"))
    assert [(row.pair.first, row.pair.second, row.labelled) for row in again] == [("first 0", "second 0", False)]


def test_no_file_is_ever_overwritten(tmp_path):
    for name in ("o.jsonl", "o.jsonl.ties.jsonl", "o.jsonl.invalid.jsonl"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} exists, and is never overwritten"):
            check_output(str(tmp_path / "o.jsonl"))
        (tmp_path / name).unlink()
    for name in (None, "out.json"):
        with pytest.raises(ValueError, match=f"output_file={name}: expected the name of a .jsonl file"):
            check_output(name)

"""Labels of people: by pair id, contradictions refused, what is missing invalid."""

import json

import pytest

from dpo.judge.human import HumanJudge, read_labels
from dpo.judge.verdict import Pair, Verdict

ASKED = [{"role": "user", "content": "Why?"}]


def labels(tmp_path, *rows):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_are_found_by_the_pairs_id(tmp_path):
    said = ("first", "second", "tie", "invalid")
    judge = HumanJudge(labels(tmp_path, *({"id": i, "verdict": verdict} for i, verdict in enumerate(said))))
    judged = judge([Pair(str(i), ASKED, "x", "y") for i in range(5)])
    assert [one.verdict.value for one in judged] == [*said, "invalid"] and judge.name == "human:labels.jsonl"
    assert "nobody" in judged[3].reason and "no label of it" in judged[4].reason


def test_a_label_twice_is_one_and_two_that_differ_are_refused(tmp_path):
    row = {"id": "1", "verdict": "tie", "annotator": "p7"}
    assert read_labels(labels(tmp_path, row, row)) == {"1": Verdict.TIE}
    with pytest.raises(ValueError, match=r"labels.jsonl:2: 1 is first here and tie above"):
        read_labels(labels(tmp_path, row, row | {"verdict": "first"}))


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1"},
        {"id": 1.0, "verdict": "tie"},
        {"id": True, "verdict": "tie"},
        {"id": "1", "verdict": "A"},
        ["1", "tie"],
        {"verdict": []},
    ],
)
def test_what_is_no_label_is_refused_with_its_line(tmp_path, row):
    with pytest.raises(
        ValueError, match=r"labels.jsonl:1: expected an id and a verdict of first, second, tie, invalid"
    ):
        read_labels(labels(tmp_path, row))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl: no such file of labels"):
        read_labels(tmp_path / "no.jsonl")

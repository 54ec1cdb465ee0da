"""A log's lines are whole, one per row, and those of later steps can be taken back."""

import json
import math

import pytest

from dpo.step_log import StepLog

# Everything that str.splitlines() takes for the end of a line.
LINE_ENDS = "\n \r \r\n \v \f \x1c \x1d \x1e \x85 \u2028 \u2029"


@pytest.fixture
def log(tmp_path) -> StepLog:
    return StepLog(tmp_path / "rows.jsonl")


def test_rows_come_back_in_their_order_and_as_they_were(log):
    rows = [{"step": 1, "x": 0.1 + 0.2}, {"step": 2, "text": "猫 \ud83d"}, {"step": 2, "none": None}]
    log.append(rows[:1])
    log.append(row for row in rows[1:])
    assert log.rows() == rows


def test_no_rows_are_no_file(log):
    log.append([])
    log.forget_after(0)
    log.sync()
    assert log.rows() == [] and not log.path.exists()


def test_forget_after_keeps_its_own_step_and_earlier_ones(log):
    """Whatever their order: an evaluation's row may stand before one of training."""
    log.append({"step": step, "i": i} for i, step in enumerate((0, 1, 3, 2, 4, 2)))
    log.forget_after(2)
    assert [(row["step"], row["i"]) for row in log.rows()] == [(0, 0), (1, 1), (2, 3), (2, 5)]
    log.forget_after(-1)
    assert log.rows() == []


def test_what_is_kept_is_kept_to_the_byte(log):
    log.append({"step": step, "x": 1 / (step + 3), "text": LINE_ENDS} for step in range(4))
    first_two = b"".join(log.path.read_bytes().splitlines(keepends=True)[:2])
    log.forget_after(1)
    assert log.path.read_bytes() == first_two


@pytest.mark.parametrize("cut", [b"", b"{", b'{"step": 1, "x', b'{"step": 1}', "猫".encode()[:2]])
def test_a_line_that_a_crash_cut_short_does_not_count_and_is_written_over(log, cut):
    """Even where what is left of it is whole JSON: its newline was not written, so it may not be all."""
    log.append([{"step": 1, "x": 2.5}])
    with open(log.path, "ab") as file:
        file.write(cut)
    assert log.rows() == [{"step": 1, "x": 2.5}]
    log.forget_after(1)
    log.append([{"step": 2}])
    assert log.rows() == [{"step": 1, "x": 2.5}, {"step": 2}]


def test_no_character_of_a_text_ends_its_line(log):
    row = {"step": 1, "text": LINE_ENDS}
    log.append([row, row])
    assert log.rows() == [row, row] and log.path.read_bytes().count(b"\n") == 2


def test_a_line_ends_in_a_newline_alone_whoever_wrote_it(log):
    """Other JSON writers leave such characters as they are, which is valid."""
    rows = [{"step": step, "text": "\x85 \u2028 \u2029"} for step in (1, 2)]
    log.path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert log.rows() == rows
    log.forget_after(1)
    assert log.rows() == rows[:1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(log, value):
    log.append([{"step": 1, "x": value, "y": 1.5}])
    assert log.path.read_text() == '{"step": 1, "x": null, "y": 1.5}\n'
    assert log.rows() == [{"step": 1, "x": None, "y": 1.5}]

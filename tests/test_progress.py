"""What an evaluation has done stays done: whatever kills it, under the key that it was done with."""

import pytest

from dpo.evals.progress import Progress

KEY = {"model": "abc", "temperature": 0.0, "stop": ["a"]}
ROWS = [{"id": "x", "text": "one\u2028two"}, {"id": "y", "text": "Zürich"}]


def progress(path, key=KEY):
    return Progress(path / "deep" / "rows.jsonl", key)


def test_rows_are_there_again(tmp_path):
    with progress(tmp_path) as first:
        first.add(ROWS[0])
        first.add(ROWS[1])
        assert first.done == {"x": ROWS[0], "y": ROWS[1]}
    with progress(tmp_path) as again:
        assert again.done == {"x": ROWS[0], "y": ROWS[1]}


def test_rows_are_on_the_disk_before_it_is_closed(tmp_path):
    with progress(tmp_path) as first:
        first.add(*ROWS)
        assert first.path.read_text().count("\n") == 3


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_short_does_not_count_and_does_not_stay(tmp_path, cut):
    with progress(tmp_path) as first:
        first.add(*ROWS)
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:-cut])
    with progress(tmp_path) as again:
        again.add(*(row for row in ROWS if row["id"] not in again.done))
    assert first.path.read_bytes() == whole


def test_even_a_first_line_may_have_been_cut(tmp_path):
    with progress(tmp_path) as first:
        first.path.write_bytes(first.path.read_bytes()[:5])
    with progress(tmp_path) as again:
        again.add(ROWS[0])
    with progress(tmp_path) as last:
        assert list(last.done) == ["x"]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (KEY | {"temperature": 1.0}, "temperature=0.0, this evaluation has 1.0"),
        (KEY | {"more": 1}, "more=None, this evaluation has 1"),
        ({}, "model='abc', this evaluation has None"),
    ],
)
def test_rows_of_another_evaluation_are_refused(tmp_path, key, said):
    with progress(tmp_path):
        pass
    with pytest.raises(ValueError, match=rf"rows\.jsonl: holds rows of {said}; name another output_dir, or delete"):
        progress(tmp_path, key)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rows.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="holds rows of model=None"):
        progress(tmp_path)


def test_two_processes_do_not_write_one_file(tmp_path):
    with progress(tmp_path), pytest.raises(ValueError, match=r"rows\.jsonl: another process writes it"):
        progress(tmp_path)

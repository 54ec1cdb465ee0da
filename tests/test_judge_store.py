"""The store: an answer that was put is there after anything, and of many threads with one question one asks."""

import subprocess
import sys
import threading
import time

import pytest

from dpo.judge.store import Store, key_of

OK = {"outcome": "ok", "letter": "A"}


def test_an_answer_is_there_in_another_process(tmp_path):
    """Which ends as by kill -9: no close, no exit handlers."""
    path = str(tmp_path / "sub" / "cache")
    code = f"import os; from dpo.judge.store import Store; Store({path!r}).put('k', {OK}); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert Store(path).get("k") == OK and Store(path).get("other") is None


@pytest.mark.parametrize(
    ("outcome", "kept"),
    [("ok", True), ("reasked", True), ("refused", True), ("malformed", False), ("http_error", False)],
)
def test_only_answers_and_refusals_are_kept(outcome, kept):
    store = Store(None)
    store.put("k", {"outcome": outcome})
    assert (store.get("k") is not None) == kept


def test_of_many_threads_one_asks():
    store, asked, heard = Store(None), [], []

    def ask() -> dict:
        asked.append(1)
        time.sleep(0.05)
        return OK

    threads = [threading.Thread(target=lambda: heard.append(store.once("k", ask))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1 and sorted(known for _, known in heard) == [False] + [True] * 7


def test_a_failure_is_asked_about_again():
    store = Store(None)
    assert store.once("k", lambda: {"outcome": "http_error"}) == ({"outcome": "http_error"}, False)
    assert store.once("k", lambda: OK) == (OK, False) and store.once("k", lambda: {}) == (OK, True)


def test_a_key_is_its_parts_whatever_their_order():
    assert key_of(a=1, b=["x"]) == key_of(b=["x"], a=1) != key_of(a=1, b=["y"])
    assert len({key_of(a=1), key_of(a="1"), key_of(b=1), key_of(a=None)}) == 4


def test_a_disk_that_takes_no_more_is_said_in_one_sentence(tmp_path):
    store = Store(str(tmp_path / "cache"))
    store.connection.execute("PRAGMA query_only = 1")
    with pytest.raises(ValueError, match=r"judge_cache=.*/cache: is no SQLite file that can be written \(attempt to"):
        store.put("k", OK)


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, and long enough to be looked at " * 40)
    for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "notes.txt" / "x"):
        with pytest.raises(ValueError, match=f"judge_cache={path}: is no SQLite file"):
            Store(str(path))
    assert (tmp_path / "notes.txt").read_text().startswith("not a database")

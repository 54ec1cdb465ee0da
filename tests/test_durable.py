"""A directory is whole or not there: at whatever call its writer dies, and whatever bit of it flips."""

import errno
import os
import random
import resource
import signal
from pathlib import Path

import pytest

from dpo.durable import MANIFEST, damage, write_whole


def fill(text: str):
    def write(directory: Path) -> None:
        (directory / "weights").write_bytes(text.encode() * 100)
        (directory / "inner").mkdir()
        (directory / "inner" / "state.json").write_text(f'"{text}"')

    return write


def content(directory: Path) -> str:
    return (directory / "inner" / "state.json").read_text().strip('"')


def test_what_was_written_is_whole_and_nothing_stands_beside_it(tmp_path):
    write_whole(tmp_path / "new" / "a", fill("one"))
    assert damage(tmp_path / "new" / "a") is None and content(tmp_path / "new" / "a") == "one"
    write_whole(tmp_path / "new" / "a", fill("two"))
    assert content(tmp_path / "new" / "a") == "two" and [p.name for p in (tmp_path / "new").iterdir()] == ["a"]


def test_a_damaged_directory_is_put_aside_and_never_deleted(tmp_path):
    for text in ("one", "two", "three"):
        write_whole(tmp_path / "a", fill(text))
        (tmp_path / "a" / "weights").write_bytes(b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.damaged-1", "a.damaged-2"]
    assert [content(tmp_path / f"a.damaged-{i}") for i in (1, 2)] == ["one", "two"]


def test_a_writer_that_fails_leaves_what_stood_there(tmp_path):
    write_whole(tmp_path / "a", fill("one"))

    def failing(directory: Path) -> None:
        fill("two")(directory)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", failing)
    assert content(tmp_path / "a") == "one" and [p.name for p in tmp_path.iterdir()] == ["a"]


CALLS = ("mkdir", "rename", "replace", "fsync", "rmdir", "unlink", "open")


def in_a_child(work) -> int:
    """The exit status of `work` in a forked process; 77 where it was cut off."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(call: int):
    """Have this process end without a word at its n-th call into the file system."""
    count = 0
    for name in CALLS:
        real = getattr(os, name)

        def counted(*args, real=real, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os._exit(77)
            return real(*args, **kwargs)

        setattr(os, name, counted)


@pytest.mark.slow
def test_dying_at_any_call_leaves_a_whole_directory(tmp_path):
    """Of three that are written in turn, the second over itself, one at least is whole at any time, and is the newest
    but for the one that was being written."""

    def write_three() -> None:
        for name, text in (("1", "one"), ("2", "two"), ("2", "three")):
            write_whole(folder / name, fill(text))

    for call in range(1, 1000):
        folder = tmp_path / str(call)
        folder.mkdir()
        write_whole(folder / "0", fill("zero"))
        status = in_a_child(lambda call=call: (dying_at(call), write_three()))
        whole = {p.name: content(p) for p in folder.iterdir() if p.name.isdigit() and damage(p) is None}
        assert not [p for p in folder.iterdir() if p.name.isdigit() and damage(p)], f"call {call}"
        assert whole["0"] == "zero" and whole.get("1", "one") == "one"
        assert "2" not in whole or ("1" in whole and whole["2"] in ("two", "three"))
        if status == 0:
            break
        assert status == 77
    assert 25 < call < 1000  # so many calls there were to die at


@pytest.mark.parametrize("cut", ["0", "1", "8", "half", "all but 1"])
@pytest.mark.parametrize("name", ["weights", "inner/state.json", MANIFEST])
def test_a_file_that_was_cut_short_is_named(tmp_path, name, cut):
    write_whole(tmp_path / "a", fill("one"))
    whole = (tmp_path / "a" / name).read_bytes()
    end = {"0": 0, "1": 1, "8": 4, "half": len(whole) // 2, "all but 1": len(whole) - 1}[cut]
    (tmp_path / "a" / name).write_bytes(whole[:end])
    assert (damage(tmp_path / "a") or "").startswith(name)


def test_every_bit_that_flips_is_noticed(tmp_path):
    """400 of 400: 200 in the data, 200 in the manifest."""
    write_whole(tmp_path / "a", fill("one"))
    draw = random.Random(0)
    for name in ["weights", MANIFEST] * 200:
        path = tmp_path / "a" / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert damage(tmp_path / "a") is not None
        path.write_bytes(whole)
    assert damage(tmp_path / "a") is None


def test_a_missing_file_and_a_missing_manifest_are_named(tmp_path):
    write_whole(tmp_path / "a", fill("one"))
    (tmp_path / "a" / "weights").unlink()
    assert damage(tmp_path / "a") == "weights is missing"
    (tmp_path / "a" / MANIFEST).unlink()
    assert damage(tmp_path / "a") == f"it has no {MANIFEST}" == damage(tmp_path / "none")


@pytest.mark.parametrize("limit", [0, 1, 100, 299, 300, 301])
def test_a_full_disk_leaves_the_one_before(tmp_path, limit):
    """A limit on the size of any file stands for the disk; the system's error is EFBIG instead of ENOSPC."""
    write_whole(tmp_path / "a", fill("one"))

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_whole(tmp_path / "a", fill("two"))
        except OSError:
            os._exit(9)

    status = in_a_child(write)
    assert damage(tmp_path / "a") is None and [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (status, content(tmp_path / "a")) == ((0, "two") if limit >= 300 else (9, "one"))


def test_a_rename_that_fails_leaves_what_stood_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", fill("one"))
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(tmp_path / "a", fill("two"))
    assert content(tmp_path / "a") == "one"

"""Files: whatever is wrong with a line, the others are read; whatever a file is packed in, its rows are the same."""

import gzip
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import write_table
from test_formats import PROMPT, SIDES, fuzz, in_every_format

from dpo.data import read_examples
from dpo.files import rows_of
from dpo.formats import BadRow

GOOD = {"prompt": "q", "chosen": "c", "rejected": "r"}
LINE = json.dumps(GOOD).encode()


def read(path: Path, on_bad_row: str = "stop"):
    return read_examples(path, stage="dpo", on_bad_row=on_bad_row)


def packed(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


# --- malformed lines ---


def said(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


def raw(key: str, value: str) -> bytes:
    """A row with a value as it is written, which json.dumps would not write."""
    return LINE[:-1] + f', "{key}": {value}}}'.encode()


# What a line is, and the rule that refuses it; None: it is a good row; "": no row at all.
MALFORMED: dict[str, tuple[bytes, str | None]] = {
    "blank": (b"", ""),
    "spaces": (b" \t ", ""),
    "carriage_return": (LINE + b"\r", None),
    "byte_order_mark": (b"\xef\xbb\xbf" + LINE, "not valid JSON .*BOM"),
    "nul": (b"\x00" + LINE, "not valid JSON"),
    "nul_in_a_text": (LINE.replace(b'"q"', b'"q\x00"'), "not valid JSON"),
    "escaped_nul": (said(prompt="q\x00"), None),
    "lone_surrogate": (said(prompt="q\ud800"), None),
    "line_separator": (json.dumps(GOOD | {"prompt": "q\u2028\u0085x"}, ensure_ascii=False).encode(), None),
    "invalid_utf8": (LINE[:11] + b"\xff" + LINE[11:], "byte 12 is not UTF-8"),
    "utf16": (LINE.decode().encode("utf-16"), "byte 1 is not UTF-8"),
    "latin1": ('{"prompt": "é"}'.encode("latin-1"), "byte 13 is not UTF-8"),
    "truncated": (LINE[:-3], "not valid JSON"),
    "one_brace": (b"{", "not valid JSON"),
    "two_objects": (LINE * 2, "not valid JSON .*Extra data"),
    "trailing_comma": (LINE + b",", "not valid JSON .*Extra data"),
    "comma_inside": (LINE[:-1] + b",}", "not valid JSON"),
    "single_quotes": (LINE.replace(b'"', b"'"), "not valid JSON"),
    "comment": (b"// " + LINE, "not valid JSON"),
    "nested_10000": (raw("chosen", "[" * 10_000 + "]" * 10_000), "(not valid JSON .*recursion|chosen must be text)"),
    "endless_number": (raw("score", "1" * 5000), "not valid JSON"),
    "key_twice": (raw("chosen", '"d"'), "the key 'chosen' stands twice in one object"),
    "key_twice_in_a_turn": (
        b'{"prompt": [{"role": "user", "role": "system", "content": "q"}], "chosen": "c", "rejected": "r"}',
        "the key 'role' stands twice in one object",
    ),
    "nan": (raw("weight", "NaN"), "weight must be at least 0, got float nan"),
    "infinity": (raw("margin", "Infinity"), "margin must be a finite number, got float inf"),
    "minus_infinity": (raw("soft_label", "-Infinity"), "soft_label must be between 0 and 1, got float -inf"),
    "number_as_text": (said(weight="1"), "weight must be at least 0, got str '1'"),
    "a_list": (b'["q", "c", "r"]', "a row must be an object, got list"),
    "a_text": (b'"q"', "a row must be an object, got str"),
    "a_number": (b"7", "a row must be an object, got int"),
    "null": (b"null", "a row must be an object, got NoneType"),
    "no_keys": (b"{}", "no known format has these keys: none"),
    "no_chosen": (b'{"prompt": "q", "rejected": "r"}', "chosen is missing"),
    "no_rejected": (b'{"prompt": "q", "chosen": "c"}', "rejected is missing"),
    "no_prompt": (b'{"chosen": "c", "rejected": "r"}', "no known format has these keys: 'chosen', 'rejected'"),
    "wrong_type": (said(chosen=["c", "d"]), "chosen must be text or one assistant turn, got list"),
    "null_prompt": (said(prompt=None), "no known format has these keys"),
    "equal_sides": (said(rejected="c"), "chosen equals rejected"),
    "empty_side": (said(rejected=""), "rejected is empty"),
    "extra_keys": (said(x={"y": [1, None]}, id=1), None),
    "same_id": (said(id=0), None),
    "another_format": (json.dumps({"instruction": "q", "chosen": "c", "rejected": "r"}).encode(), None),
}  # fmt: skip


def test_there_are_thirty_classes_of_malformed_lines():
    assert len(MALFORMED) > 30


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("key", MALFORMED)
def test_a_malformed_line_is_named_wherever_it_stands_and_the_others_are_read(tmp_path, key, name):
    """First, in the middle and last, with and without an end of the last line."""
    line, rule = MALFORMED[key]
    good = said(id=0)
    for place in (1, 2, 3):
        for end in (b"\n", b""):
            lines = [good, good]
            lines.insert(place - 1, line)
            path = packed(tmp_path / name, b"\n".join(lines) + end)
            examples, bad = read(path, "skip")
            numbers = [int(e.source.rpartition(":")[2]) for e in examples]
            assert numbers == [n for n in (1, 2, 3) if n != place or rule is None]
            if rule:
                assert len(bad) == 1 and len(bad[0].splitlines()) == 1
                with pytest.raises(BadRow, match=rf"^{path}:{place}: {rule}"):
                    read(path)
            else:
                assert bad == [] and read(path) == (examples, [])


ROWS_OF_JSON = [key for key, (line, rule) in MALFORMED.items() if rule is not None and "not valid" not in rule
                and rule and "UTF-8" not in rule]  # fmt: skip


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
@pytest.mark.parametrize("key", ROWS_OF_JSON)
def test_a_bad_row_of_an_array_is_named_wherever_it_stands_and_the_others_are_read(tmp_path, key, name):
    line, rule = MALFORMED[key]
    for place in (1, 2, 3):
        lines = [LINE, LINE]
        lines.insert(place - 1, line)
        path = packed(tmp_path / name, b"[" + b",\n".join(lines) + b"]")
        examples, _ = read(path, "skip")
        assert [int(e.source.rpartition(":")[2]) for e in examples] == [n for n in (1, 2, 3) if n != place]
        with pytest.raises(BadRow, match=rf"^{path}:{place}: {rule}"):
            read(path)


def test_a_line_of_50_megabytes_is_a_line_like_any_other(tmp_path):
    """Good, it is read whole; one that is cut short is shown by no more than another."""
    long = said(chosen="x" * 50_000_000)
    path = packed(tmp_path / "rows.jsonl", b"\n".join([LINE, long, long[:1_000_000], LINE]))
    examples, (bad,) = read(path, "skip")
    assert [len(e.responses[0]) for e in examples] == [1, 50_000_000, 1]
    assert "rows.jsonl:3: not valid JSON" in bad and len(bad) < 300


def test_a_writer_killed_at_any_byte_leaves_every_complete_line_readable(tmp_path):
    lines = [said(prompt=f"é{i}") for i in range(20)]
    whole = b"\n".join(lines) + b"\n"
    for end in random.Random(0).sample(range(len(lines[0]) + 1, len(whole)), 50):
        path = packed(tmp_path / "rows.jsonl", whole[:end])
        complete = [line for line in whole[:end].split(b"\n") if line in lines]
        examples, bad = read(path, "skip")
        assert [e.messages[0]["content"] for e in examples] == [f"é{i}" for i in range(len(complete))]
        assert len(bad) == (whole[:end].split(b"\n")[-1] not in [b"", *complete])


# --- gzip ---


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_a_file_that_cannot_be_unpacked_stops_with_its_place_whatever_on_bad_row_says(tmp_path, name):
    """Cut short, damaged, or no gzip at all."""
    rows = [GOOD | {"prompt": f"{random.Random(i).random()}"} for i in range(2000)]
    text = json.dumps(rows) if name == "rows.json.gz" else "\n".join(map(json.dumps, rows))
    whole = gzip.compress(text.encode())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for data in (whole[: len(whole) // 2], bytes(flipped), LINE, whole[:-6]):
        (tmp_path / name).write_bytes(data)
        for on_bad_row in ("stop", "skip"):
            with pytest.raises(ValueError, match=rf"^{tmp_path / name}:\d+: (cannot be unpacked \(.*cut short|.*not )"):
                read(tmp_path / name, on_bad_row)


# --- parquet ---


def parquet(path: Path, rows: list[dict]) -> Path:
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_a_place_in_a_parquet_file_is_its_row(tmp_path):
    rows = [GOOD, GOOD, GOOD | {"rejected": "c"}, GOOD]
    path = parquet(tmp_path / "rows.parquet", rows)
    examples, bad = read(path, "skip")
    assert [e.source for e in examples] == [f"{path}:{n}" for n in (1, 2, 4)]
    assert bad == [f"{path}:3: chosen equals rejected; a pair needs two different responses"]


def test_rows_of_several_formats_are_told_apart_in_a_parquet_file_where_every_row_has_every_key(tmp_path):
    """What a row does not say is null there: in the row, and in each turn."""
    turns = [{"role": "user", "content": "q"}]
    rows = [GOOD, {"messages": turns, "chosen": "c", "rejected": "r"},
            {"conversations": [{"from": "human", "value": "q", "role": None}], "chosen": "c", "rejected": "r"},
            {"instruction": "q", "chosen": "c", "rejected": "r", "input": "", "weight": 2.0}]  # fmt: skip
    examples, _ = read(parquet(tmp_path / "rows.parquet", rows))
    assert [e.messages[0] for e in examples] == turns * 4 and [e.weight for e in examples] == [1, 1, 1, 2]


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    whole = parquet(tmp_path / "rows.parquet", [GOOD] * 9).read_bytes()
    for data in (b"", LINE, whole[:-9], b"x" * 50 + whole[50:]):
        (tmp_path / "rows.parquet").write_bytes(data)
        with pytest.raises(ValueError, match=r"rows\.parquet: no row can be read after 0 \(.*; is it a whole"):
            read(tmp_path / "rows.parquet", "skip")


def test_without_pyarrow_a_parquet_file_is_refused_in_one_line(tmp_path, monkeypatch):
    path = parquet(tmp_path / "rows.parquet", [GOOD])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'rows\.parquet: \.parquet is read by pyarrow; pip install -e "\.\[data\]"'):
        read(path)


# --- one row, every file ---


@fuzz(25)
@given(prompt=PROMPT, sides=SIDES, format_index=st.integers(0, 7))
def test_every_file_gives_the_same_rows(tmp_path_factory, prompt, sides, format_index):
    folder = tmp_path_factory.getbasetemp()
    row = list(in_every_format(prompt, *sides).values())[format_index]
    text = json.dumps(row).encode()
    for name in ("same.jsonl", "same.jsonl.gz", "same.json", "same.json.gz"):
        path = packed(folder / name, b"[" + text + b"]" if ".json" in name and ".jsonl" not in name else text)
        assert [row for _, row in rows_of(path)] == [json.loads(text)]
        (example,), _ = read(path)
        assert [m["content"] for m in example.messages] == prompt and list(example.responses) == sides
    if "\ud800" not in "".join([*prompt, *sides]) and "history" not in row:  # half a pair is no UTF-8
        (example,), _ = read(parquet(folder / "same.parquet", [json.loads(text)]))
        assert [m["content"] for m in example.messages] == prompt and list(example.responses) == sides

"""Files: from a data file to its rows, each with its place, file:line (in .parquet file:row).

A line or an object that is no JSON is yielded as a BadRow, for whoever reads decides whether to stop. What follows a
syntax error in a .json array cannot be told from it: that stops, as a file does that cannot be unpacked.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo.turns import BadRow

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def suffix_of(path: Path) -> str | None:
    """Which of SUFFIXES a file has."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a data file; a BadRow stands for a line that is no JSON."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet_rows(path)
    return (_json_rows if suffix in (".json", ".json.gz") else _jsonl_rows)(path)


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _unpacking(path: Path, line: int, error: Exception) -> ValueError:
    return ValueError(f"{path}:{line}: cannot be unpacked ({error}); is the file cut short?")


UNPACKING = (gzip.BadGzipFile, EOFError, zlib.error)


class _Decoder(json.JSONDecoder):
    """Python's, which in silence keeps the last of two equal keys; `twice` names one of the last object read."""

    def __init__(self) -> None:
        self.twice: str | None = None
        super().__init__(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            self.twice = next(key for key in keys if keys.count(key) > 1)
        return row

    def checked(self, row: Any, source: str) -> Any:
        """The row just read, or a BadRow where it says a key twice."""
        twice, self.twice = self.twice, None
        return row if twice is None else BadRow(f"{source}: the key {twice!r:.40} stands twice in one object; keep one")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # A generator that raised is finished, so bad lines are yielded as they are found and raised by examples_of.
    decoder = _Decoder()
    number = 0
    with _open(path) as lines:
        while True:
            number += 1
            source = f"{path}:{number}"
            try:
                raw = lines.readline()
            except UNPACKING as error:
                raise _unpacking(path, number, error) from None
            if not raw:
                return
            if not raw.strip():
                continue
            try:
                text = raw.decode("utf-8")
                if text.startswith("\ufeff"):
                    yield source, BadRow(f"{source}: not valid JSON (a byte order mark); save the file without BOM")
                else:
                    yield source, decoder.checked(decoder.decode(text), source)
            except UnicodeDecodeError as error:
                yield source, BadRow(f"{source}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
            except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
                yield source, BadRow(f"{source}: not valid JSON ({error}); expected one object per line")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON array with their lines, parsed one by one so that each keeps its line."""
    text = _text(path)
    decoder = _Decoder()
    position, line = _skip_space(text, 0, 1)
    if text[position : position + 1] != "[":
        raise ValueError(f"{path}:{line}: expected a JSON array of rows; for one object per line name the file .jsonl")
    position, line = _skip_space(text, position + 1, line)
    while text[position : position + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # What follows a syntax error cannot be told from it, so this stops whatever on_bad_row says.
            raise ValueError(f"{path}:{line}: not valid JSON ({error})") from None
        source = f"{path}:{line}"
        yield source, decoder.checked(row, source)
        line += text.count("\n", position, end)
        position, line = _skip_space(text, end, line)
        if text[position : position + 1] == ",":
            position, line = _skip_space(text, position + 1, line)
            if text[position : position + 1] == "]":
                raise ValueError(f"{path}:{line}: not valid JSON (a comma after the last row)")
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}:{line}: not valid JSON (expected ',' or ']' after a row); is the file cut short?")
    position, line = _skip_space(text, position + 1, line)
    if position < len(text):
        raise ValueError(f"{path}:{line}: not valid JSON (text after the array's end); one array per file")


def _text(path: Path) -> str:
    try:
        with _open(path) as file:
            text = file.read().decode("utf-8")
    except UNPACKING as error:
        raise _unpacking(path, 1, error) from None
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{path}:1: begins with a byte order mark; save the file as UTF-8 without BOM")
    return text


def _skip_space(text: str, position: int, line: int) -> tuple[int, int]:
    end = position
    while end < len(text) and text[end] in " \t\r\n":
        end += 1
    return end, line + text.count("\n", position, end)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f'{path}: .parquet is read by pyarrow; pip install -e ".[data]", or save as .jsonl') from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: no row can be read after {number} ({reason}); is it a whole .parquet file?"
        ) from None

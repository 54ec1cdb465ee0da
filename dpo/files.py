"""Files: from a path to its rows, each with its place, file:line.

A line or an object that is no JSON is yielded as a BadRow, for whoever reads decides whether to stop. What follows a
syntax error in a .json array cannot be told from it: that stops.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo.formats import BadRow


def find_dataset(dataset: str, dataset_dir: str) -> Path:
    """The file that `dataset` names: a path, or a name in dataset_dir, with or without .json or .jsonl."""
    tried = [Path(dataset).expanduser()]
    tried += [Path(dataset_dir) / (dataset + suffix) for suffix in ("", ".json", ".jsonl")]
    for path in tried:
        if path.is_file():
            if path.suffix not in (".json", ".jsonl"):
                raise ValueError(f"dataset={dataset}: {path.suffix or 'no'} suffix; .json and .jsonl files are read")
            return path
    raise ValueError(f"dataset={dataset}: no such file; looked for {', '.join(map(str, tried))}")


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a .json or .jsonl file; a BadRow stands for a line that is no JSON."""
    return _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # A generator that raised is finished, so bad lines are yielded as they are found and raised by _example.
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            source = f"{path}:{number}"
            try:
                yield source, json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield source, BadRow(f"{source}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
            except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
                yield source, BadRow(f"{source}: not valid JSON ({error}); expected one object per line")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON array with their lines, parsed one by one so that each keeps its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{path}:1: begins with a byte order mark; save the file as UTF-8 without BOM")
    decoder = json.JSONDecoder()
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
        yield f"{path}:{line}", row
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


def _skip_space(text: str, position: int, line: int) -> tuple[int, int]:
    end = position
    while end < len(text) and text[end] in " \t\r\n":
        end += 1
    return end, line + text.count("\n", position, end)

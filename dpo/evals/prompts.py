"""Prompts: the conversations that a model is to answer, from rows in any format, or a text file with one a line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dpo.config import as_list
from dpo.data import rows_wanted
from dpo.formats import PROMPTS, BadRow, examples_of
from dpo.sources import Source, find_dataset
from models.template import Message
from models.weights import WORLD


@dataclass(frozen=True)
class Prompt:
    id: str
    """a digest of the messages."""
    messages: tuple[Message, ...]
    source: str
    """what the row calls its source, else its dataset: the slice that it is counted in."""

    @property
    def text(self) -> str:
        """The turns to read, each with its role where there are several."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def prompts_of(cfg: DictConfig) -> list[Prompt]:
    """The prompts that eval_dataset names, the built-in world's where it names none."""
    prompts, bad = read_prompts(
        as_list(cfg.eval_dataset or "world"), cfg.dataset_dir, max_samples=cfg.max_samples,
        data_format=cfg.data_format, on_bad_row=cfg.on_bad_row,
    )  # fmt: skip
    print(f"prompts: {len(prompts)}, {len(bad)} rows skipped")
    return prompts


def read_prompts(
    names: Sequence[str], dataset_dir: str, *, max_samples: int | None, data_format: str | None, on_bad_row: str
) -> tuple[list[Prompt], list[str]]:
    """(the distinct prompts of datasets or .txt files, bad rows as one line each); of each the first max_samples rows.

    Responses that rows may have are not looked at.
    """
    prompts: dict[str, Prompt] = {}
    bad: list[str] = []
    for name in names:
        source = _source(name, dataset_dir)
        for place, row in islice(source.rows(), rows_wanted(source, max_samples)):
            try:
                for prompt in _prompts_of(row, place, source.name, data_format):
                    prompts.setdefault(prompt.id, prompt)
            except BadRow as error:
                if on_bad_row == "stop":
                    raise
                bad.append(str(error))
    if not prompts:
        raise ValueError(
            f"eval_dataset={','.join(names)}: no prompt, {len(bad)} bad rows{': ' + bad[0] if bad else ''}"
        )
    return list(prompts.values()), bad


class _TextFile(Source):
    """A prompt a line."""

    def rows(self) -> Iterator[tuple[str, Any]]:
        for path in self.files:
            try:
                lines = path.read_text(encoding="utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", {"prompt": [{"role": "user", "content": line.strip()}]}


def _source(name: str, dataset_dir: str) -> Source:
    if name == "world":
        return Source("world", (WORLD / "data" / "eval.jsonl",))
    if name.endswith(".txt") and Path(name).is_file():
        return _TextFile(name, (Path(name),))
    return find_dataset(name, dataset_dir)


ANSWERS = ("chosen", "output", "completion", "response")


def _prompts_of(row: Any, place: str, dataset: str, data_format: str | None) -> list[Prompt]:
    if isinstance(row, dict) and any(row.get(key) for key in PROMPTS) and not any(row.get(key) for key in ANSWERS):
        row = row | {"chosen": "-"}  # formats are of prompts with responses
    examples = examples_of(row, place, "sft", data_format=data_format)
    return [
        Prompt(
            sha256(json.dumps(example.messages).encode()).hexdigest()[:16], example.messages, example.origin or dataset
        )
        for example in examples
    ]


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Of what is asked, in its order, wherever it was read from."""
    return sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()

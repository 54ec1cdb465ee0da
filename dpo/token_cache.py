"""Token ids on disk: tokenised once, and read by every later run that asks for the same, without reading them whole.

    DIR/KEY-SHA256.safetensors   the rows of a run, to train on and held out, named by key and checksum
    DIR/digests.json             checksums of the data's and the tokenizer's files and of the above

KEY stands for all that the rows depend on: the bytes of the data's and the tokenizer's files, the template, every key
of the config that changes a row, the version of `tokenizers`, and TOKENS_VERSION. So nothing stale is read.

A file is mapped into memory: a row is read when it is asked for. Lengths, cuts and keys are columns of their own, so
that a look at all rows reads neither ids nor texts. A file is written beside and renamed. One whose checksum is not its
name is reported and made anew; the checksum is looked at when the file is new or was touched.

Shapes: N rows, C responses that may be cut, B bytes of a digest.
"""

import json
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dpo.digests import DIGESTS, digest, write_beside
from dpo.formats import Example
from dpo.tokens import Encoded, Rows

# To be raised with every change to dpo/formats.py, dpo/tokens.py, dpo/unpaired.py, models/template.py or
# models/tokenizer.py that gives a row other tokens, and with every change to what a file holds.
TOKENS_VERSION = 3
ROLES = ("train", "evaluation")


def cached_rows(cache_dir: Path, files: Sequence[Path], values: Mapping[str, Any], make: Callable[[], Rows]) -> Rows:
    """The rows that lie in cache_dir, or else those that `make` gives, kept there. A line says which.

    files: what the rows are made of, by content. values: everything else that changes them, JSON.
    """
    key, start = rows_key(cache_dir, files, values), time.perf_counter()
    path, done = _find(cache_dir, key), "found"
    if path is None:
        path = write_rows(cache_dir, key, make())
        done = f"made in {time.perf_counter() - start:.1f} s and kept"
    rows = read_rows(path)
    print(f"tokenized: {len(rows.train) + len(rows.evaluation)} rows {done} ({cache_dir})")
    return rows


def rows_key(cache_dir: Path, files: Sequence[Path], values: Mapping[str, Any]) -> str:
    """A name for everything that the rows depend on."""
    contents = [[path.name, digest(path, cache_dir / DIGESTS)] for path in files]
    content = json.dumps([TOKENS_VERSION, tokenizers.__version__, contents, values], sort_keys=True)
    return sha256(content.encode()).hexdigest()[:32]


def _find(cache_dir: Path, key: str) -> Path | None:
    """The whole file of a key; a line for each damaged one."""
    for path in sorted(cache_dir.glob(f"{key}-*.safetensors")):
        if digest(path, cache_dir / DIGESTS) == path.stem.rpartition("-")[2]:
            return path
        print(f"tokenized: {path} is damaged and is not used; its rows are made anew")
    return None


def write_rows(cache_dir: Path, key: str, rows: Rows) -> Path:
    said = {"skipped": list(rows.skipped), "warnings": list(rows.warnings)}
    tensors = {"said": _bytes(json.dumps(said).encode())}
    for role in ROLES:
        tensors |= {f"{role}.{name}": value for name, value in _columns(getattr(rows, role)).items()}
    content = save(tensors)
    path = cache_dir / f"{key}-{sha256(content).hexdigest()}.safetensors"
    cache_dir.mkdir(parents=True, exist_ok=True)
    write_beside(path, content)
    return path


def read_rows(path: Path) -> Rows:
    tensors = load_file(path)
    train, evaluation = (
        StoredRows({name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(role)})
        for role in ROLES
    )
    return Rows(train, evaluation, **json.loads(tensors["said"].numpy().tobytes()))


def _columns(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """What StoredRow reads; of ids and texts, all rows' one after the other, and where each begins."""
    ids, starts = array("i"), array("q", [0])
    texts, text_starts = bytearray(), array("q", [0])
    for row in rows:
        for sequence in (row.prompt_ids, *row.response_ids):
            ids.extend(sequence)
            starts.append(len(ids))
        texts += json.dumps(vars(row.example)).encode()
        text_starts.append(len(texts))
    N = len(rows)
    return {
        "ids": torch.from_numpy(np.asarray(ids)),
        "starts": torch.from_numpy(np.asarray(starts)),
        "texts": _bytes(texts),
        "text_starts": torch.from_numpy(np.asarray(text_starts)),
        "dropped_turns": torch.tensor([row.dropped_turns for row in rows], dtype=torch.int32),
        "cut_NC": torch.tensor([row.cut for row in rows], dtype=torch.bool).view(N, -1 if N else 0),
        "has_numbers": torch.tensor([row.has_numbers for row in rows], dtype=torch.bool),
        "keys_NB": _bytes(b"".join(bytes.fromhex(row.key) for row in rows)).view(N, 32),
    }


def _bytes(content: bytes | bytearray) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytes(content), dtype=np.uint8).copy())


class StoredRows(Sequence[Encoded]):
    """The rows of a file; none is built before it is asked for."""

    def __init__(self, columns: Mapping[str, Tensor]):
        self.columns = {name: column.numpy() for name, column in columns.items()}

    def __len__(self) -> int:
        return len(self.columns["dropped_turns"])

    def __iter__(self) -> Iterator[Encoded]:
        return (StoredRow(self.columns, i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [StoredRow(self.columns, i) for i in range(len(self))[index]]
        return StoredRow(self.columns, range(len(self))[index])


class StoredRow(Encoded):
    """One row of a file: what is asked for is read then, and not kept."""

    __slots__ = ("columns", "index")  # they may be made by the ten thousand
    columns: Mapping[str, np.ndarray]
    index: int

    def __init__(self, columns: Mapping[str, np.ndarray], index: int):
        object.__setattr__(self, "columns", columns)  # its own __setattr__ refuses: the dataclass is frozen
        object.__setattr__(self, "index", index)

    @property
    def _bounds(self) -> list[int]:
        """Where its prompt begins and ends, and each of its responses ends."""
        starts, rows = self.columns["starts"], len(self.columns["dropped_turns"])
        sequences = len(starts) // rows
        return starts[self.index * sequences : (self.index + 1) * sequences + 1].tolist()

    @property
    def prompt_ids(self) -> list[int]:
        start, end, *_ = self._bounds
        return self.columns["ids"][start:end].tolist()

    @property
    def response_ids(self) -> tuple[list[int], ...]:
        return tuple(self.columns["ids"][start:end].tolist() for start, end in pairwise(self._bounds[1:]))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in pairwise(self._bounds[1:]))

    @property
    def tokens(self) -> int:
        return self._bounds[-1] - self._bounds[0]

    @property
    def example(self) -> Example:
        start, end = self.columns["text_starts"][self.index : self.index + 2]
        fields: dict[str, Any] = json.loads(self.columns["texts"][start:end].tobytes())
        fields |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        return Example(**fields)

    @property
    def dropped_turns(self) -> int:
        return int(self.columns["dropped_turns"][self.index])

    @property
    def cut(self) -> tuple[bool, ...]:
        return tuple(self.columns["cut_NC"][self.index].tolist())

    @property
    def has_numbers(self) -> bool:
        return bool(self.columns["has_numbers"][self.index])

    @property
    def key(self) -> str:
        return self.columns["keys_NB"][self.index].tobytes().hex()

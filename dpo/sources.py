"""Sources: what `dataset=` names, as files and the way to read their rows.

A name is a file, a directory (all its data files, sorted), an entry of dataset_dir/dataset_info.json, a file of
dataset_dir, or OWNER/NAME[:SPLIT] on the Hugging Face hub. dataset_info.json is LLaMA-Factory's: an entry says where
the rows are, under which keys, and which words its turns use. Left out: ModelScope, loading scripts, cloud storage.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dpo.files import SUFFIXES, rows_of, suffix_of
from dpo.turns import BadRow, Row
from models.config import read_json

REGISTRY = "dataset_info.json"
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
# A column of LLaMA-Factory, and the key that a row of ours has it under.
COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "messages": "conversations",
    "system": "system", "tools": "tools", "images": "images", "videos": "videos", "audios": "audios",
    "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip
# What our rows may say beside LLaMA-Factory's columns.
OWN = ("weight", "margin", "soft_label", "dimensions")
ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
TAGS = (*ROLE_TAGS, "role_tag", "content_tag", "observation_tag", "function_tag")
ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
PLACES = ("file_name", "hf_hub_url", "revision", "subset", "split", "folder")
# What a file of another split than train says.
NOT_TRAIN = ["*test*", "*valid*", "*eval*", "*dev*"]
ENTRY = (*PLACES, *ELSEWHERE, "formatting", "ranking", "num_samples", "columns", "tags")


@dataclass(frozen=True)
class Source:
    name: str
    files: tuple[Path, ...]
    num_samples: int | None = None
    """rows read, from the start; None: all."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """our key: the rows' own; empty: rows are read as they are."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """LLaMA-Factory's tags: which keys and words the rows' turns use."""

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(file:line, row) of every file."""
        for path in self.files:
            for place, row in rows_of(path):
                yield place, self._ours(place, row) if isinstance(row, dict) else row

    def _ours(self, place: str, row: Row) -> Row | BadRow:
        """The row under our keys and roles. As in LLaMA-Factory, columns that are named are all that is read."""
        if self.columns:
            for column in self.columns.values():
                if column not in row:
                    return BadRow(f"{place}: {column} is missing; {REGISTRY} names it as a column of {self.name}")
            own = {key: row[key] for key in OWN if key in row}
            row = own | {ours: row[theirs] for ours, theirs in self.columns.items()}
        if self.tags:
            row = {key: self._turns(value) for key, value in row.items()}
        return row

    def _turns(self, value: Any) -> Any:
        """Turns under our keys and roles; what is no turn stays as it is, for formats to judge."""
        if isinstance(value, list):
            return [self._turns(item) for item in value] if all(isinstance(item, dict) for item in value) else value
        role, content = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        if not (isinstance(value, dict) and role in value and content in value):
            return value
        words = {self.tags[tag]: ours for tag, ours in ROLE_TAGS.items() if tag in self.tags}
        said = value[role]
        others = {key: item for key, item in value.items() if key not in (role, content)}
        return others | {"from": words.get(said, said) if isinstance(said, str) else said, "value": value[content]}


def find_dataset(dataset: str, dataset_dir: str) -> Source:
    """The source that a name stands for; ValueError names where it was looked for, and the choices."""
    if files := _local(dataset, Path(dataset).expanduser()):
        return Source(dataset, files)
    directory = Path(dataset_dir)
    registry = read_json(directory / REGISTRY) if (directory / REGISTRY).is_file() else {}
    if not isinstance(registry, dict):
        raise ValueError(f"{directory / REGISTRY}: expected an object of names, got {registry!r:.40}")
    if dataset in registry:
        return _registered(dataset, registry[dataset], directory)
    tried = [directory / (dataset + suffix) for suffix in ("", *SUFFIXES)]
    for path in tried:
        if files := _local(dataset, path):
            return Source(dataset, files)
    hub = HUB_NAME.fullmatch(dataset) if suffix_of(Path(dataset)) is None else None
    if hub:
        return Source(dataset, _fetch(dataset, hub[1], hub[2] or "train"))
    near = difflib.get_close_matches(dataset, registry, n=3, cutoff=0.5) or list(registry)[:8]
    looked = f"{dataset}, {tried[0]} with or without {', '.join(SUFFIXES)}"
    named = f"; {directory / REGISTRY} has {', '.join(near)}" if registry else ""
    raise ValueError(f"dataset={dataset}: no such file; looked for {looked}{named}")


def _local(dataset: str, path: Path) -> tuple[Path, ...]:
    """The data files at a path; none where there is nothing."""
    if path.is_dir():
        files = tuple(sorted(p for p in path.iterdir() if p.is_file() and suffix_of(p) and p.name != REGISTRY))
        if not files:
            raise ValueError(
                f"dataset={dataset}: the directory {path} holds no {', '.join(SUFFIXES)} file; name one that does"
            )
        return files
    if path.is_file() and suffix_of(path) is None:
        raise ValueError(f"dataset={dataset}: {path.suffix or 'no'} suffix; {', '.join(SUFFIXES)} files are read")
    return (path,) if path.is_file() else ()


def _registered(name: str, entry: Any, directory: Path) -> Source:
    where = f"dataset={name}: its entry in {directory / REGISTRY}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r:.40}; expected an object")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    _check_keys(entry, ENTRY, PLACES, f"{where} has ")
    _check_keys(columns, COLUMNS, COLUMNS, f"{where} has columns: ")
    _check_keys(tags, TAGS, TAGS, f"{where} has tags: ")
    formatting, count = entry.get("formatting", "alpaca"), entry.get("num_samples")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ValueError(f"{where} has formatting={formatting!r:.40}; expected alpaca, sharegpt or openai")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"{where} has num_samples={count!r:.40}; expected a whole number of at least 1")
    if entry.get("hf_hub_url"):
        split, subset, folder = entry.get("split") or "train", entry.get("subset"), entry.get("folder")
        files = _fetch(name, entry["hf_hub_url"], split, subset, folder, entry.get("revision"))
    elif entry.get("file_name"):
        files = _local(name, directory / entry["file_name"])
        if not files:
            raise ValueError(f"{where} names {entry['file_name']}, which is not in {directory}")
    else:
        given = next((key for key in ELSEWHERE if entry.get(key)), "neither")
        raise ValueError(f"{where} gives {given}; only file_name and hf_hub_url are read")
    columns = {COLUMNS[column]: key for column, key in columns.items() if key is not None}
    return Source(name, files, count, columns, {tag: word for tag, word in tags.items() if word is not None})


def _check_keys(said: Any, known: Collection[str], texts: Collection[str], has: str) -> None:
    """ValueError for a key that is not known, and for one of `texts` that is no text."""
    if not isinstance(said, dict):
        raise ValueError(f"{has}{said!r:.40}; expected an object")
    for key, value in said.items():
        if key not in known:
            raise ValueError(f"{has}{key}={value!r:.40}; expected some of {', '.join(known)}")
        if key in texts and not isinstance(value, str | None):
            raise ValueError(f"{has}{key}={value!r:.40}; expected text")


def _fetch(
    dataset: str, repo: str, split: str, subset: str | None = None, folder: str | None = None,
    revision: str | None = None,
) -> tuple[Path, ...]:  # fmt: skip
    """The data files of one split of a dataset on the hub; where no name says a split, train is all of them."""
    under = f"{folder}/" if folder else ""
    # In two steps, so that of a large dataset only the split is fetched.
    files = _snapshot(dataset, repo, revision, [f"{under}*{split}*{suffix}" for suffix in SUFFIXES], [])
    found = [name for name in files if _says(split, name)]
    if not files and split == "train":
        files = _snapshot(dataset, repo, revision, [f"{under}*{suffix}" for suffix in SUFFIXES], NOT_TRAIN)
        found = list(files)
    found = sorted(name for name in found if subset is None or _says(subset, name))
    if not found:
        asked = f"split {split}" + (f" and subset {subset}" if subset else "")
        near = f"; it has {', '.join(sorted(files)[:8])}" if files else ""
        raise ValueError(f"dataset={dataset}: {repo} has no data file of {asked}{near}; a split is named {repo}:SPLIT")
    return tuple(files[name] for name in found)


def _says(word: str, name: str) -> bool:
    """Whether a file's path has a word: `train` is not in `train_prefs.parquet`, nor `en` in `open/0.parquet`."""
    return re.search(rf"(^|[/._-]){re.escape(word)}([/.-]|$)", name) is not None


def _snapshot(
    dataset: str, repo: str, revision: str | None, allow: list[str], ignore: list[str]
) -> dict[str, Path]:  # fmt: skip
    """The files of a dataset on the hub that the patterns allow, by their name there."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=allow, ignore_patterns=ignore
            )
        )
    except Exception as error:  # the hub's client raises a family of types: offline, missing, gated, malformed name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"dataset={dataset}: no such file, and the Hugging Face hub did not give it ({reason})"
        ) from None
    names = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file() and p.name != REGISTRY}
    # The directory may hold what was fetched before.
    return {
        name: p
        for name, p in names.items()
        if any(fnmatch(name, pattern) for pattern in allow) and not any(fnmatch(name, pattern) for pattern in ignore)
    }

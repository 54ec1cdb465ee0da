"""Labelling: pairs of responses in, rows to train on out.

    {"prompt": "Hi", "responses": ["Hello", "No"]}             or "response_a" and "response_b" beside any prompt
 -> {"messages": [...], "chosen": "Hello", "rejected": "No", "id": "pairs.jsonl:1", "judge": ..., "judge_p": 0.93}

A row that has chosen and rejected is read too, with chosen as its first response, and labelled anew. judge_p is the
probability that chosen is the better one; with soft_labels it is also the row's soft_label, which the losses read. Ties
and what could not be judged go to OUT.ties.jsonl and OUT.invalid.jsonl. Of a row its id, source, weight and dimensions
are carried over; its margin and soft_label are not, for they were of another label.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dpo.build import sources_of
from dpo.data import rows_wanted
from dpo.digests import write_beside
from dpo.formats import BadRow, examples_of
from dpo.judge.verdict import Judged, Pair, Verdict
from dpo.rankings import LISTS, SCORE_LISTS, SCORES, is_ranked

TWO = ("response_a", "response_b")
# Who wrote the first response and who the second, by whether the row is labelled: scores may turn the order of a list.
WRITERS = {False: ("model_a", "model_b"), True: ("chosen_model", "rejected_model")}
OTHERS = {Verdict.TIE: "ties", Verdict.INVALID: "invalid"}


@dataclass(frozen=True)
class Row:
    pair: Pair
    labelled: bool
    """whether the row itself says that its first response is the better one."""
    more: Mapping[str, Any]
    """source, weight and dimensions, as far as the row has them; in dimensions the first response is `chosen`."""
    writers: tuple[str, ...] = ()
    """the models that wrote the responses; empty where the row does not say."""


def read_pairs(cfg: DictConfig) -> tuple[list[Row], list[str]]:
    """(pairs, bad rows as one line each) of cfg.dataset."""
    rows: list[Row] = []
    bad: list[str] = []
    sources = sources_of(cfg, cfg.dataset, "eval.jsonl")
    for place, row in chain.from_iterable(islice(s.rows(), rows_wanted(s, cfg.max_samples)) for s in sources):
        try:
            rows += rows_of(row, place, data_format=cfg.data_format, ranking_to_pairs=cfg.ranking_to_pairs)
        except BadRow as error:
            if cfg.on_bad_row == "stop":
                raise
            bad.append(str(error))
    if not rows:
        raise ValueError(f"dataset={cfg.dataset}: no usable row ({len(bad)} bad){': ' + bad[0] if bad else ''}")
    ((id, times),) = Counter(row.pair.id for row in rows).most_common(1)
    if times > 1:
        raise ValueError(f"dataset={cfg.dataset}: the id {id!r:.60} stands twice; give every row its own, or none")
    return rows, bad


def rows_of(row: Any, place: str, *, data_format: str | None, ranking_to_pairs: str) -> list[Row]:
    """The pairs of one row; its `id`, or its place, is theirs."""
    labelled = not _is_unlabelled(row)
    if not labelled:
        texts = [row[key] for key in TWO] if TWO[0] in row else next(row[key] for key in LISTS if row.get(key))
        if len(texts) != 2:
            raise BadRow(f"{place}: {len(texts)} responses without scores; two are compared")
        if texts[0] == texts[1]:
            raise BadRow(f"{place}: both responses are the same, which no judge can part; leave the row out")
        # In their order, as if the first had been labelled the better one: read and checked like any other row.
        row = {key: value for key, value in row.items() if key not in (*TWO, *LISTS)}
        row |= {"responses": texts, "scores": [1, 0]}
    examples = examples_of(row, place, "dpo", data_format=data_format, ranking_to_pairs=ranking_to_pairs)
    own = row.get("id")
    name = str(own) if type(own) in (str, int) and own != "" else place
    names = [name] if len(examples) == 1 else [f"{name}#{i}" for i in range(1, len(examples) + 1)]
    more = {"source": examples[0].origin or None, "weight": row.get("weight"), "dimensions": examples[0].dimensions}
    more = {key: value for key, value in more.items() if value is not None}
    keys = WRITERS[labelled]
    writers = tuple(str(row[key]) for key in keys) if set(keys) <= set(row) and len(examples) == 1 else ()
    return [
        Row(Pair(id, example.messages, *example.responses), labelled, more, writers)
        for id, example in zip(names, examples, strict=True)
    ]


def _is_unlabelled(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    if all(row.get(key) is not None for key in TWO):
        return not any(row.get(key) is not None for key in ("chosen", "rejected"))
    items = next((row[key] for key in LISTS if row.get(key)), None)
    scored = [key for key in SCORE_LISTS if row.get(key) is not None] + [
        key for item in items or () if isinstance(item, dict) for key in SCORES if item.get(key) is not None
    ]
    return is_ranked(row) and bool(items) and not scored


def _swapped(dimensions: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {"chosen": of["rejected"], "rejected": of["chosen"]} for name, of in dimensions.items()}


def other_files(path: Path) -> dict[Verdict, Path]:
    return {verdict: path.with_name(f"{path.name}.{name}.jsonl") for verdict, name in OTHERS.items()}


def check_output(output_file: str | None) -> Path:
    """The path to write; ValueError where something would be lost."""
    if not output_file or not output_file.endswith(".jsonl"):
        raise ValueError(f"output_file={output_file}: expected the name of a .jsonl file for the labelled rows")
    path = Path(output_file).expanduser()
    for file in (path, *other_files(path).values()):
        if file.exists():
            raise ValueError(f"output_file={output_file}: {file} exists, and is never overwritten; name another file")
    return path


def write_rows(path: Path, rows: Sequence[Row], judged: Sequence[Judged], *, judge: str, soft_labels: bool) -> None:
    """The labelled rows, and beside them the ties and the invalid ones; each file whole or not there."""
    files: dict[Path, list[Mapping[str, Any]]] = {path: [], **{file: [] for file in other_files(path).values()}}
    for row, one in zip(rows, judged, strict=True):
        pair = row.pair
        said = {"id": pair.id, **row.more, "judge": judge}
        if one.verdict in OTHERS:
            both = {"messages": list(pair.messages), "responses": [pair.first, pair.second]}
            files[other_files(path)[one.verdict]].append(both | said | {"judge_p": one.p, "reason": one.reason})
            continue
        wins = one.verdict is Verdict.FIRST
        chosen, rejected = (pair.first, pair.second) if wins else (pair.second, pair.first)
        if not wins and "dimensions" in said:
            said["dimensions"] = _swapped(said["dimensions"])
        p = one.p if one.p is None or wins else 1 - one.p
        texts = {"messages": list(pair.messages), "chosen": chosen, "rejected": rejected}
        soft = {"soft_label": p} if soft_labels and p is not None else {}
        files[path].append(texts | said | {"judge_p": p} | soft)
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, found in files.items():
        if found or file == path:
            write_beside(file, "".join(json.dumps(row) + "\n" for row in found).encode())

"""Pairs per second from Examples to token ids, ours against TRL's DPOTrainer, in turn in one process.

    python -m experiments.tokenisation_speed.run MODEL_DIR PAIRS.json [rounds]

The same rows, the checkpoint's own template, nothing cut. TRL's is what DPOTrainer does with a data set before training
(_prepare_dataset, one process). Each round times both one after the other, and the figure is the median over rounds of
the ratio within a round, because the speed of a shared machine drifts. The ids of both are compared.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
from transformers import AutoTokenizer
from trl import DPOTrainer

from dpo.data import read_examples
from dpo.formats import Example
from dpo.tokens import Encoded, encode_all
from models.template import ChatTemplate
from models.tokenizer import Tokenizer

NO_LIMIT = 1 << 20


def as_trl_reads(examples: Sequence[Example]) -> datasets.Dataset:
    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    sides = ("chosen", "rejected")
    return datasets.Dataset.from_list([
        {"prompt": list(e.messages)} | {side: turn(text) for side, text in zip(sides, e.responses, strict=True)}
        for e in examples
    ])  # fmt: skip


def main(model_dir: str, pairs: str, rounds: str = "5") -> None:
    datasets.disable_progress_bars()
    datasets.disable_caching()
    examples, _ = read_examples(Path(pairs), stage="dpo", on_bad_row="skip")
    template = ChatTemplate("auto", Tokenizer(Path(model_dir)))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # All that it reads of a trainer and its arguments.
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    args: Any = SimpleNamespace(dataset_num_proc=None, max_length=None)

    def ours(examples: Sequence[Example]) -> tuple[float, list[Encoded]]:
        start = time.perf_counter()
        rows, _ = encode_all(examples, template, cutoff_len=NO_LIMIT, on_bad_row="stop")
        return time.perf_counter() - start, rows

    def theirs(examples: Sequence[Example]) -> tuple[float, datasets.Dataset]:
        dataset = as_trl_reads(examples)
        start = time.perf_counter()
        rows = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
        return time.perf_counter() - start, rows

    for warm in (ours, theirs):
        warm(examples[:50])
    times = []
    for _ in range(int(rounds)):
        (our_time, our_rows), (their_time, their_rows) = ours(examples), theirs(examples)
        times.append((their_time, our_time))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    same = sum(
        [row.prompt_ids, *row.response_ids] == [other[name] for name in names]
        for row, other in zip(our_rows, their_rows, strict=True)
    )
    print(f"{Path(pairs).name}: {len(examples)} pairs, the ids of {same} are equal")
    for name, column in zip(("TRL", "ours"), zip(*times, strict=True), strict=True):
        print(f"  {name:5s}{len(examples) / statistics.median(column):8.0f} pairs/s")
    print(f"  ours is {statistics.median(a / b for a, b in times):.1f} times as fast")


if __name__ == "__main__":
    main(*sys.argv[1:])

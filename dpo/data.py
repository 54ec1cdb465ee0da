"""Preference data: the Examples of a dataset, and what is held out of them.

A bad row stops the run with file:line, the key and the rule, or is counted and listed (on_bad_row=skip).
"""

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dpo.files import rows_of
from dpo.formats import BadRow, Example, examples_of


def read_examples(
    path: Path, *, stage: str, on_bad_row: str, max_samples: int | None = None
) -> tuple[list[Example], list[str]]:
    """(examples, bad rows as one line each) of the first max_samples rows of a .json or .jsonl file.

    stage: as in examples_of. on_bad_row: stop raises the first BadRow, skip collects them.
    """
    examples: list[Example] = []
    bad: list[str] = []
    for source, row in islice(rows_of(path), max_samples):
        try:
            examples += examples_of(row, source, stage)
        except BadRow as error:
            if on_bad_row == "stop":
                raise
            bad.append(str(error))
    if not examples:
        raise ValueError(f"{path}: no usable row ({len(bad)} bad){': ' + bad[0] if bad else ''}")
    return examples, bad


def split_by_prompt(examples: Sequence[Example], val_size: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): val_size of the rows (a share below 1, else a count), no prompt on both sides."""
    wanted = val_size * len(examples) if val_size < 1 else val_size
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(json.dumps(example.messages), []).append(example)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    held: set[str] = set()
    count = 0
    for prompt in prompts:
        if count >= wanted:
            break
        held.add(prompt)
        count += len(by_prompt[prompt])
    train = [example for example in examples if json.dumps(example.messages) not in held]
    if not train or not held:
        raise ValueError(f"val_size={val_size}: leaves {len(train)} of {len(examples)} rows to train on")
    return train, [example for example in examples if json.dumps(example.messages) in held]


if __name__ == "__main__":
    from dpo.show import command

    command()

"""Preference data: the Examples of datasets, how several are mixed, and what is held out of them.

A bad row stops the run with file:line, the key and the rule, or is counted and listed (on_bad_row=skip).
"""

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dpo.formats import BadRow, Example, examples_of
from dpo.sources import Source

MIX_STRATEGIES = ("concat", "interleave_under", "interleave_over")


def read_examples(
    data: Path | Source, *, stage: str, on_bad_row: str, max_samples: int | None = None,
    data_format: str | None = None, ranking_to_pairs: str = "best_worst",
) -> tuple[list[Example], list[str]]:  # fmt: skip
    """(examples, bad rows as one line each) of the first max_samples rows of a file or a source.

    stage, data_format, ranking_to_pairs: as in examples_of. on_bad_row: stop raises the first BadRow, skip collects it.
    """
    source = data if isinstance(data, Source) else Source(str(data), (data,))
    examples: list[Example] = []
    bad: list[str] = []
    wanted = rows_wanted(source, max_samples)
    count = 0
    for place, row in islice(source.rows(), wanted):
        count += 1
        try:
            examples += examples_of(row, place, stage, data_format=data_format, ranking_to_pairs=ranking_to_pairs)
        except BadRow as error:
            if on_bad_row == "stop":
                raise
            bad.append(str(error))
    if not examples:
        raise ValueError(f"{source.name}: no usable row ({len(bad)} bad){': ' + bad[0] if bad else ''}")
    if wanted is not None and wanted == source.num_samples and count < wanted:
        raise ValueError(f"{source.name}: num_samples={wanted}, but it has {count} rows; ask for at most as many")
    return examples, bad


def rows_wanted(source: Source, max_samples: int | None) -> int | None:
    """How many rows are read of a source, from its start; None: all."""
    return min(filter(None, (max_samples, source.num_samples)), default=None)


def mix_order(
    lengths: Sequence[int], strategy: str, probs: Sequence[float] | None, seed: int
) -> list[tuple[int, int]]:  # fmt: skip
    """(dataset, row) of a mixture of datasets of these lengths.

    concat: one after the other. interleave_under and _over: a row of each in turn, or with `probs` of a random one,
    until the first, or each, has given all its rows; one that has given all begins anew.
    """
    if strategy == "concat":
        return [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    under = strategy == "interleave_under"
    if probs is None:
        return [(d, i % n) for i in range((min if under else max)(lengths)) for d, n in enumerate(lengths)]
    expected = (min if under else max)(n * sum(probs) / p for n, p in zip(lengths, probs, strict=True))
    if expected > 100 * sum(lengths):
        raise ValueError(
            f"interleave_probs={list(probs)}: would draw about {expected:.0f} rows from {sum(lengths)}; make them more "
            "alike"
        )
    rng = random.Random(seed)
    given = [0] * len(lengths)
    order = []
    while not (any if under else all)(count >= n for count, n in zip(given, lengths, strict=True)):
        (d,) = rng.choices(range(len(lengths)), probs)
        order.append((d, given[d] % lengths[d]))
        given[d] += 1
    return order


def describe_mix(names: Sequence[str], lengths: Sequence[int], order: Sequence[tuple[int, int]]) -> str:
    """One line: how many rows each dataset gives, of how many that it has."""
    drawn = [dataset for dataset, _ in order]
    return "mixed: " + ", ".join(
        f"{drawn.count(d)} rows from the {n} of {name}" for d, (name, n) in enumerate(zip(names, lengths, strict=True))
    )


def prompt_of(example: Example) -> str:
    """What makes two prompts the same: every turn, system too."""
    return json.dumps(example.messages)


def split_by_prompt(examples: Sequence[Example], val_size: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): val_size of the rows (a share below 1, else a count), no prompt on both sides."""
    wanted = val_size * len(examples) if val_size < 1 else val_size
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(prompt_of(example), []).append(example)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    held: set[str] = set()
    count = 0
    for prompt in prompts:
        if count >= wanted:
            break
        held.add(prompt)
        count += len(by_prompt[prompt])
    train = [example for example in examples if prompt_of(example) not in held]
    if not train or not held:
        raise ValueError(f"val_size={val_size}: leaves {len(train)} of {len(examples)} rows to train on")
    return train, [example for example in examples if prompt_of(example) in held]


def trained_prompts(train: Sequence[Example], held_out: Sequence[Example]) -> tuple[int, int]:
    """(how many held-out prompts are also trained on, of how many)."""
    held = {prompt_of(example) for example in held_out}
    return len(held & {prompt_of(example) for example in train}), len(held)


if __name__ == "__main__":
    from dpo.show import command

    command()

"""Are runs that are made to fail named by their own diagnostic, and is a healthy one left alone?

    python -m experiments.provoked_failures.run OUTPUT_DIR [ARM ...]

Each arm is the default run of the built-in world with one thing wrong. What is printed is read from its alarms.
"""

import difflib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from dpo.diagnostics import DIAGNOSTICS
from experiments.world import world
from models.command import CONF
from models.weights import WORLD
from train import train

Row = dict[str, Any]
DATA = {"train": WORLD / "data" / "train.jsonl", "eval": WORLD / "data" / "eval.jsonl"}


def as_they_are(rows: Sequence[Row], split: str) -> Iterator[Row]:
    yield from rows


def labels_drawn_by_lot(rows: Sequence[Row], split: str) -> Iterator[Row]:
    """Nearly half of the labels are wrong, held out too."""
    draw = random.Random(split)
    for row in rows:
        flip = draw.random() < 0.45
        yield row | {"chosen": row["rejected"], "rejected": row["chosen"]} if flip else row


def longer_is_chosen(rows: Sequence[Row], split: str) -> Iterator[Row]:
    for row in rows:
        shorter, longer = sorted((row["chosen"], row["rejected"]), key=lambda text: len(text.split()))
        if len(shorter.split()) < len(longer.split()):
            yield row | {"chosen": longer, "rejected": shorter}


def nearly_equal(rows: Sequence[Row], split: str) -> Iterator[Row]:
    """The rejected response is the most similar of the grammar that is worse."""
    for row in rows:
        prompt, chosen = row["conversations"][0]["value"], row["chosen"]
        reward = world.gold_reward(prompt, chosen)
        worse = [text for text in world.responses(prompt) if world.gold_reward(prompt, text) < reward]
        close = difflib.get_close_matches(chosen, worse, n=1, cutoff=0.85)
        if close:
            yield row | {"rejected": close[0]}


def a_weight_that_overflows(rows: Sequence[Row], split: str) -> Iterator[Row]:
    """Finite where it is read, infinite in the gradient: what bad numbers of one row look like to the trainer."""
    for number, row in enumerate(rows):
        yield row | {"weight": 3e38} if split == "train" and number == 1000 else row


ARMS: dict[str, tuple[str | None, tuple[str, ...], Callable[[Sequence[Row], str], Iterator[Row]] | None]] = {
    # name: (the diagnostic that must name it, what is wrong in the config, what is wrong in the data)
    "healthy": (None, (), None),
    "learning rate 1e-2": ("training_instability", ("learning_rate=1e-2",), None),
    "beta 1e-3": ("over_optimisation", ("pref_beta=1e-3",), None),
    "flipped labels": ("noisy_labels", (), labels_drawn_by_lot),
    "length-biased pairs": ("length_exploitation", ("pref_beta=0.3",), longer_is_chosen),
    "near-identical pairs": ("likelihood_displacement", ("pref_beta=0.3",), nearly_equal),
    "NaN in a row": ("non_finite", (), a_weight_that_overflows),
}


def overrides_of(change: Callable[[Sequence[Row], str], Iterator[Row]] | None, folder: Path) -> list[str]:
    """The datasets of an arm, written to its folder."""
    if change is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for split, source in DATA.items():
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        text = "".join(json.dumps(row) + "\n" for row in change(rows, split))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return [f"dataset={folder}/train.jsonl", f"eval_dataset={folder}/eval.jsonl"]


def alarms(run: Path) -> dict[str, str]:
    """{name: what was found} from report.md."""
    lines = (run / "report.md").read_text(encoding="utf-8").splitlines()
    found = [line.removeprefix("- **").split("**, ", 1) for line in lines if line.startswith("- **")]
    return {name: rest for name, rest in found}


def main(output_dir: Path, names: Sequence[str]) -> None:
    table = []
    for name in names or ARMS:
        expected, wrong, change = ARMS[name]
        run = output_dir / name.replace(" ", "_")
        settings = ["eval_strategy=steps", "eval_steps=47", "logging_steps=10", "overwrite_output_dir=true"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            data = overrides_of(change, output_dir / "data" / run.name)
            cfg = compose("config", [*settings, f"output_dir={run}", *wrong, *data])
        train(cfg)
        table.append((name, expected, alarms(run)))
    print(f"\n{'arm':22s} named by")
    for name, expected, found in table:
        right = expected in found if expected else not found
        print(f"{name:22s} {'ok ' if right else 'NOT'} {expected or 'nothing'}; all: {', '.join(found) or 'none'}")
        for alarm, what in found.items():
            print(f"    {alarm}: {what}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(str(__doc__))
    unknown = [name for name in sys.argv[2:] if name not in ARMS]
    if unknown:
        sys.exit(f"{unknown[0]}: expected some of {', '.join(ARMS)}")
    assert {expected for expected, *_ in ARMS.values()} - {None} <= DIAGNOSTICS.keys()
    main(Path(sys.argv[1]), sys.argv[2:])

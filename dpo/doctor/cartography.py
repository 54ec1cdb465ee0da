"""A map of the rows by how training went with each: `python -m dpo.doctor ledger=RUN_DIR`.

Of each visit in RUN_DIR/ledger.jsonl (a row as an update saw it before it changed the weights, or a held-out row in an
evaluation) p = sigmoid(margin) is the probability that the policy's own reward gives the label. Over a row's visits

    confidence     the mean of p
    variability    the standard deviation of p
    correctness    the share of visits that rank it right, margin > 0

(dataset cartography: Swayamdipta et al. 2020, arXiv:2009.10795, with a pair's label in a class's place). The paper
takes the highest or lowest third of each measure; here the kinds do not overlap, of rows that are seen twice or more:

    easy              right at every visit
    ambiguous         right at some
    hard              wrong at every visit
    likely flipped    hard, with a confidence of at most 1 - (the median of the easy rows' confidence)

So the policy is as sure that such a label is wrong as it is that the median easy one is right, whatever beta and the
learning rate make of the margins' size. Variability does not enter: where labels were exchanged on purpose, hard rows
that vary little were no more often exchanged than other hard ones.

What is seen once has a confidence alone. Visits of update 1 and evaluation 0 are left out: there policy is reference,
and the margin 0 but for rounding. A policy sees its training rows, so it learns wrong labels too, the later the more;
dpo.doctor.flips asks one that has not.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo.build import read_datasets
from dpo.doctor.page import NO_PLOT, STYLE, WORST, picture, row_html
from dpo.files import rows_of
from dpo.formats import BadRow, Example
from dpo.run import CONFIG
from dpo.turns import is_number, show
from models.command import printable

LEDGER = "ledger.jsonl"
SPLITS = {"train": 2, "eval": 1}
"""The first step whose visits say something."""
KINDS = {
    "likely flipped": "wrong at every visit, and as surely as the median easy row is right",
    "hard": "wrong at every visit, less surely",
    "ambiguous": "right at some visits",
    "easy": "right at every visit",
    "seen once": "no variability; num_train_epochs=2 or more gives it, of held-out rows a second evaluation",
}
PLACES, LONGEST, SHOWN_FAULTS = 3, 200, 3
COLOURS = {"easy": "tab:blue", "ambiguous": "tab:orange", "hard": "tab:brown", "likely flipped": "tab:red"}


@dataclass(frozen=True)
class Ledger:
    margins: Mapping[tuple[str, str], list[float]]
    """of every (split, source), in the order of its visits."""
    left_out: int
    """visits before the policy had learned anything."""
    damaged: Sequence[str]
    """lines that are no visit: file:line, the rule and what was given."""
    cut: bool
    """whether the last line has no end, as a crash leaves it."""


@dataclass(frozen=True)
class Place:
    """Where a row stands on the map."""

    split: str
    source: str
    kind: str
    visits: int
    confidence: float
    variability: float
    correctness: float

    @property
    def why(self) -> str:
        right = round(self.correctness * self.visits)
        return (
            f"confidence {self.confidence:.3g}, variability {self.variability:.3g}, ranked right at {right} of "
            f"{self.visits} visits"
        )


def read_ledger(run: Path) -> Ledger:
    """ValueError where the run has no ledger, or one without a visit that says anything."""
    path = run / LEDGER
    if not path.is_file():
        raise ValueError(f"ledger={run}: holds no {LEDGER}; name the directory of a run that wrote one")
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 1, 0))
        cut = file.read() not in (b"\n", b"")
    lines = list(rows_of(path))[: -1 if cut else None]
    margins: dict[tuple[str, str], list[float]] = {}
    left_out, damaged = 0, []
    for place, visit in lines:
        try:
            _check_visit(visit, place)
        except BadRow as error:
            damaged.append(str(error))
            continue
        if visit["step"] < SPLITS[visit["split"]]:
            left_out += 1
        else:
            margins.setdefault((visit["split"], visit["source"]), []).append(float(visit["margin"]))
    if not margins:
        raise ValueError(
            f"{path}: no visit after the first update in {len(lines)} lines{', ' + damaged[0] if damaged else ''}; "
            "name the directory of a longer run"
        )
    return Ledger(margins, left_out, damaged, cut)


# What every line of a ledger says, and the rule for it.
VISIT = {
    "step": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "a whole number of at least 0"),
    "split": (lambda v: v in ("train", "eval"), "train or eval"),
    "source": (lambda v: isinstance(v, str), "text"),
    "loss": (is_number, "a finite number"),
    "margin": (is_number, "a finite number"),
}


def _check_visit(visit: Any, place: str) -> None:
    if isinstance(visit, BadRow):
        raise visit
    if not isinstance(visit, dict):
        raise BadRow(f"{place}: a visit must be an object, got {show(visit)}")
    for key, (holds, rule) in VISIT.items():
        if key not in visit:
            raise BadRow(f"{place}: {key} is missing; a visit has {', '.join(VISIT)}")
        if not holds(visit[key]):
            raise BadRow(f"{place}: {key} must be {rule}, got {show(visit[key])}")


def map_of(split: str, margins: Mapping[str, Sequence[float]]) -> list[Place]:
    """The rows of a split, each in its place, the least confident first."""
    places = []
    for source, values in margins.items():
        row = np.array(values)
        # log sigmoid(x) = -log(1 + exp(-x)) neither overflows nor loses the order of what is near 0.
        p = np.exp(-np.logaddexp(0, -row))
        correctness = float((row > 0).mean())
        kind = "seen once" if len(row) == 1 else {0.0: "hard", 1.0: "easy"}.get(correctness, "ambiguous")
        places.append(Place(split, source, kind, len(row), float(p.mean()), float(p.std()), correctness))
    easy = [place.confidence for place in places if place.kind == "easy"]
    limit = 1 - float(np.median(easy)) if easy else math.nan
    return sorted(
        (
            replace(place, kind="likely flipped") if place.kind == "hard" and place.confidence <= limit else place
            for place in places
        ),
        key=lambda place: place.confidence,
    )


def to_read(places: Sequence[Place]) -> dict[str, list[Place]]:
    """The rows to read of each kind but the easy ones: the least confident, of the ambiguous the most variable."""
    by_kind = {kind: [place for place in places if place.kind == kind] for kind in KINDS if kind != "easy"}
    by_kind["ambiguous"].sort(key=lambda place: -place.variability)
    return {kind: found for kind, found in by_kind.items() if found}


def examples_of_run(run: Path) -> tuple[dict[str, list[Example]], str]:
    """(the Examples of a run's datasets by their place, why there are none or nothing)."""
    found: dict[str, list[Example]] = {}
    try:
        saved = OmegaConf.load(run / CONFIG)
        assert isinstance(saved, DictConfig)
        for names, world_file in ((saved.dataset, "train.jsonl"), (saved.eval_dataset, "eval.jsonl")):
            for examples in read_datasets(saved, names, world_file)[0].values() if names else ():
                for example in examples:
                    found.setdefault(example.source, []).append(example)
    except (ValueError, OSError, OmegaConfBaseException) as error:
        return {}, " ".join(str(error).split())
    return found, ""


def texts_of(examples: Sequence[Example]) -> tuple[str, list[tuple[str, str]]]:
    """(question, responses by name) of the rows of one place: several where a ranking or a labelled pair gave them."""
    names = {None: ("chosen", "rejected"), True: ("desirable",), False: ("undesirable",)}
    sides = [pair for example in examples for pair in zip(names[example.label], example.responses, strict=False)]
    return (examples[0].messages[-1]["content"] if examples else "", sides)


def map_run(cfg: DictConfig) -> dict[str, list[Place]]:
    """The map of a run's rows by split, told in the terminal and written to output_dir."""
    run = Path(cfg.ledger)
    ledger = read_ledger(run)
    maps = {}
    for split in SPLITS:
        margins = {source: values for (its, source), values in ledger.margins.items() if its == split}
        if margins:
            maps[split] = map_of(split, margins)
    examples, fault = examples_of_run(run)
    told = summary(ledger, maps, examples, fault)
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    drawn = scatter(maps)
    write_map(output / "report.html", run, told, maps, examples, drawn)
    report = {
        "ledger": str(run / LEDGER), "visits_left_out": ledger.left_out, "damaged": list(ledger.damaged),
        "last_line_cut": ledger.cut, "kinds": KINDS,
        "counts": {split: dict(Counter(place.kind for place in places)) for split, places in maps.items()},
        "rows": [asdict(place) for places in maps.values() for place in places],
    }  # fmt: skip
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(printable("\n".join([*told, *rows_to_read(maps, examples)])))
    if isinstance(drawn, str):
        print(drawn)
    print(f"report: {output / 'report.html'}, {output / 'report.json'}")
    return maps


def summary(
    ledger: Ledger, maps: Mapping[str, Sequence[Place]], examples: Mapping[str, Sequence[Example]], fault: str
) -> list[str]:
    """What was read, and how many rows are of each kind."""
    visits = sum(map(len, ledger.margins.values()))
    lines = [f"{visits:,} visits of {len(ledger.margins):,} rows, without {ledger.left_out:,} before the first update"]
    if ledger.cut:
        lines.append("the last line was cut short, and is left out")
    if ledger.damaged:
        more = len(ledger.damaged) - SHOWN_FAULTS
        lines += [f"damaged, and left out: {line}" for line in ledger.damaged[:SHOWN_FAULTS]]
        lines += [f"damaged, and left out: {more:,} more lines"] if more > 0 else []
    for split, places in maps.items():
        counts = Counter(place.kind for place in places)
        lines += [
            f"{split:5s} {kind:14s} {counts[kind]:7,} rows ({counts[kind] / len(places):5.1%})  {meaning}"
            for kind, meaning in KINDS.items()
            if counts[kind]
        ]
    if fault:
        lines.append(f"texts are not shown: {fault}")
    shared = sum(len(examples[source]) > 1 for _, source in ledger.margins if source in examples)
    if shared:
        lines.append(f"{shared:,} places hold several pairs or labelled rows, which stand on the map as one")
    return lines


def rows_to_read(maps: Mapping[str, Sequence[Place]], examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """The first few rows of each kind with their texts, shortened."""
    lines = []
    for split, places in maps.items():
        for kind, found in to_read(places).items():
            lines += ["", f"{split}, {kind}:"]
            for place in found[:PLACES]:
                question, sides = texts_of(examples.get(place.source, ()))
                lines.append(f"  {place.source}: {place.why}")
                lines += [f"    {name:11s} {_short(text)}" for name, text in [("prompt", question), *sides] if sides]
    return lines


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [...]"


def scatter(maps: Mapping[str, Sequence[Place]]) -> Any:
    """A matplotlib figure of the rows that are seen twice or more, or why there is none."""
    maps = {split: [place for place in places if place.kind in COLOURS] for split, places in maps.items()}
    maps = {split: places for split, places in maps.items() if places}
    if not maps:
        return "No plot: no row was seen twice."
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_PLOT
    figure = Figure(figsize=(6 * len(maps), 5), layout="constrained")
    for axis, (split, places) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        for kind, colour in COLOURS.items():
            its = [place for place in places if place.kind == kind]
            x, y = [place.variability for place in its], [place.confidence for place in its]
            axis.scatter(x, y, s=6, alpha=0.5, color=colour, label=f"{kind} ({len(its):,})", linewidths=0)
        axis.set(title=split, xlabel="variability", ylabel="confidence")
        axis.legend(markerscale=3, loc="upper right")  # `best` is slow with many rows
    return figure


def write_map(
    path: Path, run: Path, told: Sequence[str], maps: Mapping[str, Sequence[Place]],
    examples: Mapping[str, Sequence[Example]], drawn: Any,
) -> None:  # fmt: skip
    sections = []
    for split, places in maps.items():
        for kind, found in to_read(places).items():
            sections.append(f"<h2>{split}, {kind}: {min(WORST, len(found))} of {len(found):,} rows</h2>")
            sections += [
                row_html(place.source, place.why, *texts_of(examples.get(place.source, ()))) for place in found[:WORST]
            ]
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>How training went with each row</title>',
            f"<style>{STYLE}</style></head><body><h1>How training went with each row</h1>",
            f"<p>{escape(str(run / LEDGER))}</p><pre>{escape(chr(10).join(told))}</pre>",
            f"<p>{escape(drawn)}</p>" if isinstance(drawn, str) else picture(drawn, "confidence over variability"),
            *sections,
            "</body></html>",
        ]
    )
    # Half a surrogate pair, which JSON can hold, has no UTF-8.
    path.write_bytes((page + "\n").encode("utf-8", "backslashreplace"))

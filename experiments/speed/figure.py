"""The figure of results.csv: pairs per second of each side at its best batch size, and memory at an equal one.

python -m experiments.speed.figure        (extra plot)
"""

import csv
from collections import defaultdict

import matplotlib

from experiments.speed.run import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"ours": "this project", "trl": "TRL", "llamafactory": "LLaMA-Factory"}
COLOURS = {"ours": "#2c6fbb", "trl": "#c44e52", "llamafactory": "#8c8c8c"}


def main() -> None:
    rows = list(csv.DictReader(RESULTS.open(encoding="utf-8")))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, title in zip(
        axes, ("pairs per second, as a multiple of TRL's", "peak memory, share of TRL's"), strict=True
    ):
        drawn: dict[str, list[float]] = defaultdict(list)
        for name in names:
            of_name = [row for row in rows if row["name"] == name]
            value = rates(of_name) if axis is axes[0] else memory(of_name)
            for side in LABELS:
                drawn[side].append(value.get(side, 0.0) / value["trl"])
        for i, (side, values) in enumerate(drawn.items()):
            places = [n + (i - 1) * 0.27 for n in range(len(names))]
            bars = axis.bar(places, values, 0.25, label=LABELS[side], color=COLOURS[side])
            axis.bar_label(bars, [f"{v:.2f}" if v else "" for v in values], fontsize=7)
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(RESULTS.with_name("speed.png"), dpi=150)


def rates(rows: list[dict[str, str]]) -> dict[str, float]:
    """Each side's best batch size."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["side"]] = max(best.get(row["side"], 0.0), float(row["pairs_per_second"]))
    return best


def memory(rows: list[dict[str, str]]) -> dict[str, float]:
    """At the largest batch size that TRL was measured at."""
    batch = max((row["batch"] for row in rows if row["side"] == "trl"), key=int)
    return {row["side"]: float(row["peak_gb"]) for row in rows if row["batch"] == batch}


if __name__ == "__main__":
    main()

"""task=compare: the numbers of several evaluations in one table and one plot, with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dpo.doctor.page import png_html
from dpo.evals.results import RESULTS, Result, read


def run(cfg: DictConfig) -> Result:
    found = {name: read_evaluation(Path(name)) for name in cfg.runs}
    differ = differences(found) or [{"": "nothing"}]
    result = Result("compare", {}, tables={"metrics": table(found), "what differs": differ})
    path = Path(cfg.output_dir) / "compare.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(found)
    if isinstance(drawn, str):
        print(drawn)
    else:
        # Once: the layout moves a little each time that it is computed.
        drawn.savefig(path, dpi=100, metadata={"Software": None})
        result.pictures = [png_html(path.read_bytes(), "the metrics of each evaluation")]
        print(f"plot: {path}")
    return result


def read_evaluation(directory: Path) -> dict[str, Any]:
    path = directory / RESULTS
    if not path.is_file():
        raise ValueError(f"runs={directory}: holds no {RESULTS}; name the output_dir of an evaluation")
    found = read(path)
    if "task" not in found:
        raise ValueError(f"runs={directory}: its {RESULTS} is no evaluation's; name the output_dir of eval.py")
    return found


def numbers(found: Mapping[str, Any]) -> dict[str, tuple[float, list[float] | None]]:
    """(value, interval) of every metric, under its task's name."""
    return {
        f"{found['task']}/{name}": (value, found["intervals"].get(name)) for name, value in found["metrics"].items()
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per metric, a column per evaluation."""
    columns = {name: numbers(one) for name, one in found.items()}
    metrics = list(dict.fromkeys(metric for column in columns.values() for metric in column))
    return [
        {"metric": metric, **{name: _shown(*column[metric]) for name, column in columns.items() if metric in column}}
        for metric in metrics
    ]


def _shown(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def differences(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The facts of their provenance that are not the same in all."""
    names = list(dict.fromkeys(name for one in found.values() for name in one["provenance"]))
    lines = [{"": name, **{run: one["provenance"].get(name) for run, one in found.items()}} for name in names]
    return [line for line in lines if len({str(line[run]) for run in found}) > 1]


def draw(found: Mapping[str, Mapping[str, Any]]) -> Any:
    """A figure with a panel per metric that has an interval somewhere, or else per metric; a line where it cannot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'No plot: drawing needs matplotlib (pip install -e ".[plot]").'
    columns = {name: numbers(one) for name, one in found.items()}
    metrics = list(dict.fromkeys(metric for column in columns.values() for metric in column))
    sure = [metric for metric in metrics if any(column.get(metric, (0, None))[1] for column in columns.values())]
    shown = sure or metrics
    figure = Figure(figsize=(7, 1 + len(shown) * (0.5 + 0.3 * len(columns))), layout="constrained")
    for axis, metric in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        for y, column in enumerate(columns.values()):
            if metric in column:
                value, interval = column[metric]
                axis.plot(value, y, "o", color=f"C{y}")
                axis.plot(interval or [value] * 2, [y, y], color=f"C{y}")
        axis.set_yticks(range(len(columns)), columns)
        axis.set_ylim(len(columns) - 0.5, -0.5)
        axis.set_title(f"{metric}, with its 95% interval" if metric in sure else metric, fontsize=10)
    return figure

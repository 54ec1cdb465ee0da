"""report.md: what a run was made of, how it went, and what that means; curves.png beside it.

Everything is read from the run's directory (config.yaml, metrics.jsonl, samples.jsonl), but for what was printed at its
start. The verdicts are the guide's: a healthy loss ends between 0.3 and 0.6, chosen rewards rise, rejected ones fall,
margins grow.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.diagnostics import Alarm
from dpo.run import RunDir, is_evaluation
from dpo.samples import at_two_steps
from models.command import printable

HEALTHY_LOSS = (0.3, 0.6)
SHOWN_SAMPLES = 8
Row = Mapping[str, float]


def write_report(run_dir: RunDir, notes: Mapping[str, str], alarms: Iterable[Alarm], ended: str, *, draw: bool) -> Path:
    """notes: what is said of the run beside its numbers, by heading. ended: how it ended. draw: curves.png too."""
    rows = run_dir.logged()
    training = [row for row in rows if not is_evaluation(row)]
    evaluations = [row for row in rows if is_evaluation(row)]
    figure = draw_curves(run_dir.path / "curves.png", training, evaluations) if draw and training else None
    alarms = list(alarms)
    parts = [
        f"# {run_dir.path.resolve().name}",
        ended,
        "## Verdicts",
        *([table(("", "question", "found"), verdicts(training, evaluations))] if training else ["Nothing was logged."]),
        "## Alarms",
        *([f"- **{a.name}**, step {a.step}: {a.found}. {a.advice}." for a in alarms] or ["None."]),
        *(text for heading, content in notes.items() for text in (f"## {heading}", fenced(content))),
        "## Curves",
        f"![loss, rewards, accuracies, log-probabilities]({figure.name})" if figure else NO_FIGURE,
        "## Metrics",
        *([metrics_table(training, evaluations)] if rows else []),
        "## Answers",
        *answers(run_dir.samples.rows()),
        "## Config",
        fenced((run_dir.path / "config.yaml").read_text(encoding="utf-8")),
    ]
    path = run_dir.path / "report.md"
    path.write_bytes(("\n\n".join(parts) + "\n").encode("utf-8", "backslashreplace"))
    return path


NO_FIGURE = 'No figure: it needs `plot_loss=true` and matplotlib (`pip install -e ".[plot]"`).'


def verdicts(training: Sequence[Row], evaluations: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(yes or no, question, numbers) for each of the guide's questions, of the last row that was logged."""
    held_out = [row for row in evaluations if "eval_loss" in row and row["step"] > 0]  # of a policy that has learned
    last = {k.removeprefix("eval_"): v for k, v in held_out[-1].items()} if held_out else training[-1]
    of = "held-out rows" if held_out else "the last rows trained on"
    low, high = HEALTHY_LOSS
    loss = last["loss"]
    found = [(yes(low <= loss <= high), f"Did the loss of {of} end between {low} and {high}?", how_low(loss))]
    if "rewards/margins" in last:
        chosen, rejected, margins = (last[f"rewards/{name}"] for name in ("chosen", "rejected", "margins"))
        # A line whose updates were all skipped has none.
        first = next((row["rewards/margins"] for row in training if "rewards/margins" in row), 0.0)
        found += [
            (yes(chosen > 0), "Did chosen rewards rise?", f"{chosen:+.3g} from 0{BOTH_FALL if chosen < 0 else ''}"),
            (yes(rejected < 0), "Did rejected rewards fall?", f"{rejected:+.3g} from 0"),
            (yes(margins > max(first, 0)), "Did margins grow?", f"{margins:.3g}, {first:.3g} in the first line logged"),
        ]  # fmt: skip
    if "rewards/accuracies" in last:
        accuracy = last["rewards/accuracies"]
        found.append((yes(accuracy > 0.5), "Are most pairs ordered as they are labelled?", f"{accuracy:.1%}"))
    return found


BOTH_FALL = "; usual where both fall and rejected faster, until answers get worse (logps/chosen)"


def how_low(loss: float) -> str:
    low, high = HEALTHY_LOSS
    if loss < low:
        return f"{loss:.3g}: the pairs are easy, or pref_beta is large"
    return f"{loss:.3g}" + (
        ": little was learned, labels are noisy, or the loss has another scale" if loss > high else ""
    )


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def metrics_table(training: Sequence[Row], evaluations: Sequence[Row]) -> str:
    """The first and the last row of each kind, a metric per line."""
    ends = [rows[i] for rows in (training, evaluations) for i in ((0, -1) if len(rows) > 1 else range(len(rows)))]
    names = dict.fromkeys(name for row in ends for name in row if name not in ("step", "epoch"))
    head = ["metric", *(f"step {row['step']:.0f}" for row in ends)]
    return table(head, [[name, *(f"{row[name]:.4g}" if name in row else "" for row in ends)] for name in names])


def answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first prompts' answers before the first update and in the newest evaluation."""
    if not rows:
        return ["None were drawn (num_samples)."]
    first, last = rows[0]["step"], rows[-1]["step"]
    texts = []
    for old, new in at_two_steps(rows, first, last)[:SHOWN_SAMPLES]:
        kl = "" if new["kl"] is None else f", KL {new['kl']:.2f} nats"
        said = f"prompt: {old['prompt']}\n\nstep {first}: {old['response']}\n\nstep {last}{kl}: {new['response']}"
        texts.append(fenced(printable(said)))
    return texts


def fenced(text: str) -> str:
    """Text that Markdown shows as it is, whatever it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text.rstrip()}\n{fence}"


PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "margins": ("rewards/margins",),
    "accuracies": ("rewards/accuracies",),
    "log-probabilities, nats": ("logps/chosen", "logps/rejected"),
    "gradient norm": ("grad_norm",),
}


def draw_curves(path: Path, training: Sequence[Row], evaluations: Sequence[Row]) -> Path | None:
    """The figure, or None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for colour, name in zip(("C0", "C3"), names, strict=False):
            for rows, key, style in ((training, name, "-"), (evaluations, f"eval_{name}", "o")):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    label = f"{name.rpartition('/')[2]}{', held out' if key != name else ''}"
                    axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
        if title == "loss":
            axis.axhspan(*HEALTHY_LOSS, color="C2", alpha=0.15, label="healthy by the guide")
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path

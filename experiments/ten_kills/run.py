"""A run that is killed ten times beside one that is not: the two metrics.jsonl, row by row, and their curves.

    python -m experiments.ten_kills.run [DIRECTORY [key=value ...]]

The default job on the built-in world, `python train.py save_steps=5 logging_steps=2`, gets SIGKILL ten times, each up
to half a second after a step that is drawn, and is resumed with resume_from_checkpoint=true. A difference is an error.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dpo.checkpoint import checkpoints
from dpo.metrics import TIMING_KEYS

ROOT = Path(__file__).parent.parent.parent
KILLS = 10


def start(folder: Path, overrides: Sequence[str]) -> subprocess.Popen:
    again = "resume_from_checkpoint=true" if checkpoints(folder) else "overwrite_output_dir=true"
    fixed = [f"output_dir={folder}", "device=cpu", "save_steps=5", "logging_steps=2"]
    command = [sys.executable, "train.py", *fixed, *overrides, again]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without its timing keys; a line that a kill cut short is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in read]


def kill(folder: Path, last: int, overrides: Sequence[str]) -> list[int]:
    """Kill a run that makes `last` updates at random times, and let it end; the steps that were logged at each kill."""
    draw = random.Random(0)
    steps: list[int] = []
    for aim in sorted(draw.sample(range(last - 10), KILLS)):
        process = start(folder, overrides)
        while logged(folder) < aim and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the run ended before kill {len(steps) + 1}")
        steps.append(logged(folder))
        print(f"kill {len(steps)}: {steps[-1]} steps were logged", flush=True)
    if start(folder, overrides).wait() != 0:
        raise RuntimeError("the run that was killed did not end well")
    return steps


def logged(folder: Path) -> int:
    return max((int(row["step"]) for row in rows(folder)), default=0)


def draw_curves(undisturbed: list[dict], killed: list[dict], steps: list[int], target: Path) -> None:
    from matplotlib import pyplot

    figure, both = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True)
    for axes, key in zip(both, ("loss", "rewards/accuracies"), strict=True):
        for run, style, label in ((undisturbed, "-", "undisturbed"), (killed, "o", f"killed {len(steps)} times")):
            points = [(row["step"], row[key]) for row in run if key in row]
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, markerfacecolor="none")
        for step in steps:
            axes.axvline(step, color="0.8", linewidth=1, zorder=0)
        axes.set_ylabel(key)
    both[0].legend()
    both[1].set_xlabel("step; a vertical line is a kill")
    figure.tight_layout()
    figure.savefig(target, dpi=80)


def main(directory: str = "outputs/ten_kills", *overrides: str) -> None:
    target = Path(directory).absolute()
    if start(target / "undisturbed", overrides).wait() != 0:
        raise RuntimeError("the undisturbed run did not end well")
    undisturbed = rows(target / "undisturbed")
    steps = kill(target / "killed", logged(target / "undisturbed"), overrides)
    killed = rows(target / "killed")
    weights = [(target / run / "adapter_model.safetensors").read_bytes() for run in ("undisturbed", "killed")]
    draw_curves(undisturbed, killed, steps, target / "curves.png")
    if killed != undisturbed or weights[0] != weights[1]:
        raise RuntimeError(f"the runs in {target} differ")
    print(f"{KILLS} kills: {len(killed)} rows of metrics.jsonl and the adapter's {len(weights[0])} bytes are equal")
    print(os.path.relpath(target / "curves.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])

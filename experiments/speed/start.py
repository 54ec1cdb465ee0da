"""Seconds from the start of the process to the end of the first update, and what they go to.

    python -m experiments.speed.start [rounds=5] [key=value ...]

Each round starts `python train.py logging_steps=1 key=value ...` (no key: the default run), notes when each line of its
output comes, and ends it at the line of its first update. What is printed: the median over rounds of when each line
came, and the least; and the CPU time of a round, which other work on the machine disturbs less.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = {
    "rows:": "imports, config, rows",
    "reference:": "model and reference",
    "memory:": "optimiser, memory forecast",
    "start:": "checks of the first batch",
    "step 0/": "first answers and gold reward",
    "step 1/": "first update",
}
"""How a line begins: what is done when it comes."""


def one_round(overrides: Sequence[str]) -> tuple[dict[str, float], float]:
    """(seconds from the start at which each of LINES came, CPU seconds)."""
    before, start = cpu_seconds(), time.perf_counter()
    came: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "logging_steps=1", f"output_dir={folder}/run", *overrides]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                for begin in LINES:
                    if line.startswith(begin):
                        came.setdefault(begin, time.perf_counter() - start)
                if "step 1/" in came:
                    process.kill()
    if "step 1/" not in came:
        sys.exit(f"{' '.join(command)}: ended before its first update")
    return came, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str]) -> None:
    own = [argument for argument in arguments if argument.startswith("rounds=")]
    rounds = int(own[-1].partition("=")[2]) if own else 5
    measured = [one_round([argument for argument in arguments if argument not in own]) for _ in range(rounds)]
    print("| after | median s | least s |\n|---|---|---|")
    for begin, name in LINES.items():
        seconds = [came[begin] for came, _ in measured if begin in came]
        if seconds:
            print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} |")
    used = [seconds for _, seconds in measured]
    print(f"| CPU time | {statistics.median(used):.2f} | {min(used):.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What eight jobs cost in one sweep and one after another, and where the difference lies.

    python -m experiments.speed.sweep [betas=0.1,0.2,...] [key=value ...]

Runs `python train.py -m pref_beta=... key=value ...`, then `python train.py pref_beta=... key=value ...` for each of
betas (eight), without a key on the built-in world. What is printed: seconds and CPU seconds of both; the seconds of
each stage, summed over jobs, by when the lines of the output came; and their ratio.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BETAS = "0.1,0.2,0.3,0.5,0.7,1.0,1.5,2.0"
STAGES = {
    "rows:": "imports, config, rows",
    "reference:": "model, and the reference's log-probabilities in a sweep",
    "memory:": "optimiser, memory forecast",
    "start:": "checks of the first batch",
    "step 0/": "first answers and gold reward",
    "step ": "updates and evaluations",
    "run:": "result, report",
}
"""How a line begins: what was done since the line before."""
END = "end of the process"


def run(arguments: Sequence[str]) -> tuple[dict[str, float], float]:
    """(seconds of each stage of one process, CPU seconds)."""
    stages = dict.fromkeys([*STAGES.values(), END], 0.0)
    before, last = cpu_seconds(), time.perf_counter()
    command = [sys.executable, "train.py", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            stage = next((name for begin, name in STAGES.items() if line.startswith(begin)), None)
            if stage:
                now = time.perf_counter()
                stages[stage] += now - last
                last = now
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    stages[END] += time.perf_counter() - last
    return stages, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str]) -> None:
    betas = next((text.partition("=")[2] for text in arguments if text.startswith("betas=")), BETAS)
    keys = [text for text in arguments if not text.startswith("betas=")]
    with tempfile.TemporaryDirectory() as folder:
        sweep, sweep_cpu = run(["-m", f"pref_beta={betas}", *keys, f"output_dir={folder}/sweep"])
        alone = [run([f"pref_beta={beta}", *keys, f"output_dir={folder}/{beta}"]) for beta in betas.split(",")]
    single_cpu = sum(cpu for _, cpu in alone)
    single = {name: sum(stages[name] for stages, _ in alone) for name in sweep}
    print(f"| {len(alone)} jobs, seconds | one after another | one sweep |\n|---|---|---|")
    for name in sweep:
        print(f"| {name} | {single[name]:.1f} | {sweep[name]:.1f} |")
    of_all = sum(sweep.values()), sum(single.values())
    print(f"| all | {of_all[1]:.1f} | {of_all[0]:.1f} |\n| CPU time | {single_cpu:.1f} | {sweep_cpu:.1f} |")
    print(f"| **ratio** (of CPU time) | | **{of_all[0] / of_all[1]:.2f}** ({sweep_cpu / single_cpu:.2f}) |")


if __name__ == "__main__":
    main(sys.argv[1:])

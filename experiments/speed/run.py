"""Pairs per second and peak memory of training, ours and TRL's, on the same rows in turn.

    python -m experiments.speed.run MODEL_DIR DATASET [rows=24] [batches=1,4] [rounds=2] [trl=PYTHON]

LoRA of rank 16 on all linear layers, bfloat16, both from one adapter, the first rows that fit cutoff_len (1024), in
file order, nothing cached. Every round starts a fresh process of each side, so that one runs at a time; a process makes
one update to warm up, then one pass over the rows. trl names the Python of a virtual environment that holds TRL (this
one by default). What is printed: the median over all warm updates of pairs per second, and the largest difference of a
step's loss.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

import train  # noqa: F401 (registers the config's schema)
from dpo.build import build_objective, build_policy, build_rows, build_template
from dpo.checkpoint import save_result
from dpo.doctor.flips import NoDirectory
from dpo.tokens import Encoded
from dpo.trainer import Trainer, _Clock
from models.command import CONF

ROOT = Path(__file__).parents[2]
DEFAULTS = {"rows": "24", "batches": "1,4", "rounds": "2", "cutoff_len": "1024", "trl": sys.executable}


def fitting(rows: list[Encoded], cutoff_len: int, count: int) -> list[Encoded]:
    """The first rows that nothing was cut of."""
    whole = [row for row in rows if not any(row.cut) and not row.dropped_turns]
    return [row for row in whole if len(row.prompt_ids) + max(row.lengths) <= cutoff_len][:count]


def ours(job: Mapping[str, Any]) -> dict[str, Any]:
    """The child process of our side."""
    overrides = [
        f"model_name_or_path={job['model']}", f"dataset={job['data']}", "bf16=true", "lora_rank=16", "device=cpu",
        f"cutoff_len={job['cutoff_len']}", f"per_device_train_batch_size={job['batch']}",
        "gradient_accumulation_steps=1", "disable_shuffling=true",
        "learning_rate=5e-5", "lr_scheduler_type=constant", "on_bad_row=skip",
    ]  # fmt: skip
    if torch.cuda.is_available():
        overrides.remove("device=cpu")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["~experiment", *overrides])
    encoded = build_rows(cfg, build_template(cfg))
    rows = fitting(list(encoded.train), job["cutoff_len"], job["rows"])
    policy = build_policy(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    objective, _ = build_objective(cfg, policy, encoded)
    trainer = Trainer(cfg, policy, objective, rows, [], NoDirectory(), Path(job["model"]))
    if job.get("write"):
        save_result(policy, Path(job["write"]) / "adapter", **trainer.result)
        texts = [
            {"messages": list(row.example.messages), "chosen": row.example.responses[0],
             "rejected": row.example.responses[1], "tokens": row.tokens}
            for row in rows
        ]  # fmt: skip
        (Path(job["write"]) / "rows.json").write_text(json.dumps(texts))
        return {}
    batches = [rows[i : i + job["batch"]] for i in range(0, len(rows), job["batch"])]
    seconds, losses = [], []
    for batch in [batches[0], *batches]:
        start = time.perf_counter()
        trainer.update(batch, _Clock())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(trainer.watch.window.means()["loss"])
        trainer.watch.window = type(trainer.watch.window)()
        trainer.state.step += 1
    return {"seconds": seconds, "losses": losses, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def child(side: str, job: Mapping[str, Any], python: str) -> dict[str, Any]:
    """What a fresh process of one side measures."""
    module = "experiments.speed.run" if side == "ours" else "experiments.speed.trl_side"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable if side == "ours" else python, "-m", module, "child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode != 0:
        sys.exit(f"{side}, {job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(model: str, data: str, settings: Mapping[str, str]) -> None:
    batches = [int(size) for size in settings["batches"].split(",")]
    job: dict[str, Any] = {"model": str(Path(model).resolve()), "data": str(Path(data).resolve())}
    job |= {name: int(settings[name]) for name in ("rows", "cutoff_len")}
    print(
        "| batch | side | pairs/s, median of updates | lowest to highest | peak memory, GB | largest loss difference |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        child("ours", job | {"batch": 1, "write": folder}, "")
        for batch in batches:
            job |= {"batch": batch, "folder": folder}
            measured: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
            for _ in range(int(settings["rounds"])):
                for side, results in measured.items():
                    results.append(child(side, job, settings["trl"]))
            difference = max(
                abs(a - b) for one, other in zip(*measured.values(), strict=True)
                for a, b in zip(one["losses"], other["losses"], strict=True)
            )  # fmt: skip
            rates = {}
            for side, results in measured.items():
                rate = [batch / s for result in results for s in result["seconds"][1:]]
                rates[side] = statistics.median(rate)
                peak = max(result["peak"] for result in results) / 1e9
                print(
                    f"| {batch} | {side} | {rates[side]:.3f} | {min(rate):.3f} to {max(rate):.3f} | {peak:.2f} | "
                    f"{difference if side == 'ours' else 0:.2g} |",
                    flush=True,
                )
            print(f"| {batch} | ratio | {rates['ours'] / rates['trl']:.2f} | | | |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(ours(json.loads(sys.argv[2]))))
    elif len(sys.argv) < 3:
        sys.exit(str(__doc__))
    else:
        given = dict(argument.split("=", 1) for argument in sys.argv[3:])
        unknown = given.keys() - DEFAULTS
        if unknown:
            sys.exit(f"{min(unknown)}: expected some of {', '.join(DEFAULTS)}")
        main(sys.argv[1], sys.argv[2], DEFAULTS | given)

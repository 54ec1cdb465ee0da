"""Pairs per second and peak memory of training, ours and its peers', on the same rows in turn.

    python -m experiments.speed.run MODEL DATASET [name=LABEL] [rows=24] [batches=1,4] [peer_batches=BATCHES] [rounds=2]
        [cutoff_len=1024] [trl=PYTHON] [llamafactory=PYTHON] [lf_template=smollm2] [tokenizer=DIR]

LoRA of rank 16 on all linear layers, bfloat16, everyone from one adapter, the first rows that fit cutoff_len, in file
order, nothing cached. Every round starts a fresh process of each side, one at a time; a process makes one update to
warm up, then one pass over the rows. On a machine with CUDA all run there.

MODEL is a model's directory, or a config.json, which gets random weights (tokenizer=DIR names its tokenizer). trl and
llamafactory name the Python of a virtual environment that holds the peer (by default this one, and none).
Printed and appended to results.csv, for each side and batch size: pairs per second of a whole pass (median of the
rounds, lowest and highest), peak memory, the largest difference of an update's loss to ours; and the median over
updates of the peer's seconds divided by ours for the same rows.
"""

import csv
import json
import os
import resource
import shutil
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
from safetensors.torch import save_file

import train  # noqa: F401 (registers the config's schema)
from dpo.build import build_objective, build_policy, build_rows, build_template
from dpo.checkpoint import save_result
from dpo.doctor.flips import NoDirectory
from dpo.tokens import Encoded
from dpo.trainer import Trainer, _Clock
from models.command import CONF
from models.config import parse_model_config
from models.transformer import Transformer

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.csv"
DEFAULTS = {
    "name": "", "rows": "24", "batches": "1,4", "peer_batches": "", "rounds": "2", "cutoff_len": "1024",
    "trl": sys.executable, "llamafactory": "", "lf_template": "smollm2", "tokenizer": "",
}  # fmt: skip
COLUMNS = (
    "name", "device", "rows", "batch", "side", "pairs_per_second", "lowest", "highest", "times_slower_than_ours",
    "peak_gb", "loss_difference",
)  # fmt: skip


def fitting(rows: list[Encoded], cutoff_len: int, count: int) -> list[Encoded]:
    """The first rows that nothing was cut of."""
    whole = [row for row in rows if not any(row.cut) and not row.dropped_turns]
    return [row for row in whole if len(row.prompt_ids) + max(row.lengths) <= cutoff_len][:count]


def build_trainer(job: Mapping[str, Any]) -> Trainer:
    """Ours, as it stands before the first update."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    overrides = [
        f"model_name_or_path={job['model']}", f"dataset={job['data']}", "bf16=true", "lora_rank=16", f"device={device}",
        f"cutoff_len={job['cutoff_len']}", f"per_device_train_batch_size={job['batch']}",
        "gradient_accumulation_steps=1", "disable_shuffling=true", "num_samples=0",
        "learning_rate=5e-5", "lr_scheduler_type=constant", "on_bad_row=skip", *job.get("overrides", ()),
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["~experiment", *overrides])
    encoded = build_rows(cfg, build_template(cfg))
    rows = fitting(list(encoded.train), job["cutoff_len"], job["rows"])
    policy = build_policy(cfg, torch.device(device))
    objective, _ = build_objective(cfg, policy, encoded)
    return Trainer(cfg, policy, objective, rows, [], NoDirectory(), Path(job["model"]))


def write_common(job: Mapping[str, Any]) -> None:
    """What the peers start from: the adapter, and the rows as texts."""
    trainer = build_trainer({**job, "batch": 1})
    folder = Path(job["folder"])
    save_result(trainer.policy, folder / "adapter", **trainer.result)
    texts = [
        {"messages": list(row.example.messages), "chosen": row.example.responses[0],
         "rejected": row.example.responses[1]}
        for row in trainer.train_rows
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(texts))


def ours(job: Mapping[str, Any]) -> dict[str, Any]:
    """The child process of our side."""
    trainer, size = build_trainer(job), job["batch"]
    batches = [trainer.train_rows[i : i + size] for i in range(0, len(trainer.train_rows), size)]
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
    return {"seconds": seconds, "losses": losses, "peak": peak()}


def peak() -> int:
    """Bytes: the allocator's on CUDA, the process's elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_model(config: Path, tokenizer: Path, folder: Path) -> Path:
    """A model's directory of that shape, normal weights of deviation 0.02, bfloat16."""
    target = folder / "model"
    target.mkdir()
    for file in tokenizer.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    shutil.copy(config, target / "config.json")
    torch.manual_seed(0)
    model = Transformer(parse_model_config(json.loads(config.read_text())), torch.bfloat16).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.02)
    save_file(dict(model.state_dict()), target / "model.safetensors", {"format": "pt"})
    return target


def child(side: str, python: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process of one side measures."""
    module = "experiments.speed.run" if side in ("ours", "common") else f"experiments.speed.{side}_side"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", module, side, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode != 0:
        sys.exit(f"{side}, {job}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(model: str, data: str, settings: Mapping[str, str]) -> None:
    pythons = {"ours": sys.executable, "trl": settings["trl"], "llamafactory": settings["llamafactory"]}
    batches, peer_batches = (
        [int(size) for size in settings[key].split(",") if size] for key in ("batches", "peer_batches")
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} cores"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = Path(model).resolve()
        if path.is_file():
            path = random_model(path, Path(settings["tokenizer"]), folder)
        job: dict[str, Any] = {"model": str(path), "data": str(Path(data).resolve()), "folder": temporary}
        job |= {name: int(settings[name]) for name in ("rows", "cutoff_len")} | {"template": settings["lf_template"]}
        child("common", sys.executable, job)
        print(*COLUMNS, sep=" | ")
        for batch in batches:
            sides = [s for s, p in pythons.items() if p and (s == "ours" or batch in (peer_batches or batches))]
            measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(int(settings["rounds"])):
                for side in sides:
                    measured[side].append(child(side, pythons[side], job | {"batch": batch}))
            name = settings["name"] or f"{Path(model).name} {Path(data).stem}"
            write(summaries(measured, job["rows"]), {"name": name, "device": device, "batch": batch})


def summaries(measured: Mapping[str, list[dict[str, Any]]], rows: int) -> list[dict[str, Any]]:
    """A row of the table for each side."""
    table = []
    for side, results in measured.items():
        rates = sorted(rows / sum(result["seconds"][1:]) for result in results)
        slower, apart = [], 0.0
        for ours, peer in zip(measured["ours"], results, strict=True):
            slower += [b / a for a, b in zip(ours["seconds"][1:], peer["seconds"][1:], strict=True)]
            apart = max([apart, *(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True))])
        table.append({
            "rows": rows, "side": side, "pairs_per_second": f"{statistics.median(rates):.3f}",
            "lowest": f"{rates[0]:.3f}", "highest": f"{rates[-1]:.3f}",
            "times_slower_than_ours": f"{statistics.median(slower):.2f}",
            "peak_gb": f"{max(result['peak'] for result in results) / 1e9:.2f}", "loss_difference": f"{apart:.2g}",
        })  # fmt: skip
    return table


def write(table: list[dict[str, Any]], common: dict[str, Any]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in table:
            writer.writerow(row | common)
            print(*(str((row | common)[column]) for column in COLUMNS), sep=" | ", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["common"]:
        write_common(json.loads(sys.argv[2]))
        print("{}")
    elif sys.argv[1:2] == ["ours"]:
        print(json.dumps(ours(json.loads(sys.argv[2]))))
    elif len(sys.argv) < 3:
        sys.exit(str(__doc__))
    else:
        given = dict(argument.split("=", 1) for argument in sys.argv[3:])
        unknown = given.keys() - DEFAULTS
        if unknown:
            sys.exit(f"{min(unknown)}: expected some of {', '.join(DEFAULTS)}")
        main(sys.argv[1], sys.argv[2], DEFAULTS | given)

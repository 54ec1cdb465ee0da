"""LLaMA-Factory's side of experiments.speed.run: the same rows, from the same adapter, by its `run_exp`."""

import json
import logging
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "rewards/chosen" in logs:
            self.losses.append(float(logs["loss"]))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    folder, batch = Path(job["folder"]), job["batch"]
    rows = json.loads((folder / "rows.json").read_text())
    rows = rows[:batch] + rows  # the first batch again, to warm up
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}

    def turn(role: str, text: str) -> dict[str, str]:
        return {"from": speakers[role], "value": text}

    data = [
        {
            "conversations": [turn(m["role"], m["content"]) for m in row["messages"] if m["role"] != "system"],
            "system": next((m["content"] for m in row["messages"] if m["role"] == "system"), ""),
            "chosen": turn("assistant", row["chosen"]), "rejected": turn("assistant", row["rejected"]),
        } for row in rows
    ]  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(data))
    columns = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    output = folder / "llamafactory"
    shutil.rmtree(output, ignore_errors=True)  # it refuses another round's
    clock = Clock()
    arguments = {
        "stage": "dpo", "do_train": True, "model_name_or_path": job["model"],
        "adapter_name_or_path": str(folder / "adapter"), "finetuning_type": "lora", "lora_rank": 16,
        "lora_target": "all", "dataset": "pairs", "dataset_dir": str(folder), "template": job["template"],
        "cutoff_len": job["cutoff_len"], "output_dir": str(output), "overwrite_cache": True,
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "bf16": True,
        "learning_rate": 5e-5, "lr_scheduler_type": "constant", "pref_beta": 0.1,
        "pref_loss": "sigmoid", "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True, "preprocessing_num_workers": 1,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    run_exp(args=arguments, callbacks=[clock])
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": clock.seconds, "losses": clock.losses, "peak": peak}


if __name__ == "__main__":
    logging.disable(logging.INFO)
    print(json.dumps(measure(json.loads(sys.argv[2]))))

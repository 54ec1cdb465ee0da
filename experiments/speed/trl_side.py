"""TRL's side of experiments.speed.run: the same rows, from the same adapter, by its DPOTrainer."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class InFileOrder(DPOTrainer):
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(dataset or self.train_dataset)  # type: ignore[arg-type]


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    folder, batch = Path(job["folder"]), job["batch"]
    rows = json.loads((folder / "rows.json").read_text())
    rows = rows[:batch] + rows  # the first batch again, to warm up
    sides = ("chosen", "rejected")
    texts = [
        {"prompt": row["messages"]} | {side: [{"role": "assistant", "content": row[side]}] for side in sides}
        for row in rows
    ]
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    clock = Clock()
    args = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        max_length=job["cutoff_len"], num_train_epochs=1, bf16=True, learning_rate=5e-5, lr_scheduler_type="constant",
        warmup_steps=0, gradient_checkpointing=False, beta=0.1, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer = InFileOrder(
        model=model, args=args, train_dataset=Dataset.from_list(texts), processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "rewards/chosen" in entry]
    return {"seconds": clock.seconds, "losses": losses, "peak": peak()}


def peak() -> int:
    """Bytes: the allocator's on CUDA, the process's elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[2]))))

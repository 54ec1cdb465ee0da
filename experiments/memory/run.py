"""The predicted peak of a training run against what its process grew by, each setting in a process of its own.

    python -m experiments.memory.run MODEL_DIR [name ...]     # all settings, or those whose name holds a given word

MODEL_DIR is a Hugging Face directory, or `world`, the built-in model. `CONFIG.json TOKENIZER_DIR` in its place is a
model of that shape with random weights, written to a temporary directory. Rows are random words, so every row is about
as long as the next. Measured are VmHWM, reset before the model is loaded, minus VmRSS at that moment, and the same of
RssAnon (what is not mapped from a file), sampled.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

import train as command
from models.config import read_model_config
from models.transformer import Transformer
from models.weights import WORLD, write_tensors

ROOT = Path(__file__).parents[2]
LORA, FULL = "finetuning_type=lora", "finetuning_type=full"
BF16, CHECKPOINTING = "bf16=true", "gradient_checkpointing=true"
# name: (tokens per micro-batch, rows per update, updates, what else); full fine-tuning has its optimiser from update 2.
SETTINGS: dict[str, tuple[int, int, int, list[str]]] = {
    **{f"lora bf16 {t}": (t, t // 512, 1, [LORA, BF16]) for t in (512, 1024, 2048, 4096)},
    **{f"lora float32 {t}": (t, t // 512, 1, [LORA]) for t in (512, 1024, 2048, 4096)},
    "lora bf16 2048 checkpointing": (2048, 4, 1, [LORA, BF16, CHECKPOINTING]),
    "lora float32 2048 checkpointing": (2048, 4, 1, [LORA, CHECKPOINTING]),
    "full float32 512": (512, 2, 2, [FULL]),
    "full bf16 512": (512, 2, 2, [FULL, BF16]),
    "full bf16 512 checkpointing": (512, 2, 2, [FULL, BF16, CHECKPOINTING]),
    "full float32 512 one micro-batch": (512, 1, 2, [FULL]),
}


def write_rows(path: Path, words: int, rows: int = 8) -> None:
    draw = random.Random(0)
    known = (WORLD / "data" / "train.jsonl").read_text().split()[:2000]
    known = [word for word in known if word.isalpha()]

    def text(n: int) -> str:
        return " ".join(draw.choice(known) for _ in range(n))

    lines = [
        json.dumps({"prompt": text(words // 2), "chosen": text(words), "rejected": text(words)}) for _ in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n")


def write_random_model(config: Path, beside: Path, target: Path) -> None:
    """A model of the shape in `config` with the tokenizer in `beside`; bfloat16, as such models are stored."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (beside / name).exists():
            (target / name).write_bytes((beside / name).read_bytes())
    (target / "config.json").write_bytes(config.read_bytes())
    shape = read_model_config(target)
    with torch.device("meta"):
        names = {n: tuple(p.shape) for n, p in Transformer(shape, torch.bfloat16).named_parameters()}
    torch.manual_seed(0)
    write_tensors(target / "model.safetensors", {n: 0.02 * torch.randn(s).bfloat16() for n, s in names.items()})


def status(*names: str) -> list[int]:
    """Numbers of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in names]


class Sampler(threading.Thread):
    """The peak of RssAnon, looked at every two milliseconds."""

    peak, going = 0, True

    def run(self) -> None:
        while self.going:
            self.peak = max(self.peak, *status("RssAnon"))
            time.sleep(0.002)


def measure(model: str, tokens: int, rows: int, updates: int, more: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sampler = Sampler(daemon=True)
    build_policy, predict_memory = command.build_policy, command.predict_memory

    def build(*arguments: Any) -> Transformer:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        found["before"] = status("VmRSS", "RssAnon", "RssFile")
        sampler.start()
        return build_policy(*arguments)

    def predict(*arguments: Any) -> Any:
        found["predicted"] = predict_memory(*arguments)
        return found["predicted"]

    vars(command).update(build_policy=build, predict_memory=predict)
    with tempfile.TemporaryDirectory() as directory:
        write_rows(Path(directory) / "rows.jsonl", words=120 if model != "world" else 60)
        overrides = [
            f"model_name_or_path={model}", f"dataset={directory}/rows.jsonl", f"output_dir={directory}/run",
            f"max_steps={updates}", f"gradient_accumulation_steps={rows}", f"max_tokens_per_micro_batch={tokens}",
            "device=cpu", "learning_rate=1e-6", "num_train_epochs=10", "cutoff_len=100000", "num_samples=0",
            "plot_loss=false",  # matplotlib is 40 MB of code, after training
            *more,
        ]  # fmt: skip
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", ["~experiment", *overrides])
        command.train(cfg)
    sampler.going = False
    rss, anonymous, mapped = found["before"]
    return {
        "tokens": found["predicted"].tokens, "parts": found["predicted"].parts, "predicted": found["predicted"].peak,
        "hwm": status("VmHWM")[0] - rss, "anonymous": sampler.peak - anonymous,
        "mapped": status("RssFile")[0] - mapped,
    }  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    model, *words = arguments
    print(
        "| setting | tokens | predicted MB | VmHWM | RssAnon | mapped at the end | predicted / VmHWM |\n"
        + "|---" * 7
        + "|"
    )
    with tempfile.TemporaryDirectory() as directory:
        if model.endswith(".json"):
            write_random_model(Path(model), Path(words.pop(0)), Path(directory))
            model = directory
        for name, setting in SETTINGS.items():
            if words and not any(word in name for word in words):
                continue
            child = [sys.executable, "-m", "experiments.memory.run", "child", json.dumps([model, *setting])]
            done = subprocess.run(child, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(done.stderr)
            r = json.loads(done.stdout.splitlines()[-1])
            mb = [f"{r[key] / 1e6:.0f}" for key in ("predicted", "hwm", "anonymous", "mapped")]
            print(f"| {name} | {r['tokens']} | {' | '.join(mb)} | {r['predicted'] / r['hwm']:.2f} |", flush=True)
            print("   ", {k: round(v / 1e6) for k, v in r["parts"].items()}, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])

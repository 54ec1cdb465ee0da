"""Tokens per second of models.generate against transformers' generate, in turn in one process.

    python -m experiments.generation_speed.run MODEL_DIR [bfloat16 | float32] [rounds]

64 prompt and 128 new tokens, greedy, batch 1 and 16, same prompts, every length forced. Beside both stands the time of
the linear layers alone, the least that a decoder which calls the same matrix products can take. Each round times all of
them one after the other, and the figure is the median over rounds of the ratio within a round, because the speed of a
shared machine drifts.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from models.generate import generate
from models.sampling import GREEDY
from models.transformer import Linear
from models.weights import load_model

PROMPT, NEW = 64, 128


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(model_dir: str, dtype_name: str = "bfloat16", rounds: str = "5") -> None:
    dtype = getattr(torch, dtype_name)
    ours = load_model(Path(model_dir), dtype=dtype, device=torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    layers = [module for module in ours.modules() if isinstance(module, Linear)]

    for batch in (1, 16):
        ids = torch.randint(100, ours.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        inputs = {layer: torch.randn(batch, layer.weight.shape[1], dtype=dtype) for layer in layers}
        hidden_ND = torch.randn(batch, ours.config.hidden_size, dtype=dtype)

        def run_ours(new: int = NEW, ids: torch.Tensor = ids) -> None:
            generate(
                ours, ids.tolist(), samples=1, max_new_tokens=new, stop_ids=(), sampling=GREEDY,
                seeds=range(len(ids)), batch_size=len(ids),
            )  # fmt: skip

        @torch.no_grad()
        def run_theirs(new: int = NEW, ids: torch.Tensor = ids) -> None:
            theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

        @torch.no_grad()
        def run_linear(inputs: dict = inputs, hidden_ND: torch.Tensor = hidden_ND) -> None:
            for _ in range(NEW):
                for layer, x_ND in inputs.items():
                    layer(x_ND)
                hidden_ND @ ours.head_weight_VD.T

        for warm in (run_ours, run_theirs):
            warm(8)
        times = [(seconds(run_theirs), seconds(run_ours), seconds(run_linear)) for _ in range(int(rounds))]
        for name, column in zip(("transformers", "ours", "linear layers alone"), zip(*times, strict=True), strict=True):
            rate = batch * NEW / statistics.median(column)
            ratio = statistics.median(hf / t for (hf, _, _), t in zip(times, column, strict=True))
            print(f"batch {batch:2d}  {name:20s} {rate:7.1f} tokens/s  {ratio:.2f} times transformers", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

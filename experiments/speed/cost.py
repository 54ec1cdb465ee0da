"""What one update costs: against the tokens of its row, and against its prompt, shared and written twice.

    python -m experiments.speed.cost [model=DIR] [rounds=2] [most=8192] [out=experiments/speed]

LoRA of rank 16 on all linear layers, bfloat16, AdamW, one pair of random tokens per update (reference pass, policy's
pass, backward pass, update), on a model of SmolLM2-135M's shape with random weights, or on model=DIR. A row of T tokens
is a prompt of T/2 and two responses of T/4; the prompts of the second curve have two responses of 128. `unshared` is
the same pair as two rows of a prompt and a response. Every round makes an update of each kind, so that what else the
machine does falls on all of them. Medians go to out/cost.csv, the figure to out/cost.png.

seconds = a T + b T^2 is fitted to the first curve (relative errors): the second term is attention's. Peak memory is the
process's, of the first round, in which rows grow.
"""

import csv
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir

import train  # noqa: F401 (registers the config's schema)
from dpo.build import new_objective
from dpo.formats import Example
from dpo.objective import Objective
from dpo.optim import clip_gradients
from dpo.optimizers import AdamW
from dpo.reference import base_reference
from dpo.tokens import Encoded
from models.command import CONF
from models.config import parse_model_config
from models.lora import inject_lora
from models.stream import Stream, pack
from models.transformer import Transformer
from models.weights import choose_device, load_model

DEFAULTS = {"model": "", "rounds": "2", "most": "8192", "out": str(Path(__file__).parent)}
SMOLLM2_135M = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rope_theta": 100000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
RESPONSE = 128


class Kind(NamedTuple):
    curve: str
    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        """Of the pair, its prompt once."""
        return self.prompt + 2 * self.response


def kinds(most: int) -> list[Kind]:
    lengths = [256 << i for i in range(20) if 256 << i <= most]
    rows = [Kind("row", length // 2, length // 4) for length in lengths]
    # A prompt needs a token.
    prompts = [1, *(length for length in lengths if 2 * length <= most)]
    return rows + [Kind(curve, prompt, RESPONSE) for prompt in prompts for curve in ("shared", "unshared")]


def policy_of(model: str, device: torch.device) -> Transformer:
    if model:
        policy = load_model(Path(model), dtype=torch.bfloat16, device=device)
    else:
        torch.manual_seed(0)
        policy = Transformer(parse_model_config(SMOLLM2_135M), torch.bfloat16).to(device, torch.bfloat16)
        for name, parameter in policy.named_parameters():
            torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    inject_lora(policy, rank=16, alpha=32, dropout=0.0, use_rslora=False, target="all", seed=0)
    return policy.train()


def batch_of(kind: Kind, vocabulary: int) -> tuple[Encoded, Stream]:
    """(a pair of random tokens, its stream)."""
    draw = torch.Generator().manual_seed(kind.prompt)
    sizes = (kind.prompt, kind.response, kind.response)
    prompt, *responses = (torch.randint(vocabulary, (n,), generator=draw).tolist() for n in sizes)
    row = Encoded(prompt, tuple(responses), Example((), (), source=""), dropped_turns=0, cut=(False, False))
    if kind.curve == "unshared":
        return row, pack([prompt, prompt], [[response] for response in responses])
    return row, pack([prompt], [responses])


def update(policy: Transformer, objective: Objective, optimizer: AdamW, kind: Kind) -> float:
    """Seconds of one update."""
    row, stream = batch_of(kind, policy.config.vocab_size)
    synchronize(policy.device)
    start = time.perf_counter()
    measured = objective.measure(policy, stream.to(policy.device), [row], [row])
    objective.losses(measured).sum().backward()
    clip_gradients([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    synchronize(policy.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> float:
    """The most memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def fit(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """a, b of seconds = a T + b T^2, by least squares of relative errors."""
    T, s = np.array(tokens, dtype=float), np.array(seconds)
    a, b = np.linalg.lstsq(np.stack([T / s, T**2 / s], axis=1), np.ones(len(s)), rcond=None)[0]
    return float(a), float(b)


def draw(path: Path, seconds: Mapping[Kind, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [kind for kind in seconds if kind.curve == "row"]
    tokens, times = [kind.tokens for kind in rows], [seconds[kind] for kind in rows]
    a, b = fit(tokens, times)
    left.plot(tokens, times, "o", color="C0", label="measured")
    T = np.linspace(0, max(tokens), 100)
    left.plot(T, a * T + b * T**2, "-", color="C0", label="a T + b T²")
    left.plot(T, a * T, "--", color="C3", label="a T: without what is quadratic")
    left.set(xlabel="tokens of a row (prompt 1/2, responses 1/4 each)", ylabel="seconds per update")
    for curve, colour in (("shared", "C0"), ("unshared", "C3")):
        points = [(kind.prompt, value) for kind, value in seconds.items() if kind.curve == curve]
        right.plot(*zip(*points, strict=True), "o-", color=colour, label=f"prompt {curve}")
    right.set(xlabel=f"tokens of the prompt (two responses of {RESPONSE})", ylabel="seconds per update")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main(settings: Mapping[str, str]) -> None:
    device, out = choose_device("auto"), Path(settings["out"])
    policy = policy_of(settings["model"], device)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        objective = new_objective(compose("config", []))
    objective.reference = base_reference(policy)
    optimizer = AdamW([{"params": [p for p in policy.parameters() if p.requires_grad], "weight_decay": 0.0}])
    update(policy, objective, optimizer, Kind("row", 64, 32))
    every = kinds(int(settings["most"]))
    measured: dict[Kind, list[float]] = {kind: [] for kind in every}
    peaks: dict[Kind, float] = {}
    for _ in range(int(settings["rounds"])):
        for kind in every:
            measured[kind].append(update(policy, objective, optimizer, kind))
            if kind.curve == "row":
                peaks.setdefault(kind, peak_gb(device))
    seconds = {kind: statistics.median(values) for kind, values in measured.items()}
    with (out / "cost.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["curve", "prompt", "response", "tokens", "seconds", "peak_gb"])
        for kind, value in seconds.items():
            table.writerow([*kind, kind.tokens, f"{value:.4f}", f"{peaks[kind]:.2f}" if kind in peaks else ""])
    print((out / "cost.csv").read_text())
    rows = [kind for kind in every if kind.curve == "row"]
    a, b = fit([kind.tokens for kind in rows], [seconds[kind] for kind in rows])
    shares = (f"{b * T / (a + b * T):.0%} at {T}" for T in (kind.tokens for kind in rows))
    print(f"quadratic part of an update, by tokens: {', '.join(shares)}")
    for kind in every:
        if kind.curve == "shared":
            twice = seconds[kind._replace(curve="unshared")]
            print(f"prompt {kind.prompt}: shared / unshared {seconds[kind] / twice:.2f}")
    draw(out / "cost.png", seconds)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    unknown = given.keys() - DEFAULTS
    if unknown:
        sys.exit(f"{min(unknown)}: expected some of {', '.join(DEFAULTS)}")
    main(DEFAULTS | given)

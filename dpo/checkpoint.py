"""checkpoint-N/: everything that step N + 1 depends on, in safetensors and JSON.

    adapter_model.safetensors + adapter_config.json, or model.safetensors + config.json ...
    optimizer.safetensors       AdamW's two moments of every trainable, by name, and its step count
    objective.safetensors       what the objective carries from step to step (a moving reference), where it does
    trainer_state.json          step, fp16's loss scale, the sums of the open logging window

Data order and dropout are functions of seed and step, so no random state is stored. A checkpoint is written under
another name and renamed when whole: a directory called checkpoint-N is complete.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.config import read_json
from models.lora import ADAPTER_WEIGHTS, PEFT_PREFIX, adapter_tensors, lora_layers, save_adapter
from models.transformer import Transformer
from models.weights import WEIGHTS, read_tensors, save_model, write_tensors

OPTIMIZER, OBJECTIVE, STATE = "optimizer.safetensors", "objective.safetensors", "trainer_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerState:
    step: int
    """updates made."""
    loss_scale: float
    good_steps: int
    window: dict[str, list[float]]
    """sums and counts of metrics since the last logged step."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_window(value: Any) -> bool:
    numbers = (int, float)
    return isinstance(value, dict) and all(
        isinstance(entry, list) and len(entry) == 2 and type(entry[0]) in numbers and _is_count(entry[1])
        for entry in value.values()
    )


STATE_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("a whole number, at least 0", _is_count),
    "loss_scale": ("a finite number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf),
    "good_steps": ("a whole number, at least 0", _is_count),
    "window": ("a sum and a count for each metric", _is_window),
}


def save_result(policy: Transformer, target: Path, *, base_model: str, source_dir: Path, lora_dropout: float) -> None:
    """The trained part of `policy`: an adapter in PEFT's format, or a whole model in Hugging Face's."""
    if lora_layers(policy):
        save_adapter(policy, target, base_model=base_model, dropout=lora_dropout)
    else:
        save_model(policy, target, source_dir=source_dir)


def save_checkpoint(
    target: Path, policy: Transformer, optimizer: torch.optim.Optimizer, objective: Mapping[str, Tensor],
    state: TrainerState, **result: Any,
) -> None:  # fmt: skip
    """Write checkpoint-N; `objective` is the objective's state, `result` goes to save_result."""
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_result(policy, beside, **result)
    write_tensors(beside / OPTIMIZER, optimizer_tensors(policy, optimizer))
    if objective:
        write_tensors(beside / OBJECTIVE, dict(objective))
    (beside / STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def find_checkpoint(resume_from_checkpoint: str, run_dir: Path) -> Path:
    """The directory to resume from: the one named, or with `true` the newest of the run; ValueError where none is."""
    if resume_from_checkpoint.lower() != "true":
        path = Path(resume_from_checkpoint)
        if not (path / STATE).is_file():
            raise ValueError(f"resume_from_checkpoint={path}: holds no {STATE}; name a checkpoint-N directory, or true")
        return path
    numbered = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in run_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    if not numbered:
        raise ValueError(
            f"resume_from_checkpoint=true: {run_dir} holds no checkpoint-N; pass the output_dir of the run"
        )
    return numbered[max(numbered)]


def load_checkpoint(
    source: Path, policy: Transformer, optimizer: torch.optim.Optimizer, objective: Mapping[str, Tensor]
) -> TrainerState:
    """Put weights, optimiser and the objective's state back as they were.

    ValueError names the file that is damaged or not this run's; nothing is changed then.
    """
    adapted = bool(lora_layers(policy))
    weights = {f"{PEFT_PREFIX}{name}.weight" if adapted else name: p.data for name, p in trainable(policy).items()}
    targets = {ADAPTER_WEIGHTS if adapted else WEIGHTS: weights, OPTIMIZER: optimizer_tensors(policy, optimizer)}
    if objective:
        targets[OBJECTIVE] = dict(objective)
    state = _read_state(source / STATE)
    stored = {file: _read_exactly(source / file, tensors) for file, tensors in targets.items()}
    for file, tensors in targets.items():
        for name, tensor in tensors.items():
            tensor.copy_(stored[file][name])
    return state


def optimizer_tensors(policy: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step count of every trainable, by name: zeros, as AdamW begins, where it had no gradient."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(policy).items():
        state = optimizer.state[parameter]
        if not state:
            state |= {key: torch.zeros_like(parameter) for key in MOMENTS}
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        tensors |= {f"{name}.{key}": state[key] for key in (*MOMENTS, "step")}
    return tensors


def _read_exactly(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that must hold the expected ones, in name, shape and dtype, and no other."""
    stored = read_tensors(path)
    for name in sorted(expected.keys() | stored.keys()):
        given, asked = (
            f"{tuple(t[name].shape)} {t[name].dtype}" if name in t else "missing" for t in (stored, expected)
        )
        if given != asked:
            fault = "is unexpected" if asked == "missing" else f"is {given}, expected {asked}"
            raise ValueError(f"{path}: tensor {name:.200} {fault}; resume with the config that wrote it")
    return stored


def _read_state(path: Path) -> TrainerState:
    content = read_json(path)
    if not isinstance(content, dict) or content.keys() != STATE_RULES.keys():
        given = ", ".join(content)[:200] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected {', '.join(STATE_RULES)}, got {given or 'nothing'}; is it of this project?")
    for key, (rule, holds) in STATE_RULES.items():
        if not holds(content[key]):
            raise ValueError(f"{path}: {key}={content[key]!r:.100} must be {rule}; name another checkpoint")
    return TrainerState(**content)


def trainable(policy: Transformer) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return adapter_tensors(policy) or {name: p for name, p in policy.named_parameters() if p.requires_grad}

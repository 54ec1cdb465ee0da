"""checkpoint-N/: everything that step N + 1 depends on, in safetensors and JSON.

    adapter_model.safetensors + adapter_config.json, or model.safetensors + config.json ...
    optimizer.safetensors       AdamW's two moments of every trainable, by name, and its step count
    objective.safetensors       what the objective carries from step to step (a moving reference), where it does
    trainer_state.json          step, fp16's loss scale, the sums of the open logging window

Data order and dropout are functions of seed and step, so no random state is stored. A checkpoint is written under
another name and renamed when whole: a directory called checkpoint-N is complete.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    tensors = {}
    for name, parameter in trainable(policy).items():
        for key in (*MOMENTS, "step"):
            if key in optimizer.state[parameter]:
                tensors[f"{name}.{key}"] = optimizer.state[parameter][key]
    write_tensors(beside / OPTIMIZER, tensors)
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
    """Put weights, optimiser and the objective's state back as they were; ValueError where they do not fit the run."""
    parameters = trainable(policy)
    weights = read_tensors(source / (ADAPTER_WEIGHTS if lora_layers(policy) else WEIGHTS))
    moments = read_tensors(source / OPTIMIZER)
    for name, parameter in parameters.items():
        stored = weights.get(f"{PEFT_PREFIX}{name}.weight" if lora_layers(policy) else name)
        if stored is None or stored.shape != parameter.shape:
            raise ValueError(f"{source}: does not fit this run: {name} is missing or has another shape; same config?")
        parameter.data.copy_(stored)
        if f"{name}.{MOMENTS[0]}" in moments:
            entries = {key: moments[f"{name}.{key}"] for key in (*MOMENTS, "step")}
            optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in entries.items()}
    stored_objective = read_tensors(source / OBJECTIVE) if objective else {}
    for name, tensor in objective.items():
        if name not in stored_objective or stored_objective[name].shape != tensor.shape:
            raise ValueError(f"{source / OBJECTIVE}: {name} is missing or has another shape; same config?")
        tensor.copy_(stored_objective[name])
    return TrainerState(**json.loads((source / STATE).read_text(encoding="utf-8")))


def trainable(policy: Transformer) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return adapter_tensors(policy) or {name: p for name, p in policy.named_parameters() if p.requires_grad}

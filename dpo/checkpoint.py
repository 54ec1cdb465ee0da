"""checkpoint-N/: everything that step N + 1 depends on, in safetensors and JSON.

    adapter_model.safetensors + adapter_config.json, or model.safetensors + config.json ...
    optimizer.safetensors       the optimiser's state of every trainable, by name
    objective.safetensors       what the objective carries from step to step (a moving reference), where it does
    trainer_state.json          step, fp16's loss scale, the sums of the open logging window, the best evaluation
    manifest.json               size and SHA-256 of each (dpo.durable)

Data order and dropout are functions of seed and step, so no random state is stored. A checkpoint is whole or not there,
and holds no number that is not finite.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpo.durable import damage, write_whole
from dpo.optimizers import Optimizer
from models.config import read_json
from models.lora import ADAPTER_WEIGHTS, PEFT_PREFIX, adapter_tensors, lora_layers, save_adapter
from models.transformer import Transformer
from models.weights import WEIGHTS, read_tensors, save_model, write_tensors

OPTIMIZER, OBJECTIVE, STATE = "optimizer.safetensors", "objective.safetensors", "trainer_state.json"


class NotFinite(ValueError):
    """A weight, a moment or a number of the objective's is infinite or none."""


@dataclass
class TrainerState:
    step: int
    """updates made."""
    loss_scale: float
    good_steps: int
    window: dict[str, list[float]]
    """sums and counts of metrics since the last logged step."""
    skipped: int = 0
    """updates that were left out because something was not finite."""
    skipped_in_a_row: int = 0
    best: float | None = None
    """metric_for_best_model at its best so far, and the update after which it was."""
    best_step: int = 0
    evaluations_since_best: int = 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_window(value: Any) -> bool:
    numbers = (int, float)
    return isinstance(value, dict) and all(
        isinstance(entry, list) and len(entry) == 2 and type(entry[0]) in numbers and _is_count(entry[1])
        for entry in value.values()
    )


STATE_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("a whole number, at least 0", _is_count),
    "loss_scale": ("a finite number above 0", lambda value: _is_finite(value) and value > 0),
    "good_steps": ("a whole number, at least 0", _is_count),
    "window": ("a sum and a count for each metric", _is_window),
    "skipped": ("a whole number, at least 0", _is_count),
    "skipped_in_a_row": ("a whole number, at least 0", _is_count),
    "best": ("a finite number or null", lambda value: value is None or _is_finite(value)),
    "best_step": ("a whole number, at least 0", _is_count),
    "evaluations_since_best": ("a whole number, at least 0", _is_count),
}


def save_result(policy: Transformer, target: Path, *, base_model: str, source_dir: Path, lora_dropout: float) -> None:
    """The trained part of `policy`: an adapter in PEFT's format, or a whole model in Hugging Face's.

    NotFinite, and nothing written, where a weight is not.
    """
    _refuse_not_finite(target, trainable(policy))
    if lora_layers(policy):
        save_adapter(policy, target, base_model=base_model, dropout=lora_dropout)
    else:
        save_model(policy, target, source_dir=source_dir)


def _refuse_not_finite(target: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NotFinite(f"{target}: not written, {name} is not finite; go back to an earlier checkpoint-N")


def save_checkpoint(
    target: Path, policy: Transformer, optimizer: Optimizer, objective: Mapping[str, Tensor],
    state: TrainerState, **result: Any,
) -> None:  # fmt: skip
    """Write checkpoint-N; `objective` is the objective's state, `result` goes to save_result.

    NotFinite, and nothing written, where a number is not.
    """
    tensors = {OPTIMIZER: optimizer_tensors(policy, optimizer), OBJECTIVE: dict(objective)}
    # One by one: a moving reference has names of the weights that it follows.
    _refuse_not_finite(target, trainable(policy))
    for named in tensors.values():
        _refuse_not_finite(target, named)

    def fill(directory: Path) -> None:
        save_result(policy, directory, **result)
        for file, content in tensors.items():
            if content:
                write_tensors(directory / file, content)
        (directory / STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")

    write_whole(target, fill)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint-N directories of a run, the newest first, whole or not."""
    numbers = [path.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*")]
    return [run_dir / f"checkpoint-{n}" for n in sorted((int(n) for n in numbers if n.isdigit()), reverse=True)]


def put_aside_after(run_dir: Path, step: int) -> None:
    """Rename the checkpoints beyond `step`, damaged ones too, of a run that goes back to it: it will write its own."""
    for path in checkpoints(run_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            names = (path.with_name(f"{path.name}.left-{i}") for i in range(1, 10**6))
            path.rename(next(name for name in names if not name.exists()))


def keep_newest(run_dir: Path, limit: int, keep: Path | None) -> None:
    """Remove all but the `limit` newest checkpoints of a run, and never `keep`, nor a damaged one."""
    for path in checkpoints(run_dir)[limit:]:
        if path != keep and damage(path) is None:
            with suppress(OSError):
                path.rename(
                    path.with_name(f"{path.name}.removed")
                )  # a half of it would look damaged, and stay for good
    for path in run_dir.glob("checkpoint-*.removed"):  # also of a process that was killed
        shutil.rmtree(path, ignore_errors=True)  # a link, or a directory that another process looks into, may stay


def find_checkpoint(resume_from_checkpoint: str, run_dir: Path) -> Path:
    """The directory to resume from: the one named, or with `true` the newest whole one of the run.

    Damaged ones are said and passed over. ValueError where none is left, or the one named is damaged.
    """
    if resume_from_checkpoint.lower() != "true":
        path = Path(resume_from_checkpoint)
        if fault := damage(path):
            raise ValueError(f"resume_from_checkpoint={path}: {fault}; name a whole checkpoint-N directory, or true")
        return path
    for replaced in run_dir.glob("checkpoint-*.old"):  # of a process that was killed between two renames
        target = replaced.with_name(replaced.name.removesuffix(".old"))
        if not target.exists() and damage(replaced) is None:
            replaced.rename(target)
    for path in checkpoints(run_dir):
        fault = damage(path)
        if fault is None:
            return path
        print(f"warning: {path} is damaged ({fault}) and is passed over")
    raise ValueError(
        f"resume_from_checkpoint=true: {run_dir} holds no whole checkpoint-N; pass the output_dir of the run"
    )


def load_checkpoint(
    source: Path, policy: Transformer, optimizer: Optimizer, objective: Mapping[str, Tensor]
) -> TrainerState:
    """Put weights, optimiser and the objective's state back as they were.

    ValueError names the file that is damaged or not this run's; nothing is changed then.
    """
    file, weights = _weights_of(policy)
    targets = {file: weights, OPTIMIZER: optimizer_tensors(policy, optimizer)}
    if objective:
        targets[OBJECTIVE] = dict(objective)
    state = _read_state(source / STATE)
    stored = {file: _read_exactly(source / file, tensors) for file, tensors in targets.items()}
    for file, tensors in targets.items():
        for name, tensor in tensors.items():
            tensor.copy_(stored[file][name])
    return state


def load_weights(source: Path, policy: Transformer) -> None:
    """Put the weights of a checkpoint into the policy, and nothing else of it."""
    file, weights = _weights_of(policy)
    for name, tensor in _read_exactly(source / file, weights).items():
        weights[name].copy_(tensor)


def _weights_of(policy: Transformer) -> tuple[str, dict[str, Tensor]]:
    """The file of a checkpoint that holds the trained weights, and these by their names in it."""
    adapted = bool(lora_layers(policy))
    weights = {f"{PEFT_PREFIX}{name}.weight" if adapted else name: p.data for name, p in trainable(policy).items()}
    return ADAPTER_WEIGHTS if adapted else WEIGHTS, weights


def optimizer_tensors(policy: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state of every trainable, by name: zeros, as it begins, where there was no gradient yet."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in trainable(policy).items() for key, tensor in optimizer.state_of(parameter).items()
    }  # fmt: skip


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

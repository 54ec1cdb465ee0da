"""Checkpoints: what was saved comes back to the bit; what is damaged or another run's is refused in one line."""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_durable import dying_at, fill, in_a_child
from torch import Tensor

from dpo.checkpoint import (
    OBJECTIVE,
    OPTIMIZER,
    STATE,
    STATE_RULES,
    TrainerState,
    checkpoints,
    keep_newest,
    load_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    trainable,
)
from dpo.durable import damage, write_whole
from dpo.optim import build_optimizer
from models.config import parse_model_config
from models.lora import ADAPTER_WEIGHTS, inject_lora
from models.transformer import Transformer
from models.weights import WEIGHTS, read_tensors, write_tensors

MODEL = {
    "model_type": "llama", "vocab_size": 5, "hidden_size": 4, "intermediate_size": 3, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
}  # fmt: skip
STATE_OF_7 = TrainerState(7, 1024.0, 3, {"loss": [2.5, 4]})


class Run:
    """The state of a run: weights, AdamW after one step, what the objective carries. Another seed, other numbers."""

    def __init__(self, seed: int, *, adapted: bool = True, rank: int = 2, steps: int = 1, untouched: str = "none"):
        torch.manual_seed(seed)
        self.policy = Transformer(parse_model_config(MODEL), torch.float32)
        for parameter in self.policy.parameters():  # a model's weights come from files: here they would be any bytes
            torch.nn.init.normal_(parameter)
        if adapted:
            options = {"alpha": 4, "use_rslora": False, "dropout": 0.0, "target": "all", "seed": seed}
            inject_lora(self.policy.requires_grad_(False), rank=rank, **options)
        self.optimizer = build_optimizer("adamw_torch", trainable(self.policy).items(), weight_decay=0.0)
        for _ in range(steps):
            for name, parameter in trainable(self.policy).items():
                parameter.grad = None if untouched in name else torch.randn_like(parameter)
            for group in self.optimizer.param_groups:
                group["lr"] = 0.1
            self.optimizer.step()
        self.objective = {"moving": torch.randn(3)}

    def tensors(self) -> dict[str, Tensor]:
        moments = optimizer_tensors(self.policy, self.optimizer)
        return {name: t.detach().clone() for name, t in (trainable(self.policy) | moments | self.objective).items()}

    def save(self, target: Path) -> Path:
        (target.parent / "base").mkdir(exist_ok=True)
        (target.parent / "base" / "config.json").write_text(json.dumps(MODEL))
        result = {"base_model": "m", "source_dir": target.parent / "base", "lora_dropout": 0.0}
        save_checkpoint(target, self.policy, self.optimizer, self.objective, STATE_OF_7, **result)
        return target

    def load(self, source: Path) -> TrainerState:
        return load_checkpoint(source, self.policy, self.optimizer, self.objective)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("steps", [0, 1])
def test_what_was_saved_comes_back_to_the_bit(tmp_path, adapted, steps):
    """Into a run that has not stepped yet, as at a resume, and into one that has. fp16 may skip every step so far."""
    saved = Run(0, adapted=adapted, steps=steps)
    source = saved.save(tmp_path / "checkpoint-7")
    for other in (Run(1, adapted=adapted, steps=0), Run(1, adapted=adapted)):
        assert not equal(other.tensors(), saved.tensors())
        assert other.load(source) == STATE_OF_7
        assert equal(other.tensors(), saved.tensors())


def test_a_parameter_that_had_no_gradient_yet_begins_where_adamw_would(tmp_path):
    """As an expert that no token was sent to. The step after the resume is the uninterrupted run's."""
    saved = Run(0, untouched="q_proj")
    resumed = Run(1, steps=0)
    resumed.load(saved.save(tmp_path / "checkpoint-7"))
    never_saved = Run(0, untouched="q_proj")
    for run in (never_saved, resumed):
        for parameter in trainable(run.policy).values():
            parameter.grad = torch.ones_like(parameter)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.1
        run.optimizer.step()
    resumed.objective = never_saved.objective
    assert equal(resumed.tensors(), never_saved.tensors())


def test_every_field_of_the_state_has_a_rule():
    assert list(STATE_RULES) == [field.name for field in fields(TrainerState)]


def with_state(**changes: object) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        content = json.loads((source / STATE).read_text()) | changes
        (source / STATE).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))

    return damage


def with_text(text: str) -> Callable[[Path], None]:
    return lambda source: (source / STATE).write_text(text)


def without_file(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def cut_short(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).write_bytes((source / name).read_bytes()[:-5])


def with_tensor(file: str, end: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """The first tensor whose name ends so is changed; None removes it."""

    def damage(source: Path) -> None:
        tensors = read_tensors(source / file)
        name = min(name for name in tensors if name.endswith(end))
        changed = change(tensors.pop(name))
        write_tensors(source / file, tensors | ({} if changed is None else {name: changed}))

    return damage


def with_another(file: str) -> Callable[[Path], None]:
    return lambda source: write_tensors(source / file, read_tensors(source / file) | {"stranger": torch.ones(2)})


def gone(tensor: Tensor) -> None:
    return None


KEYS = f"expected {', '.join(STATE_RULES)}, got "
DAMAGED = [
    (without_file(STATE), STATE, "not valid JSON ([Errno 2] No such file"),
    (with_text('{"step": 7, "lo'), STATE, "not valid JSON (Unterminated string"),
    (with_text("[7]"), STATE, KEYS + "list; is it of this project?"),
    (with_text("{}"), STATE, KEYS + "nothing; is it of this project?"),
    (with_text('{"global_step": 7, "epoch": 1.0}'), STATE, KEYS + "global_step, epoch; is it"),
    (with_state(good_steps="absent"), STATE, KEYS + "step, loss_scale, window, skipped, skipped_in"),
    (with_state(step="7"), STATE, "step='7' must be a whole number, at least 0; name another checkpoint"),
    (with_state(step=-1), STATE, "step=-1 must be a whole number"),
    (with_state(step=True), STATE, "step=True must be a whole number"),
    (with_state(good_steps=1.5), STATE, "good_steps=1.5 must be a whole number"),
    (with_state(loss_scale=0), STATE, "loss_scale=0 must be a finite number above 0"),
    (with_state(loss_scale=math.inf), STATE, "loss_scale=inf must be a finite number above 0"),
    (with_state(window=None), STATE, "window=None must be a sum and a count for each metric"),
    (with_state(window={"loss": [1.0]}), STATE, "window={'loss': [1.0]} must be a sum"),
    (with_state(window={"loss": ["1", 2]}), STATE, "window={'loss': ['1', 2]} must be a sum"),
    (with_state(window={"loss": [1.0, -2]}), STATE, "window={'loss': [1.0, -2]} must be a sum"),
    (without_file(OPTIMIZER), OPTIMIZER, "not a readable safetensors file (no such file)"),
    (cut_short(OPTIMIZER), OPTIMIZER, "not a readable safetensors file ("),
    (with_tensor(OPTIMIZER, "down_proj.lora_A.exp_avg_sq", gone), OPTIMIZER, "lora_A.exp_avg_sq is missing"),
    (with_tensor(OPTIMIZER, "down_proj.lora_A.step", gone), OPTIMIZER, "down_proj.lora_A.step is missing"),
    (with_tensor(OPTIMIZER, "lora_A.exp_avg", lambda t: t[1:]), OPTIMIZER, "lora_A.exp_avg is (1, 3) torch.float32"),
    (with_tensor(OPTIMIZER, "lora_A.step", lambda t: t.long()), OPTIMIZER, "lora_A.step is () torch.int64"),
    (with_another(OPTIMIZER), OPTIMIZER, "tensor stranger is unexpected; resume with the config that wrote it"),
    (without_file(ADAPTER_WEIGHTS), ADAPTER_WEIGHTS, "not a readable safetensors file (no such file)"),
    (with_tensor(ADAPTER_WEIGHTS, "lora_B.weight", gone), ADAPTER_WEIGHTS, "lora_B.weight is missing, expected (4, 2)"),
    (with_tensor(ADAPTER_WEIGHTS, "lora_B.weight", lambda t: t.T), ADAPTER_WEIGHTS, "lora_B.weight is (2, 4) torch.fl"),
    (with_tensor(ADAPTER_WEIGHTS, "lora_B.weight", lambda t: t / 0), ADAPTER_WEIGHTS, "has values that are not finite"),
    (with_another(ADAPTER_WEIGHTS), ADAPTER_WEIGHTS, "tensor stranger is unexpected"),
    (without_file(OBJECTIVE), OBJECTIVE, "not a readable safetensors file (no such file)"),
    (with_tensor(OBJECTIVE, "moving", lambda t: t[:2]), OBJECTIVE, "moving is (2,) torch.float32, expected (3,) t"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "file", "message"), DAMAGED, ids=[f"{f}: {m}"[:60] for _, f, m in DAMAGED])
def test_a_damaged_checkpoint_is_refused_in_one_line_and_changes_nothing(tmp_path, damage, file, message):
    source = Run(0).save(tmp_path / "checkpoint-7")
    damage(source)
    run = Run(1)
    before = run.tensors()
    with pytest.raises(ValueError) as caught:
        run.load(source)
    assert str(caught.value).startswith(f"{source / file}: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert equal(run.tensors(), before)


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path):
    """Of full fine-tuning where an adapter is trained, the other way round, and of an adapter of another rank."""
    adapter, whole = Run(0).save(tmp_path / "adapter"), Run(0, adapted=False).save(tmp_path / "whole")
    for run, source, message in (
        (Run(1), whole, f"{ADAPTER_WEIGHTS}: not a readable safetensors file"),
        (Run(1, adapted=False), adapter, f"{WEIGHTS}: not a readable safetensors file"),
        (Run(1, rank=3), adapter, r"lora_A.weight is \(2, 3\) torch.float32, expected \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run.load(source)


def test_a_process_that_dies_while_it_removes_a_checkpoint_leaves_no_half_of_one(tmp_path):
    """At whatever call into the file system; what is left of it goes the next time."""
    for call in range(1, 100):
        run = tmp_path / str(call)
        run.mkdir()
        for step in (1, 2):
            write_whole(run / f"checkpoint-{step}", fill("one"))
        status = in_a_child(lambda call=call, run=run: (dying_at(call), keep_newest(run, 1, keep=None)))
        assert not [path for path in checkpoints(run) if damage(path)], f"call {call}"
        keep_newest(run, 1, keep=None)
        assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
        if status == 0:
            break
    assert 5 < call < 99  # so many calls there were to die at

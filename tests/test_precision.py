"""Every cell of the README's table of precision is true; fp16 trains, and its gradient is float32's to its rounding."""

import json
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

import dpo.build
import dpo.logprobs
from dpo import optim
from dpo.build import WORLD, build_objective, build_policy, build_rows, build_template
from dpo.checkpoint import save_checkpoint
from dpo.doctor.flips import NoDirectory
from dpo.metrics import TIMING_KEYS, Means
from dpo.trainer import Trainer, _Clock
from models.config import parse_model_config
from models.transformer import Block, Linear, RMSNorm, Transformer
from models.weights import read_tensors, save_model
from train import train

ROOT = Path(__file__).parent.parent
FLAGS = {"float32": [], "bf16=true": ["bf16=true"], "fp16=true": ["fp16=true"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model of two layers with the world's tokenizer: float16 is slow on a CPU."""
    source, target = tmp_path_factory.mktemp("config"), tmp_path_factory.mktemp("tiny")
    config = json.loads((WORLD / "model" / "config.json").read_text())
    config |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WORLD / "model" / name, source)
    (source / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Transformer(parse_model_config(config), torch.float32)
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.3)
    save_model(model, target, source_dir=source)
    return target


def config(model_dir: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [
            f"model_name_or_path={model_dir}", "eval_dataset=null", "device=cpu", "max_samples=8", "warmup_ratio=0",
            "lr_scheduler_type=constant", "per_device_train_batch_size=4", "gradient_accumulation_steps=2", *overrides,
        ])  # fmt: skip


def trainer_of(cfg: DictConfig, weight: float = 1.0) -> Trainer:
    """The run of a config, without its directory; every row's loss times `weight`."""
    rows = build_rows(cfg, build_template(cfg))
    policy = build_policy(cfg, torch.device("cpu"))
    objective, _ = build_objective(cfg, policy, rows)
    weighed = [replace(row, example=replace(row.example, weight=weight)) for row in rows.train]
    return Trainer(cfg, policy, objective, weighed, [], NoDirectory(), Path())


def one_update(trainer: Trainer) -> float:
    """Of all its rows; returns their mean loss."""
    trainer.watch.window = Means()
    trainer.update(trainer.train_rows, _Clock())
    trainer.state.step += 1
    return trainer.watch.window.means()["loss"]


# --- the table ---


def stated() -> dict[str, dict[str, str]]:
    """What the README says: row -> column -> dtype."""
    section = re.search(r"### Precision\n\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())[1]
    head, _, *lines = ([cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in section.splitlines())
    return {line[0].partition(":")[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}


LOSS = "log-probabilities, loss, metrics"


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("flag", FLAGS)
def test_every_cell_of_the_readmes_table_is_what_an_update_computes_with(flag, kind, tiny, tmp_path, monkeypatch):
    seen: dict[str, set[torch.dtype]] = defaultdict(set)
    references: list[Transformer] = []

    def spy(module: object, name: str) -> None:
        """The tensors that this function returns, alone, in a dictionary or in Pairs, belong to the row LOSS."""
        original = getattr(module, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            tensors = result if isinstance(result, dict) else getattr(result, "__dict__", {"": result})
            seen[LOSS].update(t.dtype for t in tensors.values() if t.is_floating_point())
            return result

        monkeypatch.setattr(module, name, call)

    def look(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen["activations"] |= {output.dtype, *(t.dtype for t in inputs if isinstance(t, Tensor))}
        if output.requires_grad:
            output.register_hook(lambda gradient: seen["activations"].add(gradient.dtype))

    frozen = dpo.build.frozen_reference
    monkeypatch.setattr(dpo.build, "frozen_reference", lambda model: references.append(model) or frozen(model))
    spy(dpo.logprobs, "fused_logps")
    run = trainer_of(config(tiny, f"finetuning_type={kind}", *FLAGS[flag]))
    for name in ("measure", "losses", "metrics"):
        spy(run.objective, name)
    assert len(references) == (kind == "full")
    for model in (run.policy, *references):
        seen["frozen weights"] |= {p.dtype for p in model.parameters() if not p.requires_grad}
        for module in model.modules():
            if isinstance(module, Linear | RMSNorm | Block):
                module.register_forward_hook(look)
    update = run.optimizer.update
    run.optimizer.update = lambda weights, gradients, *rates: (
        seen["gradients"].update(g.dtype for g in gradients), update(weights, gradients, *rates)
    )  # fmt: skip
    while not run.optimizer.state:  # fp16's first updates may overflow and be skipped
        one_update(run)
    seen["trained weights"] = {p.dtype for p in run.parameters}
    seen["optimizer state"] = {t.dtype for tensors in run.optimizer.state.values() for t in tensors.values()}
    result = run.result | {"source_dir": tiny}
    save_checkpoint(tmp_path / "saved", run.policy, run.optimizer, run.objective.state, run.state, **result)
    files = (tmp_path / "saved").glob("*.safetensors")
    seen["what is saved"] = {t.dtype for file in files for t in read_tensors(file).values()}
    assert seen == {row: {getattr(torch, cells[flag])} for row, cells in stated().items()}


# --- fp16 ---


def gradient(cfg: DictConfig, *, scale: float | None = None, weight: float = 1.0) -> Tensor:
    """The gradient of one update, flat, from an adapter that is not zero; scale: another loss scale."""
    run = trainer_of(cfg, weight)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in run.policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=draw)
    if scale is not None:
        run.loss_scale.scale = scale
    run._accumulate(run.train_rows, _Clock(), None)
    assert run.loss_scale.unscale(run.parameters)
    return torch.cat([p.grad.flatten() for p in run.parameters])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(("flag", "bits"), [("bf16=true", 8), ("fp16=true", 11)])
def test_a_gradient_is_float32s_to_20_roundings(tiny, flag, bits, kind):
    """A rounding moves a number by 2^-bits of itself at most. Between a weight and the loss lie some hundred, forward
    and back through two layers; independent errors add up by their squares, to the size of ten or so: 20 are allowed.
    """
    cfg, plain = (config(tiny, f"finetuning_type={kind}", *FLAGS[name]) for name in (flag, "float32"))
    scale = 2.0**10 if flag == "fp16=true" else None  # at 2^16 these weights overflow
    assert 2.0**-bits < error(gradient(cfg, scale=scale), gradient(plain)) < 20 * 2.0**-bits


def test_a_gradient_below_float16s_smallest_number_survives_by_the_scale(tiny):
    """2^-24 = 6e-8 is the smallest. Here every loss counts 1e-8 times, so that no weight's gradient is larger."""
    expected = gradient(config(tiny), weight=1e-8)
    assert 0 < expected.abs().max() < 2.0**-24
    assert error(gradient(config(tiny, "fp16=true"), weight=1e-8), expected) < 20 * 2.0**-11
    assert not gradient(config(tiny, "fp16=true"), weight=1e-8, scale=1.0).any()


def test_an_fp16_run_leaves_out_what_overflows_and_then_learns_as_float32_does(tiny, monkeypatch):
    """A scale that is four times the usual overflows here. All updates are of the same rows at the same rate, so that
    it is float32's run, some updates later.
    """
    monkeypatch.setattr(optim, "INITIAL_SCALE", 2.0**18)
    plain, run = (trainer_of(config(tiny, *flag, "learning_rate=1e-2")) for flag in (FLAGS["float32"], ["fp16=true"]))
    losses = [one_update(plain) for _ in range(8)]
    scale, start = 2.0**18, [p.detach().clone() for p in run.parameters]
    while True:
        first = one_update(run)
        if run.loss_scale.scale == scale:
            break
        scale /= 2
        assert run.loss_scale.scale == scale and run.loss_scale.good_steps == 0
        assert all(torch.equal(p, before) for p, before in zip(run.parameters, start, strict=True))
        assert not run.optimizer.state
    assert 1 <= scale < 2.0**18
    assert [first, *(one_update(run) for _ in range(7))] == pytest.approx(losses, abs=0.01)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_a_resumed_fp16_run_keeps_its_scale(tiny, tmp_path, monkeypatch):
    """Which has halved by then: one that began at 2^18 again would overflow again."""
    monkeypatch.setattr(optim, "INITIAL_SCALE", 2.0**18)
    run = tmp_path / "run"
    overrides = ["fp16=true", "max_steps=8", "save_steps=4", "logging_steps=1", "num_samples=0", f"output_dir={run}"]

    def result() -> tuple[list[dict], str, list[list[float]]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        metrics = [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]
        weights = [tensor.flatten().tolist() for tensor in read_tensors(run / "adapter_model.safetensors").values()]
        return metrics, (run / "checkpoint-8" / "trainer_state.json").read_text(), weights

    train(config(tiny, *overrides))
    expected = result()
    halved = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    assert halved["loss_scale"] < 2.0**18 and 0 < halved["good_steps"] < 4
    (run / "checkpoint-8").rename(tmp_path / "checkpoint-8")
    train(config(tiny, *overrides, "resume_from_checkpoint=true"))
    assert result() == expected

"""The prediction is what is kept: activations byte for byte as autograd keeps them, parts that add up."""

import platform
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train as command
from dpo import fused, memory
from dpo.build import build_policy, build_rows, build_template, predict_memory
from dpo.logprobs import token_logps
from dpo.memory import (
    HOLES,
    PYTORCH,
    SHARE,
    Activations,
    Lengths,
    attention_shapes,
    bytes_packed,
    forecast,
    largest_budget,
)
from models.config import parse_model_config
from models.lora import inject_lora
from models.stream import Stream, pack
from models.transformer import Transformer
from models.weights import load_model

ROOT = Path(__file__).parent.parent

LLAMA = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "tied, biases": LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "window": LLAMA | {"model_type": "mistral", "sliding_window": 9},
    "qwen3": LLAMA | {"model_type": "qwen3"},
    "experts": LLAMA | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True,
                        "moe_intermediate_size": 8},
}  # fmt: skip
ROWS = [Lengths(7, (4, 6)), Lengths(3, (9, 2)), Lengths(12, (1, 5)), Lengths(2, (30, 0))]


def model_of(raw: dict, dtype: torch.dtype, *, full: bool, **lora: object) -> Transformer:
    """Random weights; trained ones float32 where nothing else is said."""
    model = Transformer(parse_model_config(raw), dtype)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if full:
        return model.requires_grad_(True).train()
    model.to(dtype)
    settings = {"rank": 2, "alpha": 4, "dropout": 0.0, "use_rslora": False, "target": "all", "seed": 0} | lora
    inject_lora(model, **settings)
    return model.train()


def stream_of(rows: Sequence[Lengths], vocabulary: int) -> Stream:
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(n)]

    return pack([ids(row.prompt) for row in rows], [[ids(n) for n in row.responses] for row in rows])


def kept_by_autograd(model: Transformer, stream: Stream) -> int:
    """Bytes of the distinct storages that autograd saves, without the model's own and the stream's."""
    tensors = [*model.parameters(), *vars(stream).values(), *(x for rows in stream.rows for x in vars(rows).values())]
    known = {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor)}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        result = token_logps(model, stream)
    assert result.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in known)


def test_the_rows_of_attention_are_those_of_the_packed_stream():
    packed = [(*rows.query_NQ.shape, rows.key_NK.shape[1], rows.mask_NQK is not None)
              for rows in stream_of(ROWS, 23).rows]  # fmt: skip
    assert attention_shapes(ROWS) == packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name, full, dtype):
    model, stream = model_of(MODELS[name], dtype, full=full), stream_of(ROWS, 23)
    assert Activations(model, ROWS).total == kept_by_autograd(model, stream)


@pytest.mark.parametrize(
    "lora", [{"target": "v_proj"}, {"target": "layers.1.mlp.up_proj"}, {"target": "o_proj,gate_proj"}, {"dropout": 0.3},
             {"rank": 5}], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_depends_on_no_trained_weight_is_not_kept(lora, dtype):
    model, stream = model_of(LLAMA, dtype, full=False, **lora), stream_of(ROWS, 23)
    assert Activations(model, ROWS).total == kept_by_autograd(model, stream)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_keeps_the_inputs_of_blocks(full, dtype):
    model, stream = model_of(LLAMA, dtype, full=full), stream_of(ROWS, 23)
    model.gradient_checkpointing = True
    assert Activations(model, ROWS).checkpointed == kept_by_autograd(model, stream)


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_activations_of_a_real_model_are_what_autograd_keeps(smollm2, full, dtype):
    model = load_model(smollm2, dtype=torch.float32 if full else dtype, device=torch.device("cpu"))
    model.dtype = dtype
    if full:
        model.requires_grad_(True)
    else:
        inject_lora(model, rank=8, alpha=16, dropout=0.0, use_rslora=False, target="all", seed=0)
    stream = stream_of(ROWS, 1000)
    assert Activations(model, ROWS).total == kept_by_autograd(model, stream)
    model.gradient_checkpointing = True
    assert Activations(model, ROWS).checkpointed == kept_by_autograd(model, stream)


# --- the peak ---

WIDE = LLAMA | {"vocab_size": 600, "hidden_size": 48, "intermediate_size": 96, "head_dim": 12}
LONG = [Lengths(40, (60, 60)), Lengths(30, (70, 40))]


def allocated(compute: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's tensors take at once, beyond those that are there at the start."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        compute()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("full", "tied", "dtype"),
    [(False, False, torch.bfloat16), (True, False, torch.float32), (True, True, torch.bfloat16)],
)
def test_activations_and_temporaries_are_the_most_that_tensors_take(
    monkeypatch, full, tied, dtype, checkpointing, chunks
):
    """After a first micro-batch, so that gradients lie there; within 10%. LONG has 230 response tokens."""
    for module in (fused, memory):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", {1: 1 << 24, 3: 600 * 100}[chunks])
    model, stream = model_of(WIDE | {"tie_word_embeddings": tied}, dtype, full=full), stream_of(LONG, 600)
    model.gradient_checkpointing = checkpointing
    step = lambda: token_logps(model, stream).mean().backward()
    step()
    parts = forecast(model, LONG, optim="sgd", reference=0, alone=False, evaluated=[], answers=[]).parts
    assert parts["activations"] + parts["temporaries"] == pytest.approx(allocated(step), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_heads_temporaries_are_the_most_that_its_backward_pass_takes(monkeypatch, dtype):
    for module in (fused, memory):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 600 * 40)
    model = model_of(WIDE | {"hidden_size": 96}, dtype, full=True)
    hidden_RD = torch.randn(100, 96, dtype=dtype, requires_grad=True)
    logps_R = fused.fused_logps(hidden_RD, model.head_weight_VD, torch.arange(100))
    measured = allocated(logps_R.sum().backward)
    assert memory._head(model, 100, backward=True) == pytest.approx(measured, rel=0.1)


def test_the_parts_of_a_tiny_model_by_hand():
    """A gradient and two moments for each weight: of embedding and head, of q and o, k and v, the MLP and the norms."""
    model = model_of(LLAMA, torch.float32, full=True)
    block = 2 * 24 * 12 + 2 * 12 * 12 + 3 * 12 * 20 + 2 * 12
    weights = 4 * (2 * 23 * 12 + 3 * block + 12)
    predict = lambda **more: forecast(model, ROWS, **({"optim": "adamw_torch", "reference": 7, "alone": False,
                                                       "evaluated": [], "answers": []} | more))  # fmt: skip
    parts = predict().parts
    assert (parts["weights"], parts["reference"], parts["optimizer"]) == (weights, 7, 2 * weights)
    assert parts["gradients"] == weights and parts["evaluation"] == 0
    assert parts["holes in the heap"] == round(HOLES * parts["activations"]) and parts["PyTorch itself"] == PYTORCH
    assert predict().peak == sum(parts.values()) and predict().tokens == sum(row.tokens for row in ROWS) == 81
    assert [predict(optim=name).parts["optimizer"] // weights for name in ("sgd", "rmsprop")] == [0, 1]
    # Alone, gradients come as activations go: what they take beyond these, which is nothing here.
    assert parts["activations"] + parts["temporaries"] > weights and predict(alone=True).parts["gradients"] == 0
    tiny = forecast(model, [Lengths(1, (1,))], optim="sgd", reference=0, alone=True, evaluated=[], answers=[]).parts
    assert sum(tiny[name] for name in ("gradients", "activations", "temporaries")) == weights


def test_an_evaluation_counts_where_it_takes_more_than_training():
    model = model_of(LLAMA, torch.float32, full=False)

    def predict(rows: list[Lengths], answers: Sequence[Lengths] = ()) -> dict[str, int]:
        return forecast(model, ROWS, optim="sgd", reference=0, alone=False, evaluated=rows, answers=answers).parts

    assert predict([Lengths(5, (5, 5))])["evaluation"] == 0
    assert predict(ROWS * 20)["evaluation"] > 0


def test_the_weights_that_answers_are_decoded_with_are_counted_once_each():
    """Every linear layer and the head, tied or not, in the dtype of the computation."""
    model = model_of(LLAMA, torch.bfloat16, full=False)
    linear = [module for module in model.modules() if type(module).__name__ in ("Linear", "LoRALinear")]
    assert bytes_packed(model) == 2 * (
        sum(layer.weight.numel() for layer in linear)
        + (model.head_weight_VD.numel() if model.config.tie_word_embeddings else 0)
    )


def test_checkpointing_leaves_no_holes():
    model = model_of(LLAMA, torch.float32, full=False)
    model.gradient_checkpointing = True
    parts = forecast(model, ROWS, optim="sgd", reference=0, alone=False, evaluated=[], answers=[]).parts
    assert parts["holes in the heap"] == 0 and parts["PyTorch itself"] == PYTORCH


@pytest.mark.slow
def test_with_checkpointing_a_freed_tensor_leaves_the_process():
    """What is kept beside short-lived tensors takes its own size, 80 MB, and not that of both, 160."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("about glibc's heap")
    code = """
import torch
from dpo.memory import give_back_at_once
from experiments.memory.run import status
give_back_at_once()
x = [torch.zeros(5_000_000) for _ in range(3)]
del x
before, kept = status("RssAnon")[0], []
for _ in range(100):
    short_lived = torch.zeros(200_000)
    kept.append(torch.zeros(200_000))
    del short_lived
print((status("RssAnon")[0] - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert float(done.stdout) == pytest.approx(80, rel=0.1), done.stderr


# --- the choice ---


def test_the_budget_is_the_largest_that_fits_and_at_least_the_longest_row():
    peak = lambda tokens: 10 + 3 * tokens
    assert [largest_budget(peak, 5, 100, limit) for limit in (9, 25, 27, 28, 30, 31, 10_000)] == [5, 5, 5, 6, 6, 7, 100]


def config(tmp_path: Path, *overrides: str) -> DictConfig:
    quick = ["max_samples=40", "max_steps=2", "logging_steps=1", "num_samples=0", "eval_dataset=null", "device=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*quick, f"output_dir={tmp_path}", *overrides])


def test_auto_takes_the_share_of_what_is_free_and_no_token_more(tmp_path):
    """And one row at a time where that is too much too; all 16 rows where everything fits."""
    cfg = config(tmp_path, "max_tokens_per_micro_batch=auto")
    rows = build_rows(cfg, build_template(cfg))
    policy = build_policy(cfg, torch.device("cpu"))
    longest = max(row.tokens for row in rows.train)

    def chosen(free: int | None) -> tuple[int, int]:
        cfg.max_tokens_per_micro_batch = "auto"
        peak = predict_memory(cfg, policy, rows, free).peak
        return cfg.max_tokens_per_micro_batch, peak

    def peak_at(tokens: int) -> int:
        cfg.max_tokens_per_micro_batch = tokens
        return predict_memory(cfg, policy, rows, None).peak

    free = 180_000_000
    tokens, peak = chosen(free)
    assert longest < tokens and peak <= SHARE * free < peak_at(tokens + 1)
    assert chosen(1)[0] == longest
    everything, _ = chosen(10**12)
    assert everything > tokens and peak_at(10 * everything) == peak_at(everything)
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch=auto: this system does not say how much memory"):
        chosen(None)


REFERENCES = {
    # overrides: bytes per weight of the policy
    "a LoRA's base": ([], 0),
    "none": (["stage=sft"], 0),
    "a loss without": (["pref_loss=simpo", "pref_beta=2"], 0),
    "a frozen copy": (["finetuning_type=full"], 4),
    "in bfloat16": (["finetuning_type=full", "bf16=true"], 2),
    "from a cache": (["finetuning_type=full", "ref_cache_dir=c"], 0),
    "moving": (["finetuning_type=full", "bf16=true", "sync_ref_model=true"], 4),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_counts_where_it_has_weights_of_its_own(tmp_path, name):
    overrides, size = REFERENCES[name]
    cfg = config(tmp_path, *overrides)
    rows, policy = build_rows(cfg, build_template(cfg)), build_policy(cfg, torch.device("cpu"))
    parts = predict_memory(cfg, policy, rows, None).parts
    assert parts["reference"] == size * sum(p.numel() for p in policy.parameters())


@pytest.mark.slow
def test_a_run_says_its_memory_and_warns_where_it_is_not_free(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "free_memory", lambda device: 100_000_000)
    command.train(config(tmp_path, "max_steps=1"))
    said = capsys.readouterr().out
    assert re.search(
        r"memory: about \d{3} MB at the largest micro-batch \(\d+ tokens\): weights [\d.]+ MB, optim", said
    )
    assert "warning: 100 MB of memory were free; lower max_tokens_per_micro_batch, or set gradient_check" in said


@pytest.mark.slow
def test_a_resumed_run_keeps_the_number_that_auto_chose(tmp_path, monkeypatch):
    """Bit for bit the uninterrupted run's weights, although less is free."""
    overrides = ["max_tokens_per_micro_batch=auto", "save_strategy=steps", "save_steps=1", "warmup_ratio=0"]
    monkeypatch.setattr(command, "free_memory", lambda device: 180_000_000)
    whole = config(tmp_path, *overrides)
    command.train(whole)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(command, "free_memory", lambda device: 1)
    again = config(tmp_path, *overrides, f"resume_from_checkpoint={tmp_path / 'checkpoint-1'}")
    command.train(again)
    assert again.max_tokens_per_micro_batch == whole.max_tokens_per_micro_batch > 100
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_that_was_cut_by_rows_is_not_continued_with_auto(tmp_path):
    command.train(config(tmp_path, "save_strategy=steps", "save_steps=1"))
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch=auto: the run in .* was made with .*=None"):
        command.train(config(tmp_path, "max_tokens_per_micro_batch=auto", "resume_from_checkpoint=true"))


def test_what_is_free_is_what_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_memory(torch.device("cpu")) is None
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:   2000 kB\n")
    assert memory.free_memory(torch.device("cpu")) == 2_048_000

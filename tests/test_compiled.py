"""Compiled blocks compute what plain ones do, and where they cannot be made that is said."""

import random
import shutil

import pytest
import torch
from torch import Tensor

from dpo.build import WORLD
from dpo.logprobs import token_logps
from models.compiled import compile_blocks, refuse_compiling
from models.config import parse_model_config
from models.lora import adapters_disabled, inject_lora
from models.packed import packed
from models.stream import Stream, pack
from models.transformer import Transformer
from models.weights import load_model

LLAMA = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
EXPERTS = LLAMA | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True,
                   "moe_intermediate_size": 8}  # fmt: skip
CPU = torch.device("cpu")


def world_model(full: bool, compiled: bool) -> Transformer:
    """The built-in model in float32, every weight trained or an adapter that is not zero."""
    model = load_model(WORLD / "model", dtype=torch.float32, device=CPU).train().requires_grad_(full)
    if not full:
        layers = inject_lora(model, rank=4, alpha=8, dropout=0.0, use_rslora=False, target="all", seed=0)
        generator = torch.Generator().manual_seed(1)
        for layer in layers.values():
            layer.lora_B.data.normal_(std=0.05, generator=generator)
    if compiled:
        compile_blocks(model)
    return model


def streams() -> list[Stream]:
    """Two, of other lengths, numbers of prompts and numbers of branches."""
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(3, 800) for _ in range(n)]
    return [pack([ids(17), ids(5)], [[ids(9), ids(30)], [ids(1), ids(12)]]), pack([ids(8)], [[ids(4), ids(3), ids(6)]])]


def passes(model: Transformer, stream: Stream) -> list[Tensor]:
    """Log-probabilities of reference and policy, and the gradients of a loss of both."""
    with torch.no_grad(), adapters_disabled(model):
        reference_R = token_logps(model, stream)
    logps_R = token_logps(model, stream)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [reference_R, logps_R.detach(), *torch.autograd.grad((logps_R - reference_R + 1).square().sum(), trained)]


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_compiled_blocks_are_the_plain_ones_in_value_and_gradient(full):
    """Also where blocks are computed again for the backward pass, and where packed weights are not compiled."""
    plain, compiled = (world_model(full, compiled) for compiled in (False, True))
    for checkpointing in (False, True):
        compiled.gradient_checkpointing = checkpointing
        for stream in streams():
            for ours, expected in zip(passes(compiled, stream), passes(plain, stream), strict=True):
                assert (ours - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad(), packed(plain), packed(compiled):
        assert torch.equal(compiled(streams()[0]), plain(streams()[0]))


@pytest.mark.slow
def test_one_function_serves_every_block_and_every_length():
    """Compiled for the reference, for the policy's first block, whose input needs no gradient, and for the others."""
    model = world_model(full=False, compiled=True)
    torch._dynamo.utils.counters.clear()
    for stream in streams():
        passes(model, stream)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * 3


@pytest.mark.parametrize(
    ("raw", "device", "programs", "message"),
    [
        (EXPERTS, "cpu", ["g++"], "torch_compile=True: the sizes of a mixture of 3 experts .* numbers; pass"),
        (LLAMA, "cpu", ["gcc"], "torch_compile=True with device=cpu: needs g\\+\\+ or clang\\+\\+, .*; install one"),
        (LLAMA, "cuda", [], "torch_compile=True with device=cuda: needs gcc or clang, "),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused(monkeypatch, raw, device, programs, message):
    monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
    with pytest.raises(ValueError, match=message):
        refuse_compiling(parse_model_config(raw), torch.device(device))


def test_a_compiler_is_enough(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "g++" else None)
    refuse_compiling(parse_model_config(LLAMA), CPU)

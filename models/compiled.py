"""A transformer's blocks, each side of their attention compiled by torch.compile.

    q, k, v = before(h)     norm, projections, rotary        h = after(h, attention(q, k, v))     projection, norm, MLP

What is compiled is one function for all blocks, of streams of any length: the norms, LoRA's additions, SwiGLU and the
rotary embedding become few passes over memory. Attention stays out, for its shapes differ from stream to stream, and so
do mixtures of experts, whose sizes depend on the numbers. Results are those of the plain block
to rounding.
"""

import shutil
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.transformer import Block, Transformer


def refuse_compiling(config: ModelConfig, device: torch.device) -> None:
    """ValueError where blocks cannot be compiled."""
    if config.num_experts:
        raise ValueError(
            f"torch_compile=True: the sizes of a mixture of {config.num_experts} experts depend on its numbers; pass "
            "torch_compile=false"
        )
    compilers = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang")
    if not any(map(shutil.which, compilers)):
        raise ValueError(
            f"torch_compile=True with device={device}: needs {' or '.join(compilers)}, and there is neither; install "
            "one, or pass torch_compile=false"
        )


def compile_blocks(model: Transformer) -> None:
    """From now on the blocks of `model` compute with compiled code, which is made when it is first needed."""
    torch.compiler.reset()  # of a function 8 kinds are kept in a process: what other models needed would count too
    for block in model.model.layers:
        assert isinstance(block, Block)
        vars(block).update({name: partial(_call, name, block) for name in ("before_attention", "after_attention")})


def _call(name: str, block: Block, *tensors: Tensor) -> Any:
    function = getattr(Block, name)
    if block.self_attn.q_proj.packed is None:  # else the weights are laid out in a way that only their kernel reads
        function = _compiled(function)
    return function(block, *tensors)


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # Rounded where the plain block rounds: policy and reference are compiled apart, and are to start as one.
    return torch.compile(function, dynamic=True, fullgraph=True, options={"emulate_precision_casts": True})

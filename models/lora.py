"""LoRA by hand: y = x W^T + (alpha / r) dropout(x) A^T B^T with W frozen (Hu et al. 2021, arXiv:2106.09685, Eq. 3).

A (r x in) starts random, B (out x r) at zero, so an injected model is the base model bit for bit until its first step.
A and B are float32 whatever the base's dtype: at a learning rate of 5e-7 bfloat16 would round most updates away. They
are cast to the dtype of x where they multiply.

`using_adapter` computes with other adapter weights for the length of a block: a snapshot of an earlier adapter, or none
at all. Both of DPO's cheap references are that one mechanism. Adapters are stored in PEFT's format, both ways.
Left out: DoRA, biases, per-layer ranks, rsLoRA, adapters on embeddings or the head; they are refused by name.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.transformer import Linear, Transformer
from models.weights import read_tensors, write_tensors

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# adapter_config.json's keys that change what an adapter computes, with the one value that is computed here.
PEFT_REQUIRED = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None,
    "trainable_token_indices": None, "lora_bias": False, "target_parameters": None, "use_qalora": False,
    "alora_invocation_tokens": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
    "velora_config": None, "monteclora_config": None,
}  # fmt: skip
# The starts that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change them.
PEFT_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class LoRALinear(Linear):
    """A Linear whose weight is frozen and which adds a low-rank product; takes over the weight of `base`."""

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        out_features, in_features = base.weight.shape
        # The range of PEFT's and loralib's kaiming_uniform_(a=sqrt(5)): +-1/sqrt(in).
        bound = 1 / math.sqrt(in_features)
        start = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=base.weight.device))
        self.scaling = alpha / rank
        self.dropout = dropout
        self.substitute: tuple[Tensor, Tensor] | None = None
        self.substituted = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        adapter = self.substitute if self.substituted else (self.lora_A, self.lora_B)
        if adapter is None:
            return y
        A_RD, B_OR = (t.to(x.dtype) for t in adapter)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return y + F.linear(F.linear(x, A_RD), B_OR) * self.scaling


def inject_lora(
    model: Transformer, *, rank: int, alpha: float, dropout: float, target: str, seed: int
) -> dict[str, LoRALinear]:
    """Freeze `model` and put LoRA on the linear layers that `target` names; returns them by their full names.

    target: `all` for every linear layer of the blocks (never the head), or comma-separated names such as
    `q_proj,v_proj`. Raises ValueError for a name that no layer has.
    """
    model.requires_grad_(False)
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"
    }
    leaves = {name: name.rpartition(".")[2] for name in linear}
    wanted = set(leaves.values()) if target == "all" else {part.strip() for part in target.split(",")}
    unknown = wanted - set(leaves.values())
    if unknown:
        choices = ", ".join(sorted(set(leaves.values())))
        raise ValueError(f"lora_target={target}: no linear layer is {sorted(unknown)[0]!r}; choose all or {choices}")
    generator = torch.Generator().manual_seed(seed)
    for name, leaf in leaves.items():
        if leaf in wanted:
            layer = LoRALinear(linear[name], rank, alpha, dropout, generator)
            setattr(model.get_submodule(name.rpartition(".")[0]), leaf, layer)
    return lora_layers(model)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name: `LAYER.lora_A`, `LAYER.lora_B`."""
    layers = lora_layers(model).items()
    return {f"{name}.{part}": getattr(layer, part) for name, layer in layers for part in ("lora_A", "lora_B")}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A frozen copy of the adapter as it is now, for `using_adapter`."""
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}


@contextmanager
def using_adapter(model: nn.Module, tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the block the model computes with these adapter tensors; with None, as the base model."""
    layers = lora_layers(model)
    # Looked up before any layer changes, so that a missing tensor leaves the model as it was.
    given = {n: None if tensors is None else (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"]) for n in layers}
    outer = {name: (layer.substitute, layer.substituted) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.substitute, layer.substituted = given[name], True
        yield
    finally:
        for name, layer in layers.items():
            layer.substitute, layer.substituted = outer[name]


def adapters_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block the model is the base model, bit for bit."""
    return using_adapter(model, None)


def save_adapter(model: Transformer, target_dir: Path, *, base_model: str, dropout: float) -> None:
    """Write the adapter in PEFT's format: adapter_model.safetensors and adapter_config.json."""
    target_dir.mkdir(parents=True, exist_ok=True)
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    rank = first.lora_A.shape[0]
    write_tensors(
        target_dir / ADAPTER_WEIGHTS,
        {f"{PEFT_PREFIX}{name}.weight": tensor for name, tensor in adapter_tensors(model).items()},
    )
    alpha = round(first.scaling * rank, 9)
    config = PEFT_REQUIRED | {
        "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": dropout, "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}), "init_lora_weights": True,
    }  # fmt: skip
    (target_dir / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter_config(adapter_dir: Path) -> dict:
    """adapter_config.json, checked: ValueError names what is missing, malformed or not computed here."""
    path = adapter_dir / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: no such file; adapter_name_or_path must be a directory in PEFT's format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a LoRA adapter_config.json ({error!r})") from None
    for key, value in PEFT_REQUIRED.items():
        given = config.get(key, value)
        if given != value and (given or value):
            raise ValueError(f"{path}: {key}={given!r} is not computed here; only {value!r} is")
    start = config.get("init_lora_weights", True)
    if start not in PEFT_STARTS:
        raise ValueError(f"{path}: init_lora_weights={start!r} changes the base's weights; convert the adapter to LoRA")
    if not isinstance(rank, int) or rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"{path}: r={rank!r}, lora_alpha={alpha}: both must be positive, r a whole number")
    return config | {"lora_alpha": alpha}


def load_adapter(model: Transformer, adapter_dir: Path, *, dropout: float) -> dict[str, LoRALinear]:
    """Inject the PEFT adapter of a directory into `model`; its layers, rank and alpha come from the adapter.

    Raises ValueError naming the file and tensor where the adapter does not fit the model.
    """
    config = read_adapter_config(adapter_dir)
    path = adapter_dir / ADAPTER_WEIGHTS
    stored = read_tensors(path)
    leaves = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in stored}
    if not leaves - {""}:
        raise ValueError(f"{path}: holds no lora_A and lora_B tensors")
    target = ",".join(sorted(leaves))
    try:
        inject_lora(model, rank=config["r"], alpha=config["lora_alpha"], dropout=dropout, target=target, seed=0)
    except ValueError as error:
        raise ValueError(f"{path}: does not fit the model ({error})") from None
    parameters = adapter_tensors(model)
    wanted = {f"{PEFT_PREFIX}{name}.weight" for name in parameters}
    for kind, names in (("missing", wanted - stored.keys()), ("unexpected", stored.keys() - wanted)):
        if names:
            raise ValueError(f"{path}: tensor {sorted(names)[0]} is {kind}; is this adapter of another base model?")
    for name, parameter in parameters.items():
        tensor = stored[f"{PEFT_PREFIX}{name}.weight"]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the model asks for {tuple(parameter.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}; expected float32, bfloat16 or float16")
        parameter.data.copy_(tensor)
    return lora_layers(model)

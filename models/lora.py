"""LoRA by hand: y = x W^T + (alpha / r) dropout(x) A^T B^T with W frozen (Hu et al. 2021, arXiv:2106.09685, Eq. 3).

A (r x in) starts random, B (out x r) at zero, so an injected model is the base model bit for bit until its first step.
A and B are float32 whatever the base's dtype: at a learning rate of 5e-7 bfloat16 would round most updates away. They
are cast to the dtype of x where they multiply. With use_rslora alpha / sqrt(r) stands for alpha / r: an update keeps
its size when r grows (Kalajdzievski 2023, arXiv:2312.03732).

`using_adapter` computes with other adapter weights for the length of a block: a snapshot of an earlier adapter, or none
at all. Both of DPO's cheap references are that one mechanism. `merge` folds the adapter into W. Adapters are stored in
PEFT's format, both ways. Left out: DoRA, biases, per-layer ranks, adapters on embeddings or the head; they are refused
by name.

Shapes: R rank, I inputs and O outputs of a layer.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import read_json
from models.low_rank import low_rank_linear
from models.transformer import Linear, Transformer
from models.weights import read_tensors, write_tensors

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# adapter_config.json's keys that change what an adapter computes, with the one value that is computed here.
PEFT_REQUIRED = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None,
    "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None, "trainable_token_indices": None,
    "lora_bias": False, "target_parameters": None, "use_qalora": False, "alora_invocation_tokens": None,
    "use_bdlora": None, "arrow_config": None, "kasa_config": None, "velora_config": None, "monteclora_config": None,
}  # fmt: skip
# The starts that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change them.
PEFT_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class LoRALinear(Linear):
    """A Linear whose weight is frozen and which adds a low-rank product; takes over the weight of `base`."""

    def __init__(
        self, base: Linear, rank: int, alpha: float, dropout: float, use_rslora: bool, generator: torch.Generator
    ):
        nn.Module.__init__(self)
        self.weight, self.bias, self.packed = base.weight, base.bias, None
        out_features, in_features = base.weight.shape
        # The range of PEFT's and loralib's kaiming_uniform_(a=sqrt(5)): +-1/sqrt(in).
        bound = 1 / math.sqrt(in_features)
        start_RI = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start_RI.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=base.weight.device))
        self.alpha, self.use_rslora = alpha, use_rslora
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = dropout
        self.substitute: tuple[Tensor, ...] | None = None
        """(A, B) to compute with instead of lora_A and lora_B; () for neither."""

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        adapter = (self.lora_A, self.lora_B) if self.substitute is None else self.substitute
        if not adapter:
            return y
        A_RI, B_OR = (t.to(x.dtype) for t in adapter)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return y + F.linear(F.linear(x, A_RI), B_OR) * self.scaling

    def together(self, x: Tensor, layers: Sequence[Linear]) -> list[Tensor] | None:
        """By models.low_rank, where all layers are adapted, frozen, and see the same input."""
        adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
        adapters = [adapter for adapter in (layer.adapter_of(x) for layer in adapted) if adapter]
        if len(adapters) < len(layers):
            return None
        As, Bs = zip(*adapters, strict=True)
        weights, biases = [layer.weight for layer in adapted], [layer.bias for layer in adapted]
        return low_rank_linear(x, weights, biases, As, Bs, [layer.scaling for layer in adapted])

    def adapter_of(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """(A, B) as they are added to this input; None where there are none, or each layer would see its own."""
        adapter = (self.lora_A, self.lora_B) if self.substitute is None else self.substitute
        dropping = self.dropout and self.training
        frozen = self.weight.dtype == x.dtype and not self.weight.requires_grad and x.ndim == 2
        return adapter if adapter and frozen and not dropping else None


def inject_lora(
    model: Transformer, *, rank: int, alpha: float, dropout: float, use_rslora: bool, target: str, seed: int
) -> dict[str, LoRALinear]:
    """Freeze `model` and put LoRA on the linear layers that `target` names; returns them by their full names.

    target: `all` for every linear layer of the blocks (never the head), or comma-separated names or ends of names:
    `q_proj,v_proj`, `self_attn.q_proj`, `layers.0.mlp.up_proj`. Raises ValueError for one that no layer has.
    """
    model.requires_grad_(False)
    linear = linear_layers(model)
    wanted = {part.strip() for part in target.split(",")}
    unknown = wanted.difference(*map(endings, linear)) if target != "all" else set()
    if unknown:
        choices = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(
            f"lora_target={target}: no linear layer is {sorted(unknown)[0]!r}; choose all or {choices}, or a longer "
            f"end of a name like {next(iter(linear))}"
        )
    generator = torch.Generator().manual_seed(seed)
    for name, base in linear.items():
        if target == "all" or wanted & endings(name):
            _replace(model, name, LoRALinear(base, rank, alpha, dropout, use_rslora, generator))
    return lora_layers(model)


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """What can be adapted, by name: the linear layers of the blocks, not the head."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, Linear) and name != "lm_head"}


def endings(name: str) -> set[str]:
    """{a.b.c, b.c, c} of a.b.c: whatever PEFT's target_modules may call a layer."""
    return {name.split(".", i)[-1] for i in range(name.count(".") + 1)}


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)


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
    given = {n: () if tensors is None else (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"]) for n in layers}
    outer = {name: layer.substitute for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.substitute = given[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.substitute = outer[name]


def adapters_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block the model is the base model, bit for bit."""
    return using_adapter(model, None)


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Make an adapted model a plain one: W <- W + scaling B A, in float32 at least and rounded once to W's dtype.

    In float32 the merged model computes what the adapted one did. bfloat16 has 8 bits: there an update that is small
    beside its weight is lost in part, and models.export measures how much that costs.
    """
    for name, layer in lora_layers(model).items():
        W_OI = layer.weight
        wide = torch.promote_types(W_OI.dtype, torch.float32)
        update_OI = layer.scaling * (layer.lora_B.to(wide) @ layer.lora_A.to(wide))
        with torch.device("meta"):
            merged = Linear(W_OI.shape[1], W_OI.shape[0], bias=False)
        merged.weight = nn.Parameter((W_OI.to(wide) + update_OI).to(W_OI.dtype), requires_grad=False)
        merged.bias = layer.bias
        _replace(model, name, merged)


def save_adapter(model: Transformer, target_dir: Path, *, base_model: str, dropout: float) -> None:
    """Write the adapter in PEFT's format: adapter_model.safetensors and adapter_config.json."""
    target_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(
        target_dir / ADAPTER_WEIGHTS,
        {f"{PEFT_PREFIX}{name}.weight": tensor for name, tensor in adapter_tensors(model).items()},
    )
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    leaves = {name.rpartition(".")[2] for name in layers}
    everywhere = all(name in layers for name in linear_layers(model) if name.rpartition(".")[2] in leaves)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": first.lora_A.shape[0], "lora_alpha": int(first.alpha) if first.alpha == int(first.alpha) else first.alpha,
        "lora_dropout": dropout, "use_rslora": first.use_rslora, "init_lora_weights": True,
        "target_modules": sorted(leaves if everywhere else layers),
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False,
    }  # fmt: skip
    (target_dir / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter_config(adapter_dir: Path) -> dict:
    """adapter_config.json, checked: ValueError names what is missing, malformed or not computed here."""
    path = adapter_dir / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: no such file; adapter_name_or_path must be a directory in PEFT's format")
    try:
        config = read_json(path)
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
    return config | {"lora_alpha": alpha, "use_rslora": bool(config.get("use_rslora"))}


def load_adapter(model: Transformer, adapter_dir: Path, *, dropout: float) -> dict[str, LoRALinear]:
    """Inject the PEFT adapter of a directory into `model`; its layers, rank and alpha come from the adapter.

    Raises ValueError naming the file and tensor where the adapter does not fit the model.
    """
    config = read_adapter_config(adapter_dir)
    path = adapter_dir / ADAPTER_WEIGHTS
    stored = read_tensors(path)
    if not stored:
        raise ValueError(f"{path}: holds no lora_A and lora_B tensors")
    linear = linear_layers(model)
    layer_of = {f"{PEFT_PREFIX}{name}.lora_{part}.weight": name for name in linear for part in "AB"}
    unexpected = sorted(stored.keys() - layer_of.keys())
    if unexpected:
        raise ValueError(
            f"{path}: tensor {unexpected[0]} is unexpected: of this model only the blocks' linear layers are adapted; "
            "is this adapter of another base model?"
        )
    names = {layer_of[name] for name in stored} | _listed_layers(config, linear)
    settings = {"rank": config["r"], "alpha": config["lora_alpha"], "use_rslora": config["use_rslora"]}
    # Before the layers are made: a config may claim a rank that no memory holds.
    for name in sorted(names):
        outputs, inputs = linear[name].weight.shape
        for part, shape in (("lora_A", (config["r"], inputs)), ("lora_B", (outputs, config["r"]))):
            tensor = stored.get(f"{PEFT_PREFIX}{name}.{part}.weight")
            if tensor is None:
                raise ValueError(
                    f"{path}: tensor {name}.{part}.weight is missing; is this adapter of another base model?"
                )
            if tensor.shape != shape:
                raise ValueError(f"{path}: {name}.{part} has shape {tuple(tensor.shape)}, the model asks for {shape}")
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {name}.{part} is {tensor.dtype}; expected float32, bfloat16 or float16")
    inject_lora(model, **settings, dropout=dropout, target=",".join(names), seed=0)
    for name, parameter in adapter_tensors(model).items():
        parameter.data.copy_(stored[f"{PEFT_PREFIX}{name}.weight"])
    return lora_layers(model)


def _listed_layers(config: dict, names: Iterable[str]) -> set[str]:
    """The layers that target_modules lists, all of which a whole file holds.

    None where it is a pattern or has exceptions: there the file itself says which layers it adapts.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    return {name for name in names if endings(name) & set(targets)}

"""ModelConfig: the shape of a Llama or Qwen transformer, read from a Hugging Face config.json.

What differs between the families is data in FAMILIES, not classes. Both config styles are read: `rope_theta` or
`rope_parameters`, `torch_dtype` or `dtype` (weights are converted to the run's dtype, so the stored one is not needed).

A config that asks for something else is refused by key and value, because ignoring it would compute something else
without a word: dynamic rope (it would make a result depend on the batch it was computed in), vision and audio towers,
linear-attention layers, quantised weights, attention dropout.
"""

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a model_type adds to the one transformer, and which switches of its config.json are read."""

    qkv_bias: bool = False
    """q, k and v always have a bias."""
    qk_norm: bool = False
    """queries and keys are normalised per head."""
    bias_keys: tuple[str, ...] = ()
    """attention_bias: a bias on q, k, v and o; mlp_bias: on the three of the MLP."""
    window: str | None = None
    """where sliding_window holds: `all` layers, or `late`, those from max_window_layers on."""
    window_switch: str | None = None
    """the key that turns sliding_window on; None: it is on where it is a number."""
    experts: bool = False
    """the MLP may be a mixture of experts."""


# Sources: the families' released configs and modelling code.
FAMILIES = {
    "llama": Family(bias_keys=("attention_bias", "mlp_bias")),
    "mistral": Family(window="all"),
    "qwen2": Family(qkv_bias=True, window="late", window_switch="use_sliding_window"),
    "qwen3": Family(
        qk_norm=True, bias_keys=("attention_bias",), window="late", window_switch="use_sliding_window"
    ),
    "qwen3_moe": Family(
        qk_norm=True, bias_keys=("attention_bias",), window="all", window_switch="use_sliding_window", experts=True
    ),
}  # fmt: skip
# rope_type: the numbers that it needs, and those with a value where the config is silent (None: see models.rope).
ROPE_TYPES: dict[str, tuple[tuple[str, ...], dict[str, float | None]]] = {
    "default": ((), {}),
    "linear": (("factor",), {}),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), {}),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None},
    ),
}
# Keys that change what a model computes, with the values at which they change nothing.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "vision_config": (None,),
    "audio_config": (None,),
    "use_mrope": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
}

MAX_JSON = 4 << 20  # an index takes about 95 bytes per tensor: 3.5 MB for the 37,000 of Qwen3-235B


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one transformer; fields are named as in config.json where it has them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any]
    """rope_type and its own settings; {"rope_type": "default"} where nothing is scaled."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    """how many tokens, its own included, a token sees in sliding_layers; elsewhere it sees all before it."""
    sliding_layers: Collection[int]
    num_experts: int
    """0: no layer has experts."""
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    expert_layers: Collection[int]
    """layers whose MLP is a mixture of experts, unless they are among mlp_only_layers."""
    mlp_only_layers: Collection[int]

    def window(self, layer: int) -> int | None:
        return self.sliding_window if layer in self.sliding_layers else None

    def has_experts(self, layer: int) -> bool:
        return layer in self.expert_layers and layer not in self.mlp_only_layers


def read_model_config(model_dir: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory.

    Raises ValueError naming the file, the key and its value where the config is missing, malformed, or asks for
    something this transformer does not compute.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; model_name_or_path must be a directory in Hugging Face's format")
    raw = read_json(path)
    try:
        return parse_model_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file of at most 4 MB; ValueError names the file where it is not one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"longer than {MAX_JSON} bytes")
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """The words of an error that may quote a file: without line ends, and without the middle where they are long."""
    words = " ".join(str(error).split())
    return words if len(words) <= 400 else f"{words[:200]} ... {words[-200:]}"


def parse_model_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a parsed config.json; ValueError as in read_model_config, without the path."""
    if not isinstance(raw, dict):
        raise ValueError(f"holds a {type(raw).__name__}, expected an object")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: unknown architecture; expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for key, values in ONLY.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{key}={raw[key]!r}: not computed here; only {values[0]!r} is")
    layers = _integer(raw, "num_hidden_layers")
    heads = _integer(raw, "num_attention_heads")
    # Where the key is missing, transformers takes heads for Llama, and a number of its own for the other families.
    may_be_missing = model_type == "llama" or "num_key_value_heads" in raw
    kv_heads = _integer(raw, "num_key_value_heads", default=heads if may_be_missing else None)
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
    hidden_size = _integer(raw, "hidden_size")
    head_dim = _integer(raw, "head_dim", default=None if model_type == "qwen3" else max(1, hidden_size // heads))
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: must be even, rotary embedding turns pairs")
    attention_bias, mlp_bias = (key in family.bias_keys and _switch(raw, key) for key in ("attention_bias", "mlp_bias"))
    theta, scaling = _rope(raw)
    window, sliding_layers = _sliding(raw, family, layers)
    return ModelConfig(
        model_type=model_type,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive(raw, "rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_integer(raw, "max_position_embeddings", default=2048),
        tie_word_embeddings=_switch(raw, "tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=sliding_layers,
        **(_experts(raw, layers) if family.experts else NO_EXPERTS),
    )


def _sliding(raw: dict[str, Any], family: Family, layers: int) -> tuple[int | None, Collection[int]]:
    """(sliding_window, the layers in which it holds)."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise ValueError(f"layer_types={kinds!r}: expected a list")
        strange = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
        if strange or len(kinds) != layers:
            given = f"with {strange[0]!r}" if strange else f"of {len(kinds)} layers, num_hidden_layers={layers}"
            raise ValueError(f"layer_types {given}: expected full_attention or sliding_attention for every layer")
    if family.window is None or (family.window_switch and not _switch(raw, family.window_switch)):
        if kinds is not None and "sliding_attention" in kinds:
            raise ValueError("layer_types with 'sliding_attention': the config does not turn sliding_window on")
        return None, ()
    if "sliding_window" not in raw:
        raise ValueError("sliding_window: missing, which means 4096 to transformers; write null for full attention")
    if raw["sliding_window"] is None:
        return None, ()
    window = _integer(raw, "sliding_window")
    if family.window == "all":
        return window, range(layers)
    if kinds is not None:
        return window, [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    return window, range(_integer(raw, "max_window_layers", default=28, least=0), layers)


NO_EXPERTS = {
    "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "norm_topk_prob": False,
    "expert_layers": (), "mlp_only_layers": (),
}  # fmt: skip


def _experts(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    # transformers 5 writes num_local_experts.
    experts = _integer(raw, "num_experts", default=raw.get("num_local_experts"))
    per_token = _integer(raw, "num_experts_per_tok")
    if per_token > experts:
        raise ValueError(f"num_experts_per_tok={per_token}: there are only num_experts={experts}")
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"mlp_only_layers={dense!r}: expected a list of layers")
    step = _integer(raw, "decoder_sparse_step", default=1)
    return {
        "num_experts": experts, "num_experts_per_tok": per_token,
        "moe_intermediate_size": _integer(raw, "moe_intermediate_size"),
        "norm_topk_prob": _switch(raw, "norm_topk_prob"),
        "expert_layers": range(step - 1, layers, step), "mlp_only_layers": dense,
    }  # fmt: skip


def _rope(raw: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """(rope_theta, scaling settings) from either config style."""
    key = "rope_scaling" if raw.get("rope_parameters") is None else "rope_parameters"
    given = {} if raw.get(key) is None else raw[key]
    if not isinstance(given, dict):
        raise ValueError(f"{key}={given!r}: expected an object")
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{key}: {nested[0]!r} has settings of its own; one rotary embedding serves every layer here")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"rope_type={kind!r}: this project computes {', '.join(ROPE_TYPES)}")
    for name, only in {"partial_rotary_factor": 1, "truncate": True}.items():
        if given.get(name, only) != only:
            raise ValueError(f"{name}={given[name]!r}: not computed here; only {only!r} is")
    theta = _positive(given if "rope_theta" in given else raw, "rope_theta", default=10000.0)
    if kind == "yarn" and theta <= 1:
        raise ValueError(f"rope_theta={theta}: must be above 1 with yarn")
    needed, optional = ROPE_TYPES[kind]
    silent = {name: value for name, value in optional.items() if given.get(name) is None}
    return theta, {"rope_type": kind, **silent} | {
        name: _positive(given, name) for name in (*needed, *optional) if name not in silent
    }


def _integer(raw: dict[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise ValueError(f"{key}={value!r}: expected a whole number, at least {least} and below 2^31")
    return value


def _switch(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: expected true or false")
    return value


def _positive(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key}={value!r}: expected a positive number")
    return float(value)

"""ModelConfig: the shape of a Llama or Qwen transformer, read from a Hugging Face config.json.

What differs between the families is data in FAMILIES, not classes: which projections carry a bias and whether queries
and keys are normalised per head. Both config styles are read: `rope_theta` or `rope_parameters`, `torch_dtype` or
`dtype` (weights are converted to the run's dtype, so the stored one is not needed).

Left out: sliding-window layers, mixtures of experts and the rope scalings other than `default`, `linear` and `llama3`;
a config that asks for one of them is refused, because ignoring it would compute something else without a word.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# model_type: (q/k/v bias, q/k norm) where config.json does not say. Sources: the families' modelling code and configs.
FAMILIES: dict[str, tuple[bool, bool]] = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}
# rope_type: the numbers that it reads.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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


def read_model_config(model_dir: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory.

    Raises ValueError naming the file, the key and its value where the config is missing, malformed, or asks for
    something this transformer does not compute.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; model_name_or_path must be a directory in Hugging Face's format")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    try:
        return parse_model_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_model_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a parsed config.json; ValueError as in read_model_config, without the path."""
    if not isinstance(raw, dict):
        raise ValueError(f"holds a {type(raw).__name__}, expected an object")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: unknown architecture; expected one of {', '.join(FAMILIES)}")
    _refuse_what_is_not_computed(raw, model_type)
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
    qkv_bias, qk_norm = FAMILIES[model_type]
    # Qwen2 always has the q/k/v bias; Llama's and Qwen3's attention_bias puts one on all four projections.
    attention_bias = model_type in ("llama", "qwen3") and bool(raw.get("attention_bias", False))
    theta, scaling = _rope(raw)
    return ModelConfig(
        model_type=model_type,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_hidden_layers=_integer(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive(raw, "rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_integer(raw, "max_position_embeddings", default=2048),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=model_type == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=qk_norm,
    )


def _refuse_what_is_not_computed(raw: dict[str, Any], model_type: str) -> None:
    if raw.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights are not read; use the unquantised checkpoint")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={raw['hidden_act']!r}: the MLP computes silu only")
    # Qwen's configs carry a sliding_window that use_sliding_window switches on; Mistral's is on where it is a number.
    if model_type == "mistral" and "sliding_window" not in raw:
        raise ValueError("sliding_window: missing, which means 4096 to a Mistral; write null for full attention")
    window = raw.get("sliding_window")
    if window is not None and (model_type == "mistral" or raw.get("use_sliding_window", False)):
        raise ValueError(f"sliding_window={window}: sliding-window attention is not computed")


def _rope(raw: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """(rope_theta, scaling settings) from either config style."""
    key = "rope_scaling" if raw.get("rope_parameters") is None else "rope_parameters"
    given = {} if raw.get(key) is None else raw[key]
    if not isinstance(given, dict):
        raise ValueError(f"{key}={given!r}: expected an object")
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{key}: {nested[0]} has settings of its own; one rotary embedding serves every layer here")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"rope_type={kind!r}: this project computes {', '.join(ROPE_TYPES)}")
    theta = _positive(given if "rope_theta" in given else raw, "rope_theta", default=10000.0)
    return theta, {"rope_type": kind} | {name: _positive(given, name) for name in ROPE_TYPES[kind]}


def _integer(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key}={value!r}: expected a positive whole number")
    return value


def _positive(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}: expected a positive number")
    return float(value)

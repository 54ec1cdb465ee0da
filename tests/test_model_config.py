"""config.json is read as transformers reads it, in both styles, or refused by key and value."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.config import ModelConfig, parse_model_config, read_model_config
from models.transformer import Transformer

TINY = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 77,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def without(*keys: str) -> dict:
    return {key: value for key, value in TINY.items() if key not in keys}


def shapes_here(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config, torch.float32).named_parameters()}


def shapes_of_transformers(raw: dict) -> dict[str, tuple[int, ...]]:
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **settings))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


# --- what is read ---


def test_every_size_keeps_its_key_and_value():
    config = parse_model_config(TINY)
    assert {key: getattr(config, key) for key in TINY} == TINY


def test_both_styles_of_config_say_the_same():
    old = TINY | {"rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    new = without("rope_theta") | {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}, "dtype": "bfloat16"}
    assert parse_model_config(old) == parse_model_config(new)
    assert parse_model_config(old).rope_scaling == LLAMA3


@pytest.mark.parametrize("nothing", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_rope_is_unscaled_when_nothing_scales_it(nothing):
    config = parse_model_config(TINY | nothing)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, {"rope_type": "default"})


def test_rope_scaling_may_be_called_type():
    config = parse_model_config(TINY | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_silent_keys_are_what_transformers_makes_of_them():
    """No grouped heads, heads that share the width, eps 1e-6, theta 10000, untied."""
    raw = without("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    config, theirs = parse_model_config(raw), AutoConfig.for_model(**raw)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(theirs, key)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("model_type", "key", "theirs"),
    [("qwen3", "head_dim", 128), ("qwen2", "num_key_value_heads", 32), ("mistral", "num_key_value_heads", 8)],
)
def test_a_silent_key_is_refused_where_transformers_takes_a_number_of_its_own(model_type, key, theirs):
    raw = without(key) | {"model_type": model_type, "sliding_window": None}
    assert getattr(AutoConfig.for_model(**raw), key) == theirs
    with pytest.raises(ValueError, match=f"{key}=None"):
        parse_model_config(raw)


@pytest.mark.parametrize("changes", [{"model_type": "mistral"}, {"model_type": "qwen2", "use_sliding_window": True}])
def test_a_config_that_is_silent_about_its_window_is_refused(changes):
    """transformers takes 4096."""
    assert AutoConfig.for_model(**TINY | changes).sliding_window == 4096
    with pytest.raises(ValueError, match="sliding_window: missing"):
        parse_model_config(TINY | changes)


SLIDING = {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 9}, (None, None)),
        ({"model_type": "mistral", "sliding_window": 9}, (9, 9)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None)),
        (SLIDING | {"max_window_layers": 1}, (None, 9, 9)),
        (SLIDING | {"max_window_layers": 0}, (9, 9, 9)),
        (SLIDING, (None, None, None)),  # transformers' max_window_layers is 28
        (SLIDING | {"use_sliding_window": False, "max_window_layers": 1}, (None, None, None)),
        (SLIDING | {"sliding_window": None, "max_window_layers": 1}, (None, None, None)),
        (SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, (9, None, 9)),
        (SLIDING | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
         (9, 9, 9)),
    ],
)  # fmt: skip
def test_windows_by_hand(changes, windows):
    config = parse_model_config(TINY | changes)
    assert tuple(config.window(layer) for layer in range(config.num_hidden_layers)) == windows


MOE = {"model_type": "qwen3_moe", "num_hidden_layers": 5, "num_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"mlp_only_layers": [1, 4]}, {0, 2, 3}),
        ({"decoder_sparse_step": 2}, {1, 3}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1}),
    ],
)
def test_layers_with_experts_by_hand(changes, layers):
    config = parse_model_config(TINY | MOE | changes)
    assert {layer for layer in range(config.num_hidden_layers) if config.has_experts(layer)} == layers


def test_yarn_is_read_with_its_papers_values_where_it_is_silent():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_model_config(TINY | {"rope_scaling": yarn | {"beta_fast": 16}})
    assert config.rope_scaling == yarn | {
        "beta_fast": 16.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "attention_bias": True},
        {"model_type": "llama", "mlp_bias": True},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": None, "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "attention_bias": False, "sliding_window": 9, "use_sliding_window": False},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "attention_bias": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_parameters_have_the_names_and_shapes_of_transformers(changes, tied):
    raw = TINY | {"tie_word_embeddings": tied} | changes
    assert shapes_here(parse_model_config(raw)) == shapes_of_transformers(raw)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'.*expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
        ({"vocab_size": 0}, "vocab_size=0: expected a whole number, at least 1"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"intermediate_size": 2.5}, r"intermediate_size=2\.5"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
        ({"num_attention_heads": -6}, "num_attention_heads=-6"),
        ({"max_position_embeddings": True}, "max_position_embeddings=True"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4: must divide num_attention_heads=6"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0: expected a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*bits.*: not computed here"),
        ({"model_type": "qwen3_next"}, "model_type='qwen3_next'"),
        ({"vision_config": {"depth": 2}}, "vision_config={'depth': 2}: not computed here; only None is"),
        ({"audio_config": {}}, "audio_config={}"),
        ({"use_mrope": True}, "use_mrope=True: not computed here; only False is"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1: not computed here; only 0 is"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"attention_bias": "true"}, "attention_bias='true': expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: expected true or false"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types with 'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types of 1 layers, num_hidden_layers=2"),
        ({"layer_types": 7}, "layer_types=7: expected a list"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "does not turn sliding_window on"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        (SLIDING | {"max_window_layers": -1}, "max_window_layers=-1"),
        (MOE | {"num_experts": None}, "num_experts=None"),
        (MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok=5: there are only num_experts=4"),
        (MOE | {"mlp_only_layers": 3}, "mlp_only_layers=3: expected a list"),
        (MOE | {"mlp_only_layers": ["0"]}, r"mlp_only_layers=\['0'\]: expected a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_is_not_computed_is_refused_by_key_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_model_config(TINY | changes)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0: expected a positive number"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6'"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'.*default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        (
            {
                "rope_theta": 1.0,
                "rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8},
            },
            r"rope_theta=1\.0: must be above 1 with yarn",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings=None"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"rope_scaling": {"rope_type": "yarn", "truncate": False}}, "truncate=False"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": 2}, "rope_scaling=2"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor=None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": "1"}}, "low_freq_factor='1'"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "full_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rope_settings_that_cannot_be_computed_are_refused_by_key_and_value(rope, message):
    with pytest.raises(ValueError, match=message):
        parse_model_config(TINY | rope)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; model_name_or_path must be a directory"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "holds a list, expected an object"),
        (json.dumps(TINY | {"head_dim": 7}).encode(), "head_dim=7"),
    ],
)
def test_an_unreadable_config_is_refused_with_its_path(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_model_config(tmp_path)
    assert str(refused.value).startswith(f"{path}: ")


# --- real configs ---


@pytest.mark.real
def test_real_configs_have_the_parameters_of_transformers_at_full_size(real):
    """By name and shape, but for experts, which transformers keep in one tensor. `pytest -s` prints the counts."""
    paths = sorted((real / "configs").glob("*.json"))
    assert len(paths) >= 14
    for path in paths:
        raw = json.loads(path.read_text())
        ours, theirs = shapes_here(parse_model_config(raw)), shapes_of_transformers(raw)
        counts = [sum(math.prod(shape) for shape in shapes.values()) for shapes in (ours, theirs)]
        print(f"{path.stem:32s} {counts[0]:>14,d} {counts[1]:>14,d}")
        assert counts[0] == counts[1], path.name
        ours, theirs = ({k: v for k, v in s.items() if ".experts." not in k} for s in (ours, theirs))
        assert ours == theirs, path.name

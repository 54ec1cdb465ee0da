"""The transformer equals transformers' for every family, in value and gradient, packed or not.

Shapes: T tokens, R response tokens, D width, V vocabulary.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from models.config import parse_model_config
from models.stream import Stream, pack
from models.transformer import RMSNorm, Transformer
from models.weights import load_model

SIZES = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-llama3-rope": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-linear-rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-one-key-head": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-yarn-rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 3},
    "qwen2-late-window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    },
    "qwen3-listed-window": {
        "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 2, "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True,
        "moe_intermediate_size": 20,
    },
    "qwen3-moe-half-dense": {
        "model_type": "qwen3_moe", "head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "moe_intermediate_size": 20, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 3,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 14, "tie_word_embeddings": True},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
}  # fmt: skip
PROMPTS = [[5, 9, 2, 7, 36, 1], [3], [8, 8, 30, 4]]
RESPONSES = [[[6, 2, 5], [11, 12, 13, 14, 15]], [[1, 1]], [[], [20, 21, 22], [7], [9, 35]]]

Pair = tuple[PreTrainedModel, Path]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Pair:
    """A random model of transformers, and the directory that its own save_pretrained wrote."""
    return build(request.param, tmp_path_factory.mktemp(request.param))


def build(family: str, where: Path) -> Pair:
    return random_model(SIZES | FAMILIES[family], where), where


def random_model(raw: dict, where: Path) -> PreTrainedModel:
    """A random model of transformers, saved by its own save_pretrained."""
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**raw),
        dtype=torch.float32,
        experts_implementation="eager",  # their other one has no float64
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Large enough for attention to be sharp, and no bias at zero nor norm at one: those would hide mistakes.
            std = min(0.3, 2 / parameter.shape[-1] ** 0.5)
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    theirs.save_pretrained(where)
    return theirs.eval()


def load(where: Path, dtype: torch.dtype = torch.float32, **options) -> Transformer:
    return load_model(where, dtype=dtype, device=torch.device("cpu"), **options)


def logits_of(model: Transformer, stream: Stream) -> Tensor:
    return model(stream) @ model.head_weight_VD.to(model.dtype).T


def their_response_logits(theirs: PreTrainedModel) -> Tensor:
    """(R, V) logits that predict each response token, from one unpacked row per branch."""
    rows = []
    for prompt, branches in zip(PROMPTS, RESPONSES, strict=True):
        for response in branches:
            logits_TV = theirs(torch.tensor([prompt + response])).logits[0]
            rows.append(logits_TV[len(prompt) - 1 : len(prompt) + len(response) - 1])
    return torch.cat(rows)


def assert_close_to_largest(ours: Tensor, theirs: Tensor, share: float) -> None:
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


# --- against transformers ---


@torch.no_grad()
def test_logits_of_one_row_equal_transformers(pair):
    """To 1e-5 of the largest: float32 rounds to 6e-8, a sum over 32 to 48 terms and two layers to some 1e-6."""
    theirs, where = pair
    row = [token for prompt in PROMPTS for token in prompt] * 3
    assert_close_to_largest(logits_of(load(where), pack([row], [[]])), theirs(torch.tensor([row])).logits[0], 1e-5)


@torch.no_grad()
def test_packed_logits_equal_transformers_row_by_row(pair):
    theirs, where = pair
    stream = pack(PROMPTS, RESPONSES)
    ours_RV = logits_of(load(where), stream)[stream.predictor_R]
    assert_close_to_largest(ours_RV, their_response_logits(theirs), 1e-5)


def test_gradient_of_the_input_embedding_equals_transformers(pair):
    """In float64, to 1e-5 of the largest: transformers computes its norms and angles in float32 even there."""
    theirs, where = pair
    ours, theirs = load(where, torch.float64), theirs.double()
    stream = pack(PROMPTS, RESPONSES)
    weight_RV = torch.randn(len(stream.target_R), SIZES["vocab_size"], dtype=torch.float64)
    embedding_VD = ours.model.embed_tokens.weight.requires_grad_()
    (logits_of(ours, stream)[stream.predictor_R] * weight_RV).sum().backward()
    theirs.zero_grad()
    (their_response_logits(theirs) * weight_RV).sum().backward()
    theirs.float()
    assert_close_to_largest(embedding_VD.grad, theirs.model.embed_tokens.weight.grad, 1e-5)


def test_every_parameter_has_the_gradient_of_transformers(tmp_path):
    """The family with every kind of weight but the q/k norms, whose checks above cover them; float32 to 1e-4."""
    theirs, where = build("llama-biases", tmp_path)
    ours = load(where).requires_grad_()
    stream = pack(PROMPTS, RESPONSES)
    logits_of(ours, stream)[stream.predictor_R].sin().sum().backward()
    their_response_logits(theirs).sin().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close_to_largest(parameter.grad, expected[name].grad, 1e-4)


# --- laws of its own ---


def test_float64_is_float64_throughout(tmp_path):
    """gradcheck's finite differences of 1e-6 would drown in the rounding of any float32 in between."""
    model = load(build("qwen3", tmp_path)[1], torch.float64)
    stream = pack([[5, 9]], [[[6], [11, 12]]])

    def hidden(embedding_VD: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"model.embed_tokens.weight": embedding_VD}, (stream,))

    embedding_VD = model.model.embed_tokens.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(hidden, embedding_VD, fast_mode=True)


def test_gradient_checkpointing_computes_blocks_twice_and_the_same_gradients(tmp_path):
    where = build("qwen2", tmp_path)[1]
    stream, gradients = pack(PROMPTS, RESPONSES), []
    for checkpointing, calls_expected in ((False, 1), (True, 2)):
        model = load(where, gradient_checkpointing=checkpointing).requires_grad_()
        calls = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(stream).sin().sum().backward()
        assert len(calls) == calls_expected
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.no_grad()
def test_float32_masters_compute_as_their_bfloat16_copies(tmp_path):
    """A weight is cast where it is used, so a bfloat16 run of wide weights is the run of narrow ones, bit for bit."""
    where = build("qwen3-biases", tmp_path)[1]
    narrow, wide = load(where, torch.bfloat16), load(where)
    wide.dtype = torch.bfloat16
    stream = pack(PROMPTS, RESPONSES)
    assert narrow(stream).dtype == torch.bfloat16
    assert torch.equal(narrow(stream), wide(stream))


def test_rms_norm_by_hand():
    """x = (3, 4): mean square 12.5, plus eps 12.5 makes 25; x / 5 times the weight (10, 1)."""
    norm = RMSNorm(2, eps=12.5)
    norm.weight.data = torch.tensor([10.0, 1.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([6.0, 0.8]))


def test_rms_norm_of_bfloat16_computes_in_float32():
    """So its only rounding is the last one, to the same bits as rounding the float64 result."""
    x = torch.randn(7, 65, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(65, eps=1e-6)
    norm.weight.data = torch.ones(65)
    assert torch.equal(norm(x), norm(x.double()).bfloat16())


def test_tied_models_have_one_embedding():
    config = parse_model_config(SIZES | FAMILIES["llama-tied"])
    with torch.device("meta"):
        model = Transformer(config, torch.float32)
    assert model.head_weight_VD is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


# --- real weights ---


def shrunk(raw: dict) -> dict:
    """A real config with its family settings, two layers, few and narrow heads, and a window short enough to show."""
    raw = dict(raw, num_hidden_layers=2, vocab_size=101, intermediate_size=80)
    head_dim = raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    share = raw["num_attention_heads"] // raw["num_key_value_heads"]
    raw |= {"num_key_value_heads": 2, "num_attention_heads": 2 * share}
    raw["hidden_size"] = 48 if "head_dim" in raw else 2 * share * head_dim
    if raw.get("sliding_window"):
        raw["sliding_window"] = 9
    return raw | ({"num_experts": 8, "moe_intermediate_size": 24} if "num_experts" in raw else {})


@torch.no_grad()
def config_differences(raw: dict, where: Path) -> tuple[float, float]:
    """Largest difference over largest logit of a random model, one unpacked row and the packed stream."""
    theirs = random_model(raw, where)
    ours = load(where)
    scaling = ours.config.rope_scaling
    # Half of the positions lie beyond the context that the checkpoint was trained on before its rope was scaled.
    start = int(scaling.get("original_max_position_embeddings", 30)) - 30
    row = [token * 7 % 101 for token in range(60)]
    prompts = [row[:40], row[40:43]]
    one, packed = pack([row], [[]]), pack(prompts, RESPONSES[:2])
    differences = []
    for stream, rows in (
        (one, [(row, slice(None))]),
        (packed, [(x + y, slice(len(x) - 1, -1)) for x, ys in zip(prompts, RESPONSES, strict=False) for y in ys]),
    ):
        logits_TV = logits_of(ours, replace(stream, positions_T=stream.positions_T + start))
        ours_RV = logits_TV if stream is one else logits_TV[stream.predictor_R]
        expected = [
            theirs(torch.tensor([ids]), position_ids=torch.arange(start, start + len(ids))[None]).logits[0, part]
            for ids, part in rows
        ]
        theirs_RV = torch.cat(expected)
        differences.append(((ours_RV - theirs_RV).abs().max() / theirs_RV.abs().max()).item())
    return differences[0], differences[1]


@pytest.mark.real
def test_every_real_config_shrunk_gives_the_logits_of_transformers(real, tmp_path):
    """To 1e-5 of the largest. `pytest -s` prints the table."""
    paths = sorted((real / "configs").glob("*.json"))
    assert len(paths) >= 14
    for path in paths:
        one, packed = config_differences(shrunk(json.loads(path.read_text())), tmp_path / path.stem)
        print(f"{path.stem:32s} one row {one:.1e}  packed {packed:.1e}")
        assert max(one, packed) <= 1e-5, path.stem


@pytest.mark.real
@torch.no_grad()
def test_real_weights_give_the_logits_of_transformers_and_one_set_in_every_float32_format(real):
    """To 1e-5 of the largest; the bfloat16 copy, whose rounded weights are another model, equals itself alone."""
    folder = real / "models" / "stories260K"
    text = (real / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:600]
    story = AutoTokenizer.from_pretrained(folder / "hf")(text)["input_ids"]
    directories = sorted(path for path in folder.iterdir() if path.is_dir())
    assert len(directories) >= 5
    first_TV = logits_of(load(folder / "hf"), pack([story], [[]]))
    for where in directories:
        theirs = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        ours_TV = logits_of(load(where), pack([story], [[]]))
        assert_close_to_largest(ours_TV, theirs(torch.tensor([story])).logits[0], 1e-5)
        if where.name != "hf_bf16":
            assert_close_to_largest(ours_TV, first_TV, 1e-5)


@pytest.mark.real
@torch.no_grad()
def test_a_real_instruct_model_equals_transformers(smollm2):
    """In float32, to 1e-4 of the largest logit: thirty layers of rounding."""
    ours, theirs = load(smollm2), AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    trunk, branches = list(range(1000, 1100, 7)), [[5, 600, 7000], [42] * 9]
    stream = pack([trunk], [branches])
    ours_RV = logits_of(ours, stream)[stream.predictor_R]
    expected = [theirs(torch.tensor([trunk + y])).logits[0, len(trunk) - 1 : -1] for y in branches]
    assert_close_to_largest(ours_RV, torch.cat(expected), 1e-4)

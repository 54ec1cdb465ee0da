"""Rotary embedding: transformers' frequencies, turned pairs, and products that know distances alone.

Shapes: T tokens, H heads, E head dim.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.config import ModelConfig, parse_model_config
from models.rope import frequencies, rotary, rotate

HEAD_DIM = 22
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    # Frequencies of a head of 22 fall on both sides of the blend and inside it: see the test by hand.
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-with-mscale": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 128, "beta_fast": 8.0, "beta_slow": 2.0,
        "mscale": 1.5, "mscale_all_dim": 0.5,
    },
    "yarn-with-attention-factor": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.3,
    },
}  # fmt: skip


def raw_config(scaling: dict, theta: float = 10000.0) -> dict:
    return {
        "model_type": "llama", "vocab_size": 7, "hidden_size": 44, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": HEAD_DIM, "rope_parameters": {"rope_theta": theta, **scaling},
    }  # fmt: skip


def config_of(name: str, theta: float = 10000.0) -> ModelConfig:
    return parse_model_config(raw_config(SCALINGS[name], theta))


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name, theta):
    """In float32 the unscaled ones to the bit, for a bit turns a far position; blends to a few roundings of 6e-8."""
    theirs = LlamaRotaryEmbedding(LlamaConfig(**raw_config(SCALINGS[name], theta))).inv_freq
    ours = frequencies(config_of(name, theta), torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0 if name in ("default", "linear") else 4e-7, atol=0)
    torch.testing.assert_close(frequencies(config_of(name, theta), torch.float64), theirs.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_equal_transformers(name):
    """To 1e-4: an angle of up to 600 radians rounds to 600 * 6e-8 in float32."""
    positions_T = torch.tensor([0, 1, 5, 599])
    theirs = LlamaRotaryEmbedding(LlamaConfig(**raw_config(SCALINGS[name])))(torch.zeros(1), positions_T[None])
    for ours_TE, theirs_1TE in zip(rotary(positions_T, config_of(name), torch.float32), theirs, strict=True):
        torch.testing.assert_close(ours_TE, theirs_1TE[0], rtol=0, atol=1e-4)


def test_frequencies_by_hand():
    """theta^(-2i/E): 1 for the first pair, 10000^(-20/22) for the last; linear divides all of them by its factor."""
    f = frequencies(config_of("default"), torch.float64)
    assert f.shape == (HEAD_DIM // 2,)
    assert f.dtype == torch.float64
    assert f[0] == 1
    assert f[-1].item() == pytest.approx(10000 ** (-20 / 22), rel=1e-14)
    assert torch.equal(frequencies(config_of("linear"), torch.float64), f / 3)


def test_yarn_by_hand():
    """Of 512 positions, component 11 ln(512 / 2 pi n) / ln 10000 makes n turns: 1.1 for 32 and 5.3 for 1.

    So components 0 and 1 are kept, 6 and later divided by 4, and 2 to 5 lie fifths of the way between. Attention is
    sharpened by 0.1 ln 4 + 1 on either side.
    """
    f, scaled = frequencies(config_of("default"), torch.float64), frequencies(config_of("yarn"), torch.float64)
    kept = torch.tensor([1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(scaled, kept * f + (1 - kept) * f / 4, rtol=1e-14, atol=0)
    cos_TE, sin_TE = rotary(torch.tensor([77]), config_of("yarn"), torch.float64)
    assert (cos_TE**2 + sin_TE**2).sqrt()[0].tolist() == pytest.approx([0.1 * math.log(4) + 1] * HEAD_DIM)


def test_llama3_keeps_fast_frequencies_divides_slow_ones_and_blends_between():
    """512 positions make 512 f / 2 pi turns: four or more are kept, one or fewer divided by 8, the rest lie between."""
    f, scaled = frequencies(config_of("default"), torch.float64), frequencies(config_of("llama3"), torch.float64)
    turns = 512 * f / (2 * math.pi)
    fast, slow = turns >= 4, turns <= 1
    between = ~fast & ~slow
    assert min(fast.sum(), slow.sum(), between.sum()) >= 1
    assert torch.equal(scaled[fast], f[fast])
    torch.testing.assert_close(scaled[slow], f[slow] / 8, rtol=1e-15, atol=0)
    assert ((f[between] / 8 < scaled[between]) & (scaled[between] < f[between])).all()


@settings(deadline=None, max_examples=25)
@given(t=st.integers(0, 900), u=st.integers(0, 900), shift=st.integers(1, 900), name=st.sampled_from(sorted(SCALINGS)))
def test_products_of_queries_and_keys_depend_on_their_distance_alone(t, u, shift, name):
    q_1HE, k_1HE = torch.randn(2, 1, 3, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(t))

    def product(at_q: int, at_k: int) -> torch.Tensor:
        q_at, k_at = (rotary(torch.tensor([at]), config_of(name), torch.float64) for at in (at_q, at_k))
        return (rotate(q_1HE, *q_at) * rotate(k_1HE, *k_at)).sum(-1)

    # Angles of up to 1800 radians round to 2e-13 in float64.
    torch.testing.assert_close(product(t, u), product(t + shift, u + shift), rtol=0, atol=1e-10)


def test_products_change_with_the_distance():
    q_2HE = torch.randn(1, 1, HEAD_DIM, dtype=torch.float64).expand(2, 1, HEAD_DIM)
    turned_2HE = rotate(q_2HE, *rotary(torch.tensor([3, 4]), config_of("default"), torch.float64))
    assert not torch.allclose((turned_2HE[0] * turned_2HE[1]).sum(), q_2HE[0].square().sum())


def test_rotation_multiplies_each_half_pair_as_a_complex_number():
    """x_i + i x_{i + E/2} is turned by exp(i t f_i); position 0 turns nothing."""
    positions_T = torch.tensor([0, 2, 41])
    x_THE = torch.randn(3, 5, HEAD_DIM, dtype=torch.float64)
    f = frequencies(config_of("llama3"), torch.float64)
    angles_TF = torch.outer(positions_T.double(), f)
    first, second = x_THE.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles_TF), angles_TF)[:, None]
    out_THE = rotate(x_THE, *rotary(positions_T, config_of("llama3"), torch.float64))
    torch.testing.assert_close(out_THE, torch.cat((turned.real, turned.imag), -1), rtol=1e-13, atol=1e-13)
    assert torch.equal(out_THE[0], x_THE[0])


def test_bfloat16_rounds_the_cosine_and_not_the_angle():
    """At position 1001 a bfloat16 angle would be off by up to two radians."""
    positions_T = torch.tensor([1, 1001])
    narrow_pair, wide_pair = (rotary(positions_T, config_of("default"), d) for d in (torch.bfloat16, torch.float32))
    for narrow, wide in zip(narrow_pair, wide_pair, strict=True):
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(narrow, wide.bfloat16())


def test_float64_stays_float64_throughout():
    """cos and sin of float64 angles miss float32's by more than float64's rounding, and equal math.cos."""
    positions_T = torch.tensor([523])
    f = frequencies(config_of("default"), torch.float64)
    cos_TE, sin_TE = rotary(positions_T, config_of("default"), torch.float64)
    expected = [(math.cos(523 * x), math.sin(523 * x)) for x in f.tolist()]
    torch.testing.assert_close(cos_TE[0, : len(f)].tolist(), [c for c, _ in expected], rtol=0, atol=1e-12)
    torch.testing.assert_close(sin_TE[0, len(f) :].tolist(), [s for _, s in expected], rtol=0, atol=1e-12)

"""Rotary position embedding and its scalings.

A pair of components (x_i, x_{i+E/2}) of a query or key at position t is turned by the angle t * f_i with
f_i = theta^(-2i/E), so that a query-key product depends on the distance between the two positions alone
(Su et al. 2021, arXiv:2104.09864, Eq. 15; halves instead of neighbours are paired, as Llama's released weights expect).

Scalings: `linear` divides every frequency by `factor`; `llama3` divides the slow ones, keeps the fast ones and blends
between (Llama 3.1's config); `yarn` does the same between two components and sharpens attention by a factor on the
embedding (Peng et al. 2023, arXiv:2309.00071, Sec. 3.2 and 3.4). Shapes: T tokens, H heads, E head dim, F half of it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig


def frequencies(config: ModelConfig, precision: torch.dtype) -> Tensor:
    """(E/2,) angles per position, after scaling."""
    # In float32 from the first operation on, as the checkpoints were trained: a frequency that is off by one bit turns
    # position 100,000 by 0.006.
    f = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).to(precision) / config.head_dim)
    scaling = config.rope_scaling
    if scaling["rope_type"] == "default":
        return f
    keep = torch.zeros_like(f)  # the share of each frequency that is not scaled
    if scaling["rope_type"] == "llama3":
        keep = _kept_by_llama3(f, scaling)
    elif scaling["rope_type"] == "yarn":
        keep = _kept_by_yarn(f, scaling, config)
    return keep * f + (1 - keep) * (f / scaling["factor"])


def _kept_by_llama3(f: Tensor, scaling: dict[str, Any]) -> Tensor:
    """1 for a frequency that makes high_freq_factor turns within the original context, 0 below low_freq_factor."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(f: Tensor, scaling: dict[str, Any], config: ModelConfig) -> Tensor:
    """1 up to the component that makes beta_fast turns within the original context, 0 from beta_slow's on."""

    def component(turns: float) -> float:
        """The (fractional) i whose frequency theta^(-2i/E) makes that many turns."""
        wavelength = scaling["original_max_position_embeddings"] / (2 * math.pi * turns)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first = max(math.floor(component(scaling["beta_fast"])), 0)
    last = min(math.ceil(component(scaling["beta_slow"])), config.head_dim - 1)
    ramp = (torch.arange(len(f), dtype=f.dtype) - first) / max(last - first, 1e-3)
    return 1 - ramp.clamp(0, 1)


def magnitude(scaling: dict[str, Any]) -> float:
    """What cos and sin are multiplied by: 1, or yarn's attention_factor, 0.1 ln(factor) + 1 where it is not given."""
    if scaling["rope_type"] != "yarn":
        return 1.0
    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def rotary(positions_T: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, E) in `dtype`, of every position's angles; both halves of E hold the same angles."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    f = frequencies(config, precision).to(positions_T.device)
    angles_TE = torch.outer(positions_T.to(precision), f).repeat(1, 2)
    m = magnitude(config.rope_scaling)
    return (angles_TE.cos() * m).to(dtype), (angles_TE.sin() * m).to(dtype)


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """x turned by its positions' angles; the shape and dtype of x."""
    first_THF, second_THF = x_THE.chunk(2, dim=-1)
    turned_THE = torch.cat((-second_THF, first_THF), dim=-1)
    return x_THE * cos_TE[:, None] + turned_THE * sin_TE[:, None]

"""Rotary position embedding and its scalings.

A pair of components (x_i, x_{i+E/2}) of a query or key at position t is turned by the angle t * f_i with
f_i = theta^(-2i/E), so that a query-key product depends on the distance between the two positions alone
(Su et al. 2021, arXiv:2104.09864, Eq. 15; halves instead of neighbours are paired, as Llama's released weights expect).

Scalings: `linear` divides every frequency by `factor`; `llama3` divides the slow ones, keeps the fast ones and blends
between (Llama 3.1's config). Shapes: T tokens, H heads, E head dim.
"""

import math

import torch
from torch import Tensor

from models.config import ModelConfig


def frequencies(config: ModelConfig) -> Tensor:
    """(E/2,) float64 angles per position, after scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    f = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling["rope_type"] == "linear":
        return f / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        return _llama3(f, scaling)
    return f


def _llama3(f: Tensor, scaling: dict) -> Tensor:
    """Wavelengths above context/low_freq_factor are stretched by `factor`, below context/high_freq_factor kept."""
    context, low, high = (
        scaling["original_max_position_embeddings"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
    )
    turns = context * f / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * f + (1 - keep) * f / scaling["factor"]


def rotary(positions_T: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, E) in `dtype`, of every position's angles; both halves of E hold the same angles."""
    # Angles in float32 as every released checkpoint was trained with (float64 for a float64 model).
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    f = frequencies(config).to(positions_T.device, precision)
    angles_TE = torch.outer(positions_T.to(precision), f).repeat(1, 2)
    return angles_TE.cos().to(dtype), angles_TE.sin().to(dtype)


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """x turned by its positions' angles; the shape and dtype of x."""
    first, second = x_THE.chunk(2, dim=-1)
    turned_THE = torch.cat((-second, first), dim=-1)
    return x_THE * cos_TE[:, None] + turned_THE * sin_TE[:, None]

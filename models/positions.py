"""How positions enter: the angles of rotations, sinusoids added to embeddings, ALiBi's slopes.

Positions are counted from the document's start, so none of this knows of rows, pieces or ranks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def rotary_table(positions: Tensor, dims: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., dims / 2] of `position * base^(-2 i / dims)` for positions [...].

    Angles are formed in fp64: at position 10^6 an fp32 angle is off by 0.06, and neighbours would lose their distance.
    """
    exponents = torch.arange(0, dims, 2, device=positions.device, dtype=torch.float64) / dims
    angles = positions[..., None].double() * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[..., width]: the sines, then the cosines of `position * 10000^(-2 i / width)` (arXiv 1706.03762, 3.5)."""
    cos, sin = rotary_table(positions, width, 10000.0, dtype)
    return torch.cat([sin, cos], dim=-1)


@functools.cache
def alibi_slopes(heads: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """ALiBi's fp32 slopes [heads] (arXiv 2108.12409, 3), all times `scale`.

    2^(-8 h / n), h = 1 to n, for a power of two n. Between powers the released code's: those of the power below, then
    every other of those of the power above, which fall between them.
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = torch.arange(1, power + 1, device=device) * (8 / power)
    between = (2 * torch.arange(heads - power, device=device) + 1) * (4 / power)
    return torch.exp2(-torch.cat([exponents, between]).float()) * scale

"""The rotation in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x rotated; see op.py."""
    half = cos.shape[-1]
    dtype = torch.float64 if torch.float64 in (x.dtype, cos.dtype) else torch.float32
    cos, sin = cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]
    first, second, rest = x.to(dtype).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)

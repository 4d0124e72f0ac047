"""The norms of the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import rms_norm
from .parameters import ones, zeros


def wide(x: Tensor) -> Tensor:
    """`x` in the precision that norms, angles and states are computed in: fp32, or fp64 where x has it."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)`, computed in fp32; the scale is stored around zero."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.specs = {"scale": zeros()}

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in x's dtype."""
        if torch.compiler.is_compiling():
            # torch.compile fuses plain PyTorch with what is around it.
            return rms_norm(x, self.scale, self.eps, implementation="reference")
        return rms_norm(x, self.scale, self.eps)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.specs = {"weight": ones(), "bias": zeros()}

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in x's dtype."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}

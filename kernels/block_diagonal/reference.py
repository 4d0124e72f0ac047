"""The gate projections in PyTorch: one batched product a gate, the blocks its batch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight_a: Tensor, bias_a: Tensor, weight_x: Tensor, bias_x: Tensor) -> tuple[Tensor, Tensor]:
    """(gate_a, gate_x) [B, T, D]; see op.py."""
    return _project(x, weight_a, bias_a), _project(x, weight_x, bias_x)


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    blocks, side, _ = weight.shape
    grouped = x.reshape(-1, blocks, side).transpose(0, 1)
    return torch.bmm(grouped, weight).transpose(0, 1).reshape(x.shape) + bias

"""The MLP of every block."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .backend import Backend
from .config import ModelConfig
from .tiles import Fed, in_tiles

ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"), "silu": F.silu, "relu": F.relu}


class MLP(nn.Module):
    """`W_down(act(W_gate x) * W_up x)` (Griffin 2.1), or `W_down act(W_up x)` where it is not gated."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.mlp.hidden_size(config.width), config.mlp.bias
        self.gate = backend.column_linear(width, hidden, bias, 1 / width) if config.mlp.gated else None
        self.up = backend.column_linear(width, hidden, bias, 1 / width)
        self.down = backend.row_linear(hidden, width, bias, 2 / (config.layers * hidden))
        self.activation, self.project = config.mlp.activation, backend.project

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """[..., D] -> [..., D]; with `norm` `x + mlp(norm(x))` of x [B, T, D], of which only x is kept (`tiles`)."""
        return self._feed(x) if norm is None else in_tiles(Fed(norm, self, self._feed), x)

    def _feed(self, x: Tensor) -> Tensor:
        if self.gate is None:
            (up,) = self.project(x, self.up)
            return self.down(ACTIVATIONS[self.activation](up))
        return self.down(gated(self.activation, *self.project(x, self.gate, self.up)))


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`act(gate) * up`; the backward pass may write over both, which nothing else may have kept."""
    if fused.runs(gate):
        return fused.gated(activation, gate, up)
    return ACTIVATIONS[activation](gate) * up

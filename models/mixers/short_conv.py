"""Based's gated short convolution (arXiv 2402.18668, 4; BaseConv in its code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import short_conv
from ..backend import Backend
from ..config import ModelConfig
from ..norm import wide
from ..parameters import normal
from ..sequence import SequenceContext, roll_in
from .mixer import Mixer


class ShortConv(Mixer):
    """`W_out(silu(conv(W_x x + b_x)) * (W_y x + b_y)) + b_out`; the convolution is depthwise and has no bias."""

    def __init__(self, config: ModelConfig, backend: Backend, implementation: str = "auto") -> None:
        super().__init__()
        options, width = config.short_conv, config.width
        channels = options.channels(width)
        self.local_channels, self.implementation = backend.local(channels), implementation
        self.project = backend.project
        self.input_x = backend.column_linear(width, channels, options.bias, 1 / width)
        self.input_y = backend.column_linear(width, channels, options.bias, 1 / width)
        self.conv_weight = nn.Parameter(torch.empty(self.local_channels, options.taps))
        self.output = backend.row_linear(channels, width, options.bias, 2 / (config.layers * channels))
        self.specs = {"conv_weight": normal(1 / (3 * options.taps))}

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        branches = self.project(x, self.input_x, self.input_y)
        x_branch, halo = seq.left_halo("conv", next(branches), self.conv_weight.shape[1] - 1, alone=True)
        y_branch, tail = next(branches), halo()
        options = {"activation": "silu", "implementation": self.implementation}
        u, _ = short_conv(x_branch, self.conv_weight, None, tail if tail.shape[1] else None, seq.segments, **options)
        return self.output(u * y_branch)

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry)."""
        x_branch, y_branch = self.input_x(x), self.input_y(x)
        u = F.silu(convolve(carry["conv"], x_branch, self.conv_weight, position))
        y = self.output(u.to(x.dtype) * y_branch)
        return y, {"conv": roll_in(carry["conv"], x_branch[:, None])}

    def init_carry(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the last taps - 1 inputs of the convolution."""
        shape = (batch, self.conv_weight.shape[1] - 1, self.local_channels)
        return {"conv": torch.zeros(shape, device=device, dtype=dtype)}


def convolve(tail: Tensor, x: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """[B, D] in fp32 (fp64): the convolution by `weight` [D, S] at one token x [B, D] after `tail` [B, S - 1, D].

    Inputs before the start of the document, in which the token has `position` [B], are left out.
    """
    age = torch.arange(tail.shape[1], 0, -1, device=x.device)
    tail = tail.masked_fill((age > position[:, None])[:, :, None], 0)
    window = torch.cat([tail, x[:, None]], dim=1)
    return torch.einsum("bsd,ds->bd", wide(window), wide(weight))

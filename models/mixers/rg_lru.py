"""Griffin's recurrent block (arXiv 2402.19427, 2.3 and 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ...kernels import gate_projections, rg_lru, rg_lru_summarize, short_conv
from ..backend import Backend
from ..config import ModelConfig, RGLRUConfig
from ..norm import wide
from ..parameters import ParameterSpec, normal, zeros
from ..sequence import SequenceContext, roll_in
from .mixer import Mixer
from .short_conv import convolve


class RGLRU(Mixer):
    """`W_out(gelu(W_y x + b_y) * rg_lru(conv(W_x x + b_x)))`, recurrence width R.

        u_t = short_conv(W_x x + b_x)_t
        r_t = sigmoid(W_a u_t + b_a), i_t = sigmoid(W_i u_t + b_i)           (block-diagonal)
        log a_t = -8 r_t softplus(a_param)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t;  h_t = i_t u_t at a document's first token

    Initial decays, `decay_init` over `decay_range` [lo, hi]:
        released: the radius a is uniform over the ring [lo, hi] (a^2 uniform). At an open gate, r = 1, the decay a^8
            lies in [lo^8, hi^8], which is [0.43, 0.992] for [0.9, 0.999]. What RecurrentGemma was trained from.
        paper: the decay of an open gate, a^8, is uniform in [lo, hi]: memories about 8 times longer, and inputs that
            sqrt(1 - a^2) makes 2 to 3 times smaller.
    The default is the released one: after 0.4M bytes of Python source griffin-demo stands at 2.16 bits a byte with it,
    at 2.60 with the paper's.
    """

    def __init__(self, config: ModelConfig, backend: Backend, implementation: str = "auto") -> None:
        super().__init__()
        options, width = config.rg_lru, config.width
        channels = options.channels(width)
        self.local_channels = backend.local(channels)
        self.implementation, self.project = implementation, backend.project
        self.input_x = backend.column_linear(width, channels, options.bias, 1 / width)
        self.input_y = backend.column_linear(width, channels, options.bias, 1 / width)
        self.conv_weight = nn.Parameter(torch.empty(self.local_channels, options.conv_taps))
        self.conv_bias = nn.Parameter(torch.empty(self.local_channels))
        self.gate_a = backend.block_diagonal_linear(options.gate_blocks, channels, options.gate_blocks / channels)
        self.gate_x = backend.block_diagonal_linear(options.gate_blocks, channels, options.gate_blocks / channels)
        self.a_param = nn.Parameter(torch.empty(self.local_channels))
        self.output = backend.row_linear(channels, width, options.bias, 2 / (config.layers * channels))
        self.specs = {
            "conv_weight": normal(0.01 / options.conv_taps),
            "conv_bias": zeros(),
            "a_param": decay_spec(options),
        }

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        branches = self.project(x, self.input_x, self.input_y)
        x_branch, halo = seq.left_halo("conv", next(branches), self.conv_weight.shape[1] - 1, alone=True)
        y_branch, tail = next(branches), halo()
        tail = tail if tail.shape[1] else None
        u, _ = short_conv(
            x_branch, self.conv_weight, self.conv_bias, tail, seq.segments, implementation=self.implementation
        )
        weights = [gate.get_parameter(name) for gate in (self.gate_a, self.gate_x) for name in ("weight", "bias")]
        gate_a, gate_x = gate_projections(u, *weights, implementation=self.implementation)
        gates = (u, gate_a, gate_x, wide(self.a_param))
        options = {"segments": seq.segments, "implementation": self.implementation}
        entry = seq.initial_state("state", lambda: rg_lru_summarize(*gates, **options))
        y_branch = F.gelu(y_branch, approximate="tanh")
        h, final_state = rg_lru(*gates, entry.state(), **options, from_right=entry.from_right)
        seq.leave("state", final_state)
        return self.output(h * y_branch)

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry)."""
        x_branch, y_branch = self.input_x(x), self.input_y(x)
        u = (convolve(carry["conv"], x_branch, self.conv_weight, position) + wide(self.conv_bias)).to(x.dtype)
        gate_a, gate_x, wide_u = wide(self.gate_a(u)), wide(self.gate_x(u)), wide(u)
        log_a = -8 * torch.sigmoid(gate_a) * F.softplus(wide(self.a_param))
        begins = (position == 0)[:, None]
        decay = log_a.exp().masked_fill(begins, 0)
        scale = (-torch.expm1(2 * log_a)).sqrt().masked_fill(begins, 1)
        state = decay * carry["state"] + scale * torch.sigmoid(gate_x) * wide_u
        y = self.output(state.to(x.dtype) * F.gelu(y_branch, approximate="tanh"))
        return y, {"conv": roll_in(carry["conv"], x_branch[:, None]), "state": state}

    def init_carry(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the last taps - 1 inputs of the convolution, and the fp32 (fp64) state."""
        taps = self.conv_weight.shape[1] - 1
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            "conv": torch.zeros(batch, taps, self.local_channels, device=device, dtype=dtype),
            "state": torch.zeros(batch, self.local_channels, device=device, dtype=state_dtype),
        }


def decay_spec(options: RGLRUConfig) -> ParameterSpec:
    """`a_param` such that softplus(a_param) = -log(a), a drawn as `decay_init` says."""
    low, high = options.decay_range

    def init(shape: tuple[int, ...], generator: Generator) -> Tensor:
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        if options.decay_init == "paper":
            minus_log_a = -torch.log(low + (high - low) * uniform) / 8
        else:
            minus_log_a = -torch.log(low**2 + (high**2 - low**2) * uniform) / 2
        return torch.log(torch.expm1(minus_log_a)).float()

    return ParameterSpec(init, decay=False)

"""Sliding-window attention with rotary positions (arXiv 2402.19427, 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import attention
from ..backend import Backend
from ..config import ModelConfig
from ..norm import wide
from ..sequence import SequenceContext, roll_in
from .mixer import Mixer


class LocalAttention(Mixer):
    """`W_o concat_h softmax(q_h k^T / sqrt(K)) v + b_o` over the last W keys of the document, itself included."""

    def __init__(self, config: ModelConfig, backend: Backend, implementation: str = "auto") -> None:
        super().__init__()
        options, width = config.local_attention, config.width
        heads = options.query_heads(width)
        self.head_dim, self.window, self.implementation = options.head_dim, options.window, implementation
        self.rotary_dims, self.rope_base = options.rotary_dims, options.rope_base
        self.query = backend.head_linear(width, heads, self.head_dim, 1 / width)
        self.key = backend.head_linear(width, options.kv_heads, self.head_dim, 1 / width)
        self.value = backend.head_linear(width, options.kv_heads, self.head_dim, 1 / width)
        inner = heads * self.head_dim
        self.output = backend.row_linear(inner, width, options.output_bias, 2 / (config.layers * inner))

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self._project(x, seq.segments.positions)
        keys = seq.left_halo("keys", k, self.window - 1)
        values = seq.left_halo("values", v, self.window - 1)
        halo = keys.shape[1]
        if halo:
            k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
        y = attention(q, k, v, seq.segments, window=self.window, key_offset=-halo, implementation=self.implementation)
        return self.output(y.flatten(2))

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry)."""
        q, k, v = self._project(x[:, None], position[:, None])
        keys = torch.cat([carry["keys"], k], dim=1)
        values = torch.cat([carry["values"], v], dim=1)
        q = q[:, 0].unflatten(1, (k.shape[2], -1))
        scores = torch.einsum("bhgk,bwhk->bhgw", wide(q), wide(keys)) * self.head_dim**-0.5
        age = torch.arange(keys.shape[1] - 1, -1, -1, device=x.device)
        unseen = age > position[:, None]
        weights = scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(dim=-1)
        y = torch.einsum("bhgw,bwhk->bhgk", weights, wide(values)).flatten(1).to(x.dtype)
        return self.output(y), {"keys": roll_in(carry["keys"], k), "values": roll_in(carry["values"], v)}

    def init_carry(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the last W - 1 keys (rotated) and values."""
        heads = self.key.get_parameter("weight").shape[0] // self.head_dim
        shape = (batch, self.window - 1, heads, self.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("keys", "values")}

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, T, H, K], rotated keys and values [B, T, Hkv, K]."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.query, self.key, self.value))
        if self.rotary_dims == 0:
            return q, k, v
        cos, sin = rotary_table(positions, self.rotary_dims, self.rope_base, wide(x).dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotary_table(positions: Tensor, dims: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, dims / 2] of `position * base^(-2 i / dims)`.

    Angles are formed in fp64: at position 10^6 an fp32 angle is off by 0.06, and neighbours would lose their distance.
    """
    exponents = torch.arange(0, dims, 2, device=positions.device, dtype=torch.float64) / dims
    angles = positions[..., None].double() * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, K] with its first `2 * cos.shape[-1]` dims rotated, dim i with dim i + half of them."""
    half = cos.shape[-1]
    first, second, rest = wide(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)

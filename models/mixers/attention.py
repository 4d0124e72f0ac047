"""Softmax attention over the document: rotary positions (arXiv 2104.09864), ALiBi (arXiv 2108.12409) or none."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...kernels import attention, rotary
from ..backend import Backend
from ..config import AttentionConfig, ModelConfig
from ..norm import wide
from ..positions import alibi_slopes, rotary_table
from ..sequence import Halos, SequenceContext
from .mixer import Mixer


class Attention(Mixer):
    """`W_o concat_h softmax(q_h k^T / sqrt(K) - slope_h distance) v + b_o` over the document's past, itself included.

    The keys and values of all that was read are carried, so this mixer's carry, alone among all, grows with it.
    """

    name = "attention"

    def __init__(self, config: ModelConfig, backend: Backend, implementation: str = "auto") -> None:
        super().__init__()
        options, width = cast(AttentionConfig, config.mixer_config(self.name)), config.width
        self.heads, kv_heads = options.query_heads(width), options.key_heads(width)
        self.head_dim, self.implementation = options.head_dim, implementation
        self.position, self.keys_seen = options.position, options.keys_seen
        self.rotary_dims = options.rotary_dims
        self.use_positions(config)
        self.local_heads, self.project = backend.part(self.heads), backend.project
        self.query, self.key, self.value = (
            # With biases no head is shared by queries of several ranks (`AttentionConfig.problems`).
            backend.column_linear(width, heads * self.head_dim, True, 1 / width)
            if options.qkv_bias
            else backend.head_linear(width, heads, self.head_dim, 1 / width)
            for heads in (self.heads, kv_heads, kv_heads)
        )
        inner = self.heads * self.head_dim
        self.output = backend.row_linear(inner, width, options.output_bias, 2 / (config.layers * inner))

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        reach = None if self.keys_seen is None else self.keys_seen - 1
        q, k, v, halos = self._project_with_halos(x, seq, reach, alone=True)
        keys, values = halos()
        options = {"window": self.keys_seen, "key_offset": -keys.shape[1], "alibi_slopes": self._slopes(x.device)}
        k, v = after(keys, k), after(values, v)
        y = attention(q, k, v, seq.segments, **options, implementation=self.implementation)
        return self.output(y.flatten(2))

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry)."""
        q, k, v = self._project(x[:, None], position[:, None])
        keys, values = after(carry["keys"], k), after(carry["values"], v)
        y = attend(q[:, 0], keys, values, position + 1, self._slopes(x.device))
        kept = slice(None if self.keys_seen is None else 1, None)
        return self.output(y.flatten(1)), {"keys": keys[:, kept], "values": values[:, kept]}

    def init_carry(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The keys (rotated) and values seen: none yet, or a window's zeros."""
        heads = self.key.get_parameter("weight").shape[0] // self.head_dim
        shape = (batch, 0 if self.keys_seen is None else self.keys_seen - 1, heads, self.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("keys", "values")}

    def use_positions(self, config: ModelConfig) -> None:
        """Goes on with the rotary base and the factor on ALiBi's slopes of `config`."""
        options = cast(AttentionConfig, config.mixer_config(self.name))
        self.rope_base, self.alibi_scale = options.rope_base, options.alibi_scale

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, T, H, K], rotated keys and values [B, T, Hkv, K]."""
        table = self._table(x, positions)
        k, v, q = self.project(x, self.key, self.value, self.query)
        return self._heads(q, table), self._heads(k, table), self._heads(v)

    def _project_with_halos(
        self, x: Tensor, seq: SequenceContext, n: int | None, alone: bool
    ) -> tuple[Tensor, Tensor, Tensor, Halos]:
        """The same, and the halos of keys and values as in `left_halos`: without tensor ranks under way while queries
        are computed."""
        table = self._table(x, seq.segments.positions)
        projections = self.project(x, self.key, self.value, self.query)
        entries = {"keys": self._heads(next(projections), table), "values": self._heads(next(projections))}
        (k, v), halos = seq.left_halos(entries, n, alone)
        return self._heads(next(projections), table), k, v, halos

    def _table(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the rotations; None where nothing is rotated."""
        return rotary_table(positions, self.rotary_dims, self.rope_base, wide(x).dtype) if self.rotary_dims else None

    def _heads(self, x: Tensor, table: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, T, H K or Hkv K] as heads [B, T, H or Hkv, K], rotated where a table is given."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        return heads if table is None else rotary(heads, *table, implementation=self.implementation)

    def _slopes(self, device: torch.device) -> Tensor | None:
        """This rank's part of the slopes of all heads."""
        if self.position != "alibi":
            return None
        return alibi_slopes(self.heads, device, self.alibi_scale)[self.local_heads]


def after(left: Tensor, x: Tensor) -> Tensor:
    """`left` [B, n, ...] followed by x [B, T, ...]; x itself, not a copy, where n is 0."""
    return torch.cat([left, x], dim=1) if left.shape[1] else x


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, slopes: Tensor | None = None) -> Tensor:
    """[B, H, V] of one query a row, q [B, H, K], over the last `seen` [B] of keys and values [B, n, Hkv, K or V]."""
    grouped = q.unflatten(1, (keys.shape[2], -1))
    scores = torch.einsum("bhgk,bwhk->bhgw", wide(grouped), wide(keys)) * q.shape[-1] ** -0.5
    age = torch.arange(keys.shape[1] - 1, -1, -1, device=q.device)
    if slopes is not None:
        scores = scores - slopes.view(*scores.shape[1:3], 1) * age
    weights = scores.masked_fill((age >= seen[:, None])[:, None, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhgw,bwhk->bhgk", weights, wide(values)).flatten(1, 2).to(q.dtype)

"""Linearized attention (arXiv 2406.07368): attention inside groups, linear attention across them, and a filter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import (
    Segments,
    attention,
    linear_attention,
    linear_attention_step,
    linear_attention_summarize,
    short_conv,
)
from ...kernels.taylor_attention.reference import key_features, query_features
from ..backend import Backend
from ..config import ModelConfig
from ..norm import wide
from ..parameters import normal, zeros
from ..sequence import SequenceContext
from .attention import Attention, after, attend
from .short_conv import convolve

# Without it the weights' sum can vanish, and what is divided by it with it (Performer's relu features, 2009.14794).
RELU_FLOOR = 1e-3


class LinearizedAttention(Attention):
    """`W_o concat_h (local_h + (1 + global_scale_h) global_h + conv_h)`, the document cut into groups of G tokens.

        local: causal attention to the keys of the token's own group. softmax: as in `attention`. relu2: weights
            relu(q_i . k_j)^2 of L2-normalised q and k, not divided.
        global: weights phi(q_i) . phi(k_j) over the groups completed before, so that no pair counts twice; divided by
            their sum where `normalize`.
        conv: a causal filter a head over the values. The released code's centred convolution over 63 taps, masked so
            that no later token leaks in, is this with 32.
        phi: elu (elu + 1), relu (relu + 0.001), identity (of L2-normalised q and k), taylor (Based's features of a
            learned projection) or learned (softmax of a learned projection and of its negative, arXiv 2402.04347).

    Queries and keys are rotated before all that. relu2 is plain PyTorch and holds 2 G weights a token and head.
    """

    name = "linearized_attention"

    def __init__(self, config: ModelConfig, backend: Backend, implementation: str = "auto") -> None:
        super().__init__(config, backend, implementation)
        options, heads = config.linearized_attention, backend.local(self.heads)
        self.group, self.local, self.feature_map = options.group, options.local, options.feature_map
        self.features, self.projected = options.features, options.projected
        self.options = {"group": options.group, "normalize": options.normalize}
        self.conv_weight = nn.Parameter(torch.empty(heads, options.conv_taps))
        self.global_scale = nn.Parameter(torch.empty(heads))
        self.specs = {"conv_weight": normal(0.01 / options.conv_taps), "global_scale": zeros()}
        if self.projected:
            shape = (heads, self.head_dim, options.feature_dim)
            self.query_map, self.key_map = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
            self.specs |= dict.fromkeys(("query_map", "key_map"), normal(1 / self.head_dim))

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        taps = self.conv_weight.shape[1]
        q, k, v, halos = self._project_with_halos(x, seq, max(self.group, taps) - 1, alone=False)
        across = self._across(q, k, v, seq)
        keys, values = halos()
        y = self._inside(q, after(last(keys, self.group - 1), k), after(last(values, self.group - 1), v), seq.segments)
        y = y + self._factor(x) * across()
        tail = self._repeat(last(values, taps - 1)).flatten(2)
        where = {"segments": seq.segments, "implementation": self.implementation}
        inputs = self._repeat(v).flatten(2)
        filtered, _ = short_conv(inputs, self.conv_weight, None, tail if tail.shape[1] else None, **where)
        return self.output(y.flatten(2) + filtered)

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry)."""
        q, k, v = (t[:, 0] for t in self._project(x[:, None], position[:, None]))
        keys, values = after(carry["keys"], k[:, None]), after(carry["values"], v[:, None])
        inside = attend if self.local == "softmax" else attend_squared
        y = inside(q, last(keys, self.group), last(values, self.group), position % self.group + 1)
        state = carry["state"].masked_fill((position == 0)[:, None, None, None, None], 0)
        k, v = (self._repeat(t) if self.projected else t for t in (k, v))
        across, state = linear_attention_step(*self._map(q, k), v, None, state, position, **self.options)
        y = (y + self._factor(x) * across).flatten(1)
        latest = self._repeat(last(values, self.conv_weight.shape[1])).flatten(2)
        weight = self.conv_weight.repeat_interleave(self.head_dim, 0)
        filtered = convolve(latest[:, :-1], latest[:, -1], weight, position).to(x.dtype)
        return self.output(y + filtered), {"keys": keys[:, 1:], "values": values[:, 1:], "state": state}

    def init_carry(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the last keys (rotated) and values, and the fp32 (fp64) sums over all keys and over the open group."""
        kv_heads = self.key.get_parameter("weight").shape[0] // self.head_dim
        heads = self.global_scale.shape[0] if self.projected else kv_heads
        kept = (batch, max(self.group, self.conv_weight.shape[1]) - 1, kv_heads, self.head_dim)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state = (batch, heads, 2, self.features, self.head_dim + self.options["normalize"])
        return {
            "keys": torch.zeros(kept, device=device, dtype=dtype),
            "values": torch.zeros(kept, device=device, dtype=dtype),
            "state": torch.zeros(state, device=device, dtype=state_dtype),
        }

    def _inside(self, q: Tensor, keys: Tensor, values: Tensor, segments: Segments) -> Tensor:
        """The local branch [B, T, H, K]; keys and values begin up to G - 1 tokens before the piece."""
        groups = groups_of(segments, self.group)
        if self.local == "relu2":
            return squared_attention(q, keys, values, groups.doc_start.view(q.shape[:2]), self.group)
        halo = keys.shape[1] - q.shape[1]
        where = {"segments": groups, "implementation": self.implementation}
        return attention(q, keys, values, **where, window=self.group, key_offset=-halo)

    def _across(self, q: Tensor, k: Tensor, v: Tensor, seq: SequenceContext) -> Callable[[], Tensor]:
        """The global branch [B, T, H, K], once its state is there; 0 in a document's first group, which has nothing
        before it."""
        k, v = (self._repeat(t) if self.projected else t for t in (k, v))
        q, k = self._map(q, k)
        where = {"segments": seq.segments, "implementation": self.implementation}
        entry = seq.initial_state("state", lambda: linear_attention_summarize(k, v, **where, **self.options))

        def across() -> Tensor:
            options = {**where, **self.options, "from_right": entry.from_right}
            y, final_state = linear_attention(q, k, v, None, entry.state(), **options)
            seq.leave("state", final_state)
            return y

        return across

    def _map(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features [..., H, F] of queries and keys [..., H, K]."""
        if self.feature_map == "identity":
            return unit(q), unit(k)
        if self.feature_map == "relu":
            return F.relu(q) + RELU_FLOOR, F.relu(k) + RELU_FLOOR
        if self.feature_map == "elu":
            return F.elu(q) + 1, F.elu(k) + 1
        q, k = (torch.einsum("...hk,hkf->...hf", t, weight) for t, weight in ((q, self.query_map), (k, self.key_map)))
        if self.feature_map == "learned":
            return two_sided(q), two_sided(k)
        return query_features(wide(q), q.shape[-1] ** -0.5).to(q.dtype), key_features(wide(k)).to(k.dtype)

    def _repeat(self, x: Tensor) -> Tensor:
        """x [..., Hkv, K] with each head repeated for its queries', [..., H, K]."""
        return x.repeat_interleave(self.global_scale.shape[0] // x.shape[-2], dim=-2)

    def _factor(self, x: Tensor) -> Tensor:
        """[H, 1], what the global branch is multiplied by."""
        return (1 + wide(self.global_scale)).to(x.dtype)[:, None]


def groups_of(segments: Segments, group: int) -> Segments:
    """Segments whose documents are the groups of `group` tokens, counted from the start of each document.

    Bounds are listed once a token, so repeatedly, since how many groups there are is known on the device alone.
    """
    positions = segments.positions
    batch, tokens = positions.shape
    start = torch.arange(tokens, device=positions.device) - positions % group
    flat = torch.arange(batch, device=positions.device)[:, None] * tokens + start.clamp(min=0)
    bounds = F.pad(flat.view(-1), (0, 1), value=batch * tokens)
    return Segments(bounds.to(torch.int32), start[:, 0] < 0, start.view(-1).to(torch.int32))


def squared_attention(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, group: int) -> Tensor:
    """[B, T, H, V]: weights relu(q_i . k_j)^2 of L2-normalised q and k, over start_i <= j <= i.

    Args:
        q: [B, T, H, K].
        keys, values: [B, n + T, Hkv, K or V], n = 0 or group - 1 of them left of the piece.
        start: [B, T], where each token's group begins in the piece; negative where before it.
        group: the most tokens that a group has.
    """
    tokens, reach = q.shape[1], group - 1
    left, right = reach + tokens - keys.shape[1], -tokens % group
    keys, values = (F.pad(t, (0, 0, 0, 0, left, right)).unfold(1, group + reach, group) for t in (unit(keys), values))
    queries = F.pad(unit(q), (0, 0, 0, 0, 0, right)).unflatten(1, (-1, group)).unflatten(3, (keys.shape[2], -1))
    scores = torch.einsum("bnihgk,bnhkj->bnhgij", queries, keys)
    at = torch.arange(tokens + right, device=q.device).view(-1, group, 1)
    key_at = at[:, :1] - reach + torch.arange(group + reach, device=q.device)
    seen = (key_at <= at) & (key_at >= F.pad(start, (0, right)).view(len(q), -1, group, 1))
    weights = F.relu(scores).square().masked_fill(~seen[:, :, None, None], 0)
    return torch.einsum("bnhgij,bnhvj->bnihgv", weights, values).flatten(3, 4).flatten(1, 2)[:, :tokens]


def attend_squared(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """[B, H, V] of one query a row as in `squared_attention`, over the last `seen` [B] of its keys and values."""
    grouped = unit(q).unflatten(1, (keys.shape[2], -1))
    weights = F.relu(torch.einsum("bhgk,bwhk->bhgw", grouped, unit(keys))).square()
    age = torch.arange(keys.shape[1] - 1, -1, -1, device=q.device)
    weights = weights.masked_fill((age >= seen[:, None])[:, None, None], 0)
    return torch.einsum("bhgw,bwhk->bhgk", weights, values).flatten(1, 2)


def unit(x: Tensor) -> Tensor:
    """x [..., K] divided by its L2 norm."""
    return F.normalize(wide(x), dim=-1).to(x.dtype)


def two_sided(x: Tensor) -> Tensor:
    """[..., 2 F]: the softmax of x [..., F] and of -x."""
    return torch.cat([wide(x).softmax(-1), (-wide(x)).softmax(-1)], dim=-1).to(x.dtype)


def last(x: Tensor, n: int) -> Tensor:
    """The last n entries of x [B, m, ...], all where m < n."""
    return x[:, max(0, x.shape[1] - n) :]

"""Based's linear attention (arXiv 2402.18668, 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import taylor_attention, taylor_attention_step, taylor_attention_summarize
from ..backend import Backend
from ..config import ModelConfig
from ..mixer_config import taylor_terms
from ..sequence import SequenceContext
from .mixer import Mixer


class TaylorAttention(Mixer):
    """`W_o concat_h (sum_j w_ij v_j / sum_j w_ij)`, `w_ij = 1 + s + s^2 / 2`, `s = scale q_i . k_j`, over the past.

    No norm, no bias and no positions, as released; queries and keys have `feature_dim` dims, values `head_dim`.
    """

    def __init__(self, config: ModelConfig, backend: Backend, implementation: str = "auto") -> None:
        super().__init__()
        options, width = config.taylor_attention, config.width
        heads = options.query_heads(width)
        self.head_dim, self.feature_dim = options.head_dim, options.feature_dim
        self.heads, self.implementation, self.project = backend.local(heads), implementation, backend.project
        self.options = {"scale": options.scale or None, "normalize": options.normalize}
        self.query = backend.head_linear(width, heads, self.feature_dim, 1 / width)
        self.key = backend.head_linear(width, heads, self.feature_dim, 1 / width)
        self.value = backend.head_linear(width, heads, self.head_dim, 1 / width)
        inner = heads * self.head_dim
        self.output = backend.row_linear(inner, width, False, 2 / (config.layers * inner))

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        projections = map(self._heads, self.project(x, self.key, self.value, self.query))
        k, v = next(projections), next(projections)
        where = {"segments": seq.segments, "implementation": self.implementation}
        entry = seq.initial_state("state", lambda: taylor_attention_summarize(k, v, **where))
        q = next(projections)
        y, final_state = taylor_attention(q, k, v, entry.state(), **where, **self.options, from_right=entry.from_right)
        seq.leave("state", final_state)
        return self.output(y.flatten(2))

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry)."""
        state = carry["state"].masked_fill((position == 0)[:, None, None, None], 0)
        options = {**self.options, "implementation": self.implementation}
        q, k, v = (self._heads(linear(x)) for linear in (self.query, self.key, self.value))
        y, state = taylor_attention_step(q, k, v, state, **options)
        return self.output(y.flatten(1)), {"state": state}

    def init_carry(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the fp32 (fp64) sums of keys' monomials times values and one."""
        shape = (batch, self.heads, taylor_terms(self.feature_dim), self.head_dim + 1)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return {"state": torch.zeros(shape, device=device, dtype=state_dtype)}

    def _heads(self, x: Tensor) -> Tensor:
        """[..., H, K or V] of x [..., H K or H V]."""
        return x.unflatten(-1, (self.heads, -1))

"""Sequence mixers, one file each.

Not blocks: norms, residuals and MLPs are around them. One invariant: a mixer gives the same outputs and gradients
for a sequence whole, in pieces joined by their carry, and step by step. A new mixer is a file here, a line in MIXERS,
and a config dataclass in `models/config.py`.
"""

from __future__ import annotations

from .attention import Attention
from .linearized_attention import LinearizedAttention
from .local_attention import LocalAttention
from .mixer import Mixer
from .rg_lru import RGLRU
from .short_conv import ShortConv
from .taylor_attention import TaylorAttention

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "linearized_attention": LinearizedAttention,
    "local_attention": LocalAttention,
    "rg_lru": RGLRU,
    "short_conv": ShortConv,
    "taylor_attention": TaylorAttention,
}

__all__ = [
    "MIXERS",
    "RGLRU",
    "Attention",
    "LinearizedAttention",
    "LocalAttention",
    "Mixer",
    "ShortConv",
    "TaylorAttention",
]

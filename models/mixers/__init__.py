"""Sequence mixers, one file each.

Not blocks: norms, residuals and MLPs are around them. One invariant: a mixer gives the same outputs and gradients
for a sequence whole, in pieces joined by their carry, and step by step. A new mixer is a file here, a line in MIXERS,
and a config dataclass in `models/config.py`.
"""

from __future__ import annotations

from .local_attention import LocalAttention
from .mixer import Mixer
from .rg_lru import RGLRU

MIXERS: dict[str, type[Mixer]] = {"local_attention": LocalAttention, "rg_lru": RGLRU}

__all__ = ["MIXERS", "RGLRU", "LocalAttention", "Mixer"]

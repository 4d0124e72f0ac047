"""Sliding-window attention (arXiv 2402.19427, 2.3; arXiv 2402.18668, 4)."""

from __future__ import annotations

from .attention import Attention


class LocalAttention(Attention):
    """Attention over the last W keys of the document, the token itself included; W - 1 of them are carried."""

    name = "local_attention"

"""Causal, sliding-window and grouped softmax attention over documents; position encodings are the callers'."""

from .op import attention

__all__ = ["attention"]

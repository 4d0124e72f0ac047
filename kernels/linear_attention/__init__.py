"""Linear attention, optionally with decays or over groups, chunked, with its state in and out; no feature maps."""

from .op import linear_attention, linear_attention_step, linear_attention_summarize

__all__ = ["linear_attention", "linear_attention_step", "linear_attention_summarize"]

"""Linear attention with Based's second-order Taylor feature map, chunked, with its state in and out; no projections."""

from .op import taylor_attention, taylor_attention_step, taylor_attention_summarize

__all__ = ["taylor_attention", "taylor_attention_step", "taylor_attention_summarize"]

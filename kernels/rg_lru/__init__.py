"""The real-gated linear recurrent unit from gate pre-activations to h; not the projections that make them."""

from .op import rg_lru, rg_lru_summarize

__all__ = ["rg_lru", "rg_lru_summarize"]

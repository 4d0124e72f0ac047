"""The two block-diagonal projections that give the RG-LRU its gates, as one op; not the recurrence they feed."""

from .op import gate_projections

__all__ = ["gate_projections"]

"""The short causal depthwise convolution with a carried tail; not the scan it feeds."""

from .op import short_conv

__all__ = ["short_conv"]

"""The root-mean-square norm of the last dim, with a scale stored around zero; not a norm with a mean or a bias."""

from .op import rms_norm

__all__ = ["rms_norm"]

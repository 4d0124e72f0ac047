"""The rotation of queries and keys by their positions' angles, into a new tensor; not the angles."""

from .op import rotary

__all__ = ["rotary"]

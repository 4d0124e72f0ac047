"""Argument checks the ops share: each raises ValueError or TypeError naming the argument and its value."""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import Segments

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Raises unless `tensor` is floating, has `shape` (None matches any size >= 1) and lies on the device of `like`."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}, expected a floating type")
    actual = tuple(tensor.shape)
    if actual != shape and (
        len(actual) != len(shape)
        or any(n < 1 if want is None else n != want for n, want in zip(actual, shape, strict=True))
    ):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(actual)}, expected [{expected}]")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")


def check_segments(segments: Segments | None, like: Tensor) -> None:
    """Raises unless `segments` describe the B rows of T tokens of `like` [B, T, ...] and lie on its device."""
    if segments is None:
        return
    batch, tokens = like.shape[:2]
    if (segments.batch, segments.tokens) != (batch, tokens):
        raise ValueError(
            f"segments describe {segments.batch} rows of {segments.tokens} tokens, expected {batch} of {tokens}"
        )
    if segments.doc_start.device != like.device:
        raise ValueError(f"segments are on {segments.doc_start.device}, expected {like.device}")


def resets_of(segments: Segments | None) -> Tensor | None:
    """bool [B, T], where a recurrence starts afresh; None where the piece is one run of tokens."""
    return None if segments is None else segments.resets


def documents_of(segments: Segments | None) -> Tensor | None:
    """int32 [B, T], the document of each token, as `Segments.documents`; None where the piece is one run of tokens."""
    return None if segments is None else segments.documents

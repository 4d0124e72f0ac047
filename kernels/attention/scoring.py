"""What makes scores of queries and keys; the same for every implementation."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

LOG2_E = math.log2(math.e)
# A key below 2^-48 of its row's largest weight is not met: 2^24 such keys stay under the last bit of fp32.
NEGLIGIBLE = 48.0
# A reach that every distance is below, and a position before every key.
EVERYWHERE, NEVER = 2**29, -(2**30)


class Scoring(NamedTuple):
    """How scores are made of products of queries and keys, and which are kept; see op.py.

    Attributes:
        doc_start: int32 [B, T], each query's document start; None where no document begins.
        slopes: fp32 [H] of ALiBi, or None.
        window: keys a query keeps, or None.
        key_offset: position of the first key.
        scale: factor of the products.
    """

    doc_start: Tensor | None
    slopes: Tensor | None
    window: int | None
    key_offset: int
    scale: float

    def most_keys(self, tokens: int) -> int:
        """The most keys that one of `tokens` queries keeps, were there as many: the window, or all up to the last."""
        every = tokens - self.key_offset
        return every if self.window is None else min(self.window, every)


def statistics_shape(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """[B, Hkv, T * G], how numbers about (token, query head) are laid out: the rows of a key head end to end."""
    return q.shape[0], k.shape[2], q.shape[1] * q.shape[2] // k.shape[2]

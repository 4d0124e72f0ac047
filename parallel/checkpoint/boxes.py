"""Flat ranges of row-major tensors as boxes: the arithmetic behind loading any layout from any other.

Integers only, no tensors. ZeRO owns ranges of flat buffers; a checkpoint names boxes of n-dimensional logical
tensors, because boxes of two layouts intersect in boxes while flat ranges of a slice do not stay ranges of the whole.

Size of the table: a range makes at most 2n - 1 boxes, and cutting the flat buffer of P parameters over R ranks makes at
most P + R ranges, for each of 3 tensors (weight and two moments). Counted for a 7.4B Griffin (P = 527) at 1024 ranks:
13,842 boxes, 0.6 MB of JSON with the files' checksums. So the table is one file, kept file by file inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Box:
    """The elements `offsets` to `offsets + sizes` of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        """How many elements it holds."""
        return math.prod(self.sizes)


def boxes_of_range(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Returns the boxes, at most max(1, 2n - 1), whose elements in row-major order are [start, end) of `shape`.

    A box here is contiguous in the tensor, so box after box the data is the range itself.
    """
    assert 0 <= start <= end <= math.prod(shape), f"range [{start}, {end}) of a tensor of shape {shape}"
    if start == end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, into = divmod(start, row)
    last, over = divmod(end, row)
    if first == last:
        return _in_row(shape, first, into, over)
    head = _in_row(shape, first, into, row) if into else []
    middle = first + bool(into)
    whole = [Box((middle,) + (0,) * len(shape[1:]), (last - middle, *shape[1:]))] if middle < last else []
    tail = _in_row(shape, last, 0, over) if over else []
    return head + whole + tail


def _in_row(shape: tuple[int, ...], index: int, start: int, end: int) -> list[Box]:
    """The boxes of [start, end) of row `index`."""
    return [Box((index, *box.offsets), (1, *box.sizes)) for box in boxes_of_range(shape[1:], start, end)]


def merge(boxes: Iterable[Box]) -> list[Box]:
    """Returns the boxes with neighbours joined wherever the joined data is their data in sequence.

    Two boxes in a row join along the first dim where they differ if they agree everywhere else, touch there, and are
    one element thick in every dim before it.
    """
    merged: list[Box] = []
    for box in boxes:
        merged.append(box)
        while len(merged) > 1 and (joined := _join(merged[-2], merged[-1])):
            merged[-2:] = [joined]
    return merged


def _join(left: Box, right: Box) -> Box | None:
    for dim in range(len(left.sizes)):
        touching = left.offsets[dim] + left.sizes[dim] == right.offsets[dim]
        others = (left.offsets[dim + 1 :], left.sizes[dim + 1 :]) == (right.offsets[dim + 1 :], right.sizes[dim + 1 :])
        if touching and others:
            return Box(left.offsets, (*left.sizes[:dim], left.sizes[dim] + right.sizes[dim], *left.sizes[dim + 1 :]))
        if left.sizes[dim] != 1 or right.sizes[dim] != 1 or left.offsets[dim] != right.offsets[dim]:
            return None
    return None


def boxes_of_ranges(shape: tuple[int, ...], ranges: Iterable[tuple[int, int]]) -> list[Box]:
    """Returns the boxes of several flat ranges of one tensor, in their order, adjacent ranges and boxes merged."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return merge(box for start, end in joined for box in boxes_of_range(shape, start, end))

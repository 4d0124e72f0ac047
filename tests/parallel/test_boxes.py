import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.parallel.checkpoint.boxes import Box, boxes_of_range, boxes_of_ranges, merge

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(SHAPES)
    ends = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, *ends


def elements(shape, box):
    index = np.arange(math.prod(shape)).reshape(shape)
    return index[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))].ravel().tolist()


@settings(max_examples=400, deadline=None)
@given(ranges())
def test_boxes_hold_the_range_in_order_and_are_few(case):
    shape, start, end = case
    boxes = boxes_of_range(shape, start, end)
    assert [e for box in boxes for e in elements(shape, box)] == list(range(start, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.volume for box in boxes)


@settings(max_examples=300, deadline=None)
@given(ranges(), st.lists(st.floats(0, 1), max_size=4))
def test_merged_pieces_of_a_range_hold_it_in_order_and_are_no_more_than_its_boxes(case, cuts):
    shape, start, end = case
    points = sorted({start, end, *(start + int(cut * (end - start)) for cut in cuts)})
    pieces = list(zip(points, points[1:], strict=False))
    assert boxes_of_ranges(shape, pieces) == merge(boxes_of_range(shape, start, end))
    merged = merge(box for a, b in pieces for box in boxes_of_range(shape, a, b))
    assert [e for box in merged for e in elements(shape, box)] == list(range(start, end))


def test_merge_joins_rows_and_leaves_columns_apart():
    assert merge([Box((0, 0), (1, 4)), Box((1, 0), (2, 4))]) == [Box((0, 0), (3, 4))]
    assert merge([Box((2, 0), (1, 2)), Box((2, 2), (1, 2)), Box((3, 0), (1, 4))]) == [Box((2, 0), (2, 4))]
    columns = [Box((0, 0), (2, 2)), Box((0, 2), (2, 2))]
    assert merge(columns) == columns, "joined, their data would no longer follow one another"


def test_the_bound_is_reached():
    assert len(boxes_of_range((4, 4, 4), 1, 63)) == 5


def test_a_range_outside_the_tensor_is_refused():
    with pytest.raises(AssertionError, match=r"\[0, 7\)"):
        boxes_of_range((2, 3), 0, 7)

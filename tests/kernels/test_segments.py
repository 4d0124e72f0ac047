"""Segments: what they say of each token, whole and split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.kernels import Segments


@st.composite
def rows(draw):
    """(lengths, earlier) of one to three rows of one length."""
    tokens = draw(st.integers(2, 20))
    lengths = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=5)))
        lengths.append([b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)])
    return lengths, [draw(st.integers(0, 4)) for _ in lengths]


def test_an_example():
    segments = Segments.from_lengths([[3, 2], [5]], [0, 4])
    assert segments.cu_seqlens.tolist() == [0, 3, 5, 10]
    assert segments.continues.tolist() == [False, True]
    assert segments.resets.tolist() == [[True, False, False, True, False], [False] * 5]
    assert segments.positions.tolist() == [[0, 1, 2, 0, 1], [4, 5, 6, 7, 8]]
    assert segments.documents.tolist() == [[1, 1, 1, 2, 2], [0] * 5]
    assert (segments.batch, segments.tokens) == (2, 5)


def test_whole_rows_begin_documents():
    segments = Segments.whole(2, 3)
    assert segments.resets.tolist() == [[True, False, False]] * 2
    assert segments.cu_seqlens.dtype == segments.doc_start.dtype == torch.int32


@given(rows())
@settings(max_examples=50, deadline=None)
def test_a_reset_is_position_zero(case):
    segments = Segments.from_lengths(*case)
    assert torch.equal(segments.resets, segments.positions == 0)
    starts = segments.cu_seqlens[:-1].tolist()
    assert set(range(0, segments.batch * segments.tokens, segments.tokens)) <= set(starts)


@given(rows(), st.data())
@settings(max_examples=50, deadline=None)
def test_pieces_say_the_same_as_the_whole(case, data):
    segments = Segments.from_lengths(*case)
    cut = data.draw(st.integers(1, segments.tokens - 1))
    pieces = [segments.split(0, cut), segments.split(cut, segments.tokens)]
    assert torch.equal(torch.cat([p.resets for p in pieces], 1), segments.resets)
    assert torch.equal(torch.cat([p.positions for p in pieces], 1), segments.positions)
    assert pieces[1].continues.tolist() == (segments.positions[:, cut] > 0).tolist()
    for piece in pieces:
        assert piece.cu_seqlens[-1] == piece.batch * piece.tokens
        assert (piece.cu_seqlens.diff() > 0).all()


def test_rows_of_different_length_are_refused():
    with pytest.raises(AssertionError, match="different length"):
        Segments.from_lengths([[3], [2]])

"""Linear attention across groups in Triton: a walk from group to group, with one state and no quadratic form.

A token sees only the groups completed before its own, so all tokens of a group read one state, to which they are added
afterwards. Groups begin anywhere, at every document anew; `mark_groups` lists where. A row is cut in spans of tokens,
and the groups that begin in a span are a piece. The first group walked is a piece of its own: behind it the open part
of the state that entered joins the rest, which kernel.py does as it folds pieces. The passes are kernel.py's.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import cdiv
from .walks import (
    add_to_state,
    factors_of,
    id_of,
    load_state,
    minus_products,
    put_rows,
    rows_of,
    scalars_of,
    state_of,
    store_state,
)

BLOCK = 1024


class Groups(NamedTuple):
    """The groups of rows.

    Attributes:
        ids: int32 [B, T], each token's group, numbered one after the other; 0 entered.
        marks: int32 [B, T + 2], of each group up to one beyond the last, behind which nothing is written: twice its
            first token, and 1 where that begins a document. Group 0 begins at the first token, as group 1 does where
            no group entered.
        size: no group has more tokens.
    """

    ids: Tensor
    marks: Tensor
    size: int


@triton.jit
def _mark(p_ids, p_documents, p_marks, tokens, BLOCK: tl.constexpr):
    i_row = tl.program_id(1)
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_id = id_of(p_ids, i_row, o_t, tokens)
    b_mark = 2 * o_t
    if p_documents is not None:
        same = id_of(p_documents, i_row, o_t, tokens) == id_of(p_documents, i_row, o_t - 1, tokens)
        b_mark += tl.where(same, 0, 1)
    begins = b_id != id_of(p_ids, i_row, o_t - 1, tokens)
    p_row = p_marks + i_row.to(tl.int64) * (tokens + 2)
    tl.store(p_row + b_id, b_mark, mask=begins & (o_t < tokens))
    tl.store(p_row + o_t, tl.zeros_like(o_t), mask=o_t == 0)
    tl.store(p_row + b_id + 1, 2 * tokens + tl.zeros_like(o_t), mask=o_t == tokens - 1)


@triton.jit
def mark_of(p_marks, i_row, i_group, tokens):
    """(a group's first token, 1 where that begins a document)."""
    mark = tl.load(p_marks + i_row.to(tl.int64) * (tokens + 2) + i_group)
    return mark // 2, mark % 2


@triton.jit
def groups_of_piece(p_ids, i_row, i_piece, span, pieces, tokens, REVERSE: tl.constexpr):
    """(first, end) of the groups of one of `pieces`: of those that begin in a span, or of the first one walked."""
    if REVERSE:
        i_span, alone = i_piece, pieces - 1
        most = id_of(p_ids, i_row, tokens - 1, tokens)
    else:
        i_span, alone = i_piece - 1, 0
        most = tokens + 1
    begin = i_span * span
    end = tl.minimum(id_of(p_ids, i_row, begin + span - 1, tokens) + 1, most)
    first = tl.where((begin == 0) & REVERSE, 0, id_of(p_ids, i_row, begin - 1, tokens) + 1)
    first = tl.where(i_piece == alone, most if REVERSE else 0, tl.minimum(first, end))
    return first, tl.where(i_piece == alone, first + 1, end)


@triton.jit
def _read(
    p_x,
    p_out,
    p_result,
    p_inverse,
    p_drop,
    b_s,
    b_z,
    begin,
    stop,
    i_row,
    i_head,
    o_x,
    o_u,
    scale,
    eps,
    tokens,
    heads,
    x_dim: tl.constexpr,
    u_dim: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """out of the tokens from `begin` to `stop`, C at most; from left to right also their inverse, or their drop."""
    o_t = begin + tl.arange(0, C)
    # Every block of columns finds the same; the first one writes it.
    here = (o_t < stop) & (tl.program_id(0) == 0)
    b_x = rows_of(p_x, i_row, i_head, begin, stop, o_x, tokens, heads, x_dim, C)
    b_o = tl.dot(b_x.to(OPERAND), b_s.to(OPERAND), input_precision=PRECISION)
    at = (i_row * heads + i_head).to(tl.int64) * tokens + o_t
    b_rate = tl.full([C], 1.0, tl.float32)
    if NORMALIZE and TRANSPOSED:
        # What x has for the normaliser's row.
        b_e = b_rate
        if not REVERSE:
            b_e = minus_products(b_x, p_result, i_row, i_head, begin, stop, o_x, tokens, heads, x_dim, C)
            tl.store(p_drop + at, -b_e, mask=here)
        b_o += b_e[:, None] * b_z[None, :]
    if not REVERSE:
        if NORMALIZE and not TRANSPOSED:
            # No weight: y is 0 and, by an inverse of 0, nothing flows back.
            b_sum = tl.sum(b_x.to(tl.float32) * b_z[None, :], 1)
            b_rate = tl.where(b_sum == 0.0, 0.0, 1.0 / (scale * b_sum + eps))
            tl.store(p_inverse + at, b_rate, mask=here)
        elif p_inverse is not None:
            b_rate = scalars_of(p_inverse, i_row * heads + i_head, o_t, tokens)
        b_o *= scale * b_rate[:, None]
    put_rows(p_out, b_o, i_row, i_head, begin, stop, o_u, tokens, heads, u_dim, C)


@triton.jit
def _add(
    p_y,
    p_u,
    p_result,
    p_inverse,
    p_drop,
    b_s,
    b_z,
    begin,
    stop,
    i_row,
    i_y,
    o_x,
    o_u,
    scale,
    tokens,
    heads,
    x_dim: tl.constexpr,
    u_dim: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state and the normaliser's with the tokens from `begin` to `stop` of a head, C at most."""
    b_y = rows_of(p_y, i_row, i_y, begin, stop, o_x, tokens, heads, x_dim, C)
    b_u = rows_of(p_u, i_row, i_y, begin, stop, o_u, tokens, heads, u_dim, C)
    b_w, b_f = factors_of(
        b_y, p_result, p_inverse, p_drop, scale, i_row, i_y, begin, stop, o_x, tokens, heads, x_dim, C, NORMALIZE,
        REVERSE
    )  # fmt: skip
    return add_to_state(b_s, b_z, b_y, b_u, b_w, b_f, REVERSE, NORMALIZE, TRANSPOSED, OPERAND, PRECISION)


@triton.jit
def walk_groups(
    p_x,
    p_y,
    p_u,
    p_out,
    p_twin,
    p_twin_out,
    p_result,
    p_inverse,
    p_drop,
    p_groups,
    p_marks,
    p_entering,
    p_opened,
    p_leaving,
    scale,
    eps,
    tokens,
    heads,
    x_dim: tl.constexpr,
    u_dim: tl.constexpr,
    width,
    span,
    pieces,
    skip,
    C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SHARED: tl.constexpr,
    SHARING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
):
    """What kernel.py's `_walk` does, of the same arguments, from group to group.

    Args:
        p_groups, p_marks: of Groups.
        p_opened: [B, Hkv, K, W], the open part of the state that enters the row, for LAST.
        skip: the first of the pieces that programs walk.
        DOCUMENTS: rows have documents, which groups may begin.
        WHOLE: no group has more than C tokens.
        LAST: the last group walked of the row, alone, as one piece, and the open part if it entered that group.
    """
    i_head = tl.program_id(1) % heads
    i_row = tl.program_id(1) // heads
    i_piece = tl.program_id(2) + skip
    y_heads = heads // SHARED * SHARING
    i_state, o_x, o_u, size, place = state_of(heads, width, x_dim, u_dim, BLOCK_X, BLOCK_U, SHARED, TRANSPOSED)
    b_s, b_z = load_state(p_entering, i_state * pieces + i_piece, size, place, NORMALIZE)
    if LAST:
        i_last = id_of(p_groups, i_row, tokens - 1, tokens)
        first = tl.where(REVERSE, 0, i_last)
        end = first + 1
    else:
        first, end = groups_of_piece(p_groups, i_row, i_piece, span, pieces, tokens, REVERSE)
    for i in range(0, end - first):
        i_group = end - 1 - i if REVERSE else first + i
        begin, fresh = mark_of(p_marks, i_row, i_group, tokens)
        stop, _ = mark_of(p_marks, i_row, i_group + 1, tokens)
        kept = (1 - fresh).to(tl.float32)
        if DOCUMENTS and not REVERSE:
            b_s *= kept
            b_z *= kept
        if p_out is not None:
            for i_chunk in range(0, 1 if WHOLE else tl.cdiv(stop - begin, C)):
                _read(
                    p_x, p_out, p_result, p_inverse, p_drop, b_s, b_z, begin + i_chunk * C, stop, i_row, i_head, o_x,
                    o_u, scale, eps, tokens, heads, x_dim, u_dim, C, NORMALIZE, TRANSPOSED, OPERAND, PRECISION, REVERSE
                )  # fmt: skip
                if p_twin is not None:
                    _read(
                        p_twin, p_twin_out, p_result, p_inverse, p_drop, tl.trans(b_s), b_z, begin + i_chunk * C, stop,
                        i_row, i_head, o_u, o_x, scale, eps, tokens, heads, u_dim, x_dim, C, NORMALIZE, True, OPERAND,
                        PRECISION, REVERSE
                    )  # fmt: skip
        if p_y is not None:
            for i_shared in range(0, SHARING):
                i_y = i_head // SHARED * SHARING + i_shared
                for i_chunk in range(0, 1 if WHOLE else tl.cdiv(stop - begin, C)):
                    b_s, b_z = _add(
                        p_y, p_u, p_result, p_inverse, p_drop, b_s, b_z, begin + i_chunk * C, stop, i_row, i_y, o_x,
                        o_u, scale, tokens, y_heads, x_dim, u_dim, C, NORMALIZE, TRANSPOSED, OPERAND, PRECISION, REVERSE
                    )  # fmt: skip
        if DOCUMENTS and REVERSE:
            b_s *= kept
            b_z *= kept
    if LAST and p_opened is not None:
        b_more, b_more_z = load_state(p_opened, i_state, size, place, NORMALIZE)
        entered = (i_last == 0).to(tl.float32)
        b_s += entered * b_more
        b_z += entered * b_more_z
    store_state(p_leaving, i_state * pieces + i_piece, size, place, b_s, b_z, NORMALIZE)


def mark_groups(ids: Tensor, documents: Tensor | None, size: int) -> Groups:
    """The groups of contiguous ids and documents [B, T], none of more than `size` tokens."""
    batch, tokens = ids.shape
    marks = torch.empty(batch, tokens + 2, dtype=torch.int32, device=ids.device)
    _mark[(cdiv(tokens, BLOCK), batch)](ids, documents, marks, tokens, BLOCK=BLOCK, num_warps=4)
    return Groups(ids, marks, size)

"""What the walks of linear attention share: what they read of tokens, and how a state lies in memory."""

# The types of jitted functions are beyond a type checker.
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(pointer, i_row, i_head, begin, stop, o_d, tokens, heads, dim, C: tl.constexpr):
    """[C, D] of tokens begin to stop of a head of a row, from [B, T, heads, dim]; zeros beyond."""
    # Only the chunk's own place takes 64 bits.
    base = pointer + ((i_row.to(tl.int64) * tokens + begin) * heads + i_head) * dim
    o_c = tl.arange(0, C)
    mask = (begin + o_c < stop)[:, None] & (o_d[None, :] < dim)
    return tl.load(base + (o_c * (heads * dim))[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def put_rows(pointer, b, i_row, i_head, begin, stop, o_d, tokens, heads, dim, C: tl.constexpr):
    """The inverse of `rows_of`."""
    base = pointer + ((i_row.to(tl.int64) * tokens + begin) * heads + i_head) * dim
    o_c = tl.arange(0, C)
    mask = (begin + o_c < stop)[:, None] & (o_d[None, :] < dim)
    # In 32 bits, but for the chunk's own place.
    o_row = (o_c * (heads * dim))[:, None] + o_d[None, :]
    tl.store(base + o_row, b.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def minus_products(b, p_other, i_row, i_head, begin, stop, o_d, tokens, heads, dim, C: tl.constexpr):
    """-(b . other) [C], token by token, of b [C, D] and the same rows of another tensor."""
    b_other = rows_of(p_other, i_row, i_head, begin, stop, o_d, tokens, heads, dim, C)
    return -tl.sum(b.to(tl.float32) * b_other.to(tl.float32), 1)


@triton.jit
def scalars_of(pointer, i, o_t, tokens):
    """[C] of row i from [rows, T]; zeros beyond the end."""
    return tl.load(pointer + i.to(tl.int64) * tokens + o_t, mask=o_t < tokens, other=0.0)


@triton.jit
def id_of(p_ids, i_row, o_t, tokens):
    """The document or group of token or tokens o_t: of the last token beyond the end, 0 before the first."""
    at = p_ids + i_row.to(tl.int64) * tokens + tl.minimum(tl.maximum(o_t, 0), tokens - 1)
    return tl.where(o_t < 0, 0, tl.load(at))


@triton.jit
def factors_of(
    b_y,
    p_result,
    p_inverse,
    p_drop,
    scale,
    i_row,
    i_y,
    begin,
    stop,
    o_x,
    tokens,
    heads,
    x_dim: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """(the factor of y that is its query's, what y has for the normaliser); both 1 from left to right."""
    b_w = tl.full([C], 1.0, tl.float32)
    b_f = b_w
    if REVERSE:
        o_t = begin + tl.arange(0, C)
        b_w *= scale
        if p_inverse is not None:
            b_w *= scalars_of(p_inverse, i_row * heads + i_y, o_t, tokens)
        if NORMALIZE:
            if p_drop is not None:
                b_f = -scalars_of(p_drop, i_row * heads + i_y, o_t, tokens)
            else:
                b_f = minus_products(b_y, p_result, i_row, i_y, begin, stop, o_x, tokens, heads, x_dim, C)
    return b_w, b_f


@triton.jit
def add_to_state(
    b_s,
    b_z,
    b_y,
    b_u,
    b_w,
    b_f,
    WEIGHED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state and the normaliser's with y u^T of tokens, each times its b_w, which is 1 unless WEIGHED."""
    if NORMALIZE:
        b_part = (b_u if TRANSPOSED else b_y).to(tl.float32) * (b_w * b_f)[:, None]
        b_z += tl.sum(b_part, 0)
    if WEIGHED:
        b_u = b_u.to(tl.float32) * b_w[:, None]
    return tl.dot(tl.trans(b_y).to(OPERAND), b_u.to(OPERAND), b_s, input_precision=PRECISION), b_z


@triton.jit
def state_of(
    heads,
    width,
    x_dim: tl.constexpr,
    u_dim: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """(which of [B, Hkv] a program walks with, its rows, its columns, the numbers of a state, a place in one).

    The place is four: of the block's numbers and whether each is one, of the normaliser's and whether each is one.
    """
    i_state = (tl.program_id(1) // heads * (heads // SHARED) + tl.program_id(1) % heads // SHARED).to(tl.int64)
    o_x = tl.arange(0, BLOCK_X)
    o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    in_s = (o_x[:, None] < x_dim) & (o_u[None, :] < u_dim)
    if TRANSPOSED:
        o_s = o_x[:, None] + o_u[None, :] * width
        o_z, in_z = o_u * width + width - 1, o_u < u_dim
    else:
        o_s = o_x[:, None] * width + o_u[None, :]
        o_z, in_z = o_x * width + width - 1, o_x < x_dim
    return i_state, o_x, o_u, (u_dim if TRANSPOSED else x_dim) * width, (o_s, in_s, o_z, in_z)


@triton.jit
def load_state(p_states, i, size, place, NORMALIZE: tl.constexpr):
    """(the block of state i of [..., K, W], the normaliser's numbers); zeros where p_states is None."""
    o_s, in_s, o_z, in_z = place
    b_s = tl.zeros(o_s.shape, tl.float32)
    b_z = tl.zeros(o_z.shape, tl.float32)
    if p_states is not None:
        b_s = tl.load(p_states + i * size + o_s, mask=in_s, other=0.0)
        if NORMALIZE:
            b_z = tl.load(p_states + i * size + o_z, mask=in_z, other=0.0)
    return b_s, b_z


@triton.jit
def store_state(p_states, i, size, place, b_s, b_z, NORMALIZE: tl.constexpr):
    """The inverse of `load_state`."""
    if p_states is not None:
        o_s, in_s, o_z, in_z = place
        tl.store(p_states + i * size + o_s, b_s.to(p_states.dtype.element_ty), mask=in_s)
        if NORMALIZE:
            tl.store(p_states + i * size + o_z, b_z.to(p_states.dtype.element_ty), mask=in_z)

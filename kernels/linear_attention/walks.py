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
def scalars_of(pointer, i, o_t, tokens):
    """[C] of row i from [rows, T]; zeros beyond the end."""
    return tl.load(pointer + i.to(tl.int64) * tokens + o_t, mask=o_t < tokens, other=0.0)


@triton.jit
def id_of(p_ids, i_row, o_t, tokens):
    """The document or group of token or tokens o_t: of the last token beyond the end, 0 before the first."""
    at = p_ids + i_row.to(tl.int64) * tokens + tl.minimum(tl.maximum(o_t, 0), tokens - 1)
    return tl.where(o_t < 0, 0, tl.load(at))


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

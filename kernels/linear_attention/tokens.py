"""What the walks of linear attention read of tokens: rows of a head, numbers of a head, documents and groups."""

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

"""Taylor attention in Triton: states between chunks first, then all chunks at once, no talk between programs.

A chunk's outputs are a quadratic form inside it, weights 1 + s + s^2 / 2 by two small matrix products, plus the
features of its queries on the state that enters it. `_states` walks pieces of the sequence with a block of features in
registers and leaves the state of every chunk in memory, 16-bit for bf16 inputs: at chunks of 128 a little more than v
weighs. Where rows and heads alone do not fill the GPU it runs twice, first to summarise the pieces. The backward pass
walks the adjoint state from right to left by the same kernel, with q for k and the gradient of the sums for v, and
recomputes everything else.

Features are never stored. Each is a product of two entries of [x, 1], which a matrix product with a constant 0/1 matrix
lays out where the next product wants them; the transposed matrix takes their gradient back. So the 153 packed terms of
K = 16 cost 160 or 192 columns. The coefficients of the Taylor series multiply states, not features.

The normaliser is fp32 throughout. bf16 inputs are multiplied as bf16, fp16 as tf32 (states may exceed fp16), fp32 as
fp32. Every sum has one fixed order, so bits repeat. Tokens' documents are numbered from 0, the one that entered.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportReturnType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import features

# Entries of the tables that stand for the constant 1 and for no feature at all.
ONE, NONE = -1, -2
# Programs of `_states` that fill a GPU of 132 SMs.
PROGRAMS = 396
# Most tokens a chunk for 16-bit and for wider operands, whose tiles take twice the room.
CHUNK, WIDE_CHUNK = 128, 32
# Features a block likewise; bf16 takes the narrow one where it alone makes `_states` fill the GPU.
BLOCK, WIDE_BLOCK = 64, 32
# Rows a warp. Triton lays all warps of a product that feeds another along its rows; 8 on 64 rows, which leaves half of
# them none, gave a wrong dq on an H100.
WARP_ROWS = 16
STATE_WARPS = 4


@dataclass(frozen=True)
class Plan:
    """How [B, T, H, K] and [B, T, H, V] are cut, and what the kernels multiply in."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    block: int
    chunks: int
    pieces: int
    warps: int
    operand: Any
    precision: str
    device: torch.device

    @property
    def features(self) -> int:
        """F, the packed terms."""
        return features(self.key_dim)

    @property
    def padded(self) -> int:
        """F filled up to whole blocks."""
        return triton.cdiv(self.features, self.block) * self.block

    @property
    def per_piece(self) -> int:
        """Chunks a piece."""
        return triton.cdiv(self.chunks, self.pieces)

    @property
    def shape(self) -> dict[str, Any]:
        """What every kernel takes."""
        return {
            "tokens": self.tokens,
            "heads": self.heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "C": self.chunk,
            "BLOCK_K": max(16, triton.next_power_of_2(self.key_dim)),
            "BLOCK_V": max(16, triton.next_power_of_2(self.value_dim)),
            "BLOCK_F": self.block,
            "F_PADDED": self.padded,
            "OPERAND": self.operand,
            "PRECISION": self.precision,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Programs by chunk, and by row and head."""
        return self.chunks, self.batch * self.heads


def plan(k: Tensor, v: Tensor) -> Plan:
    """The cut for inputs: chunks by their dtype, pieces enough to fill the GPU."""
    batch, tokens, heads, key_dim = k.shape
    narrow = k.dtype == torch.bfloat16
    chunk = min(CHUNK if narrow else WIDE_CHUNK, max(16, triton.next_power_of_2(tokens)))
    chunks = triton.cdiv(tokens, chunk)
    few, many = (batch * heads * triton.cdiv(features(key_dim), b) for b in (BLOCK, WIDE_BLOCK))
    broad = narrow and not few < PROGRAMS <= many
    block, programs = (BLOCK, few) if broad else (WIDE_BLOCK, many)
    pieces = min(chunks, triton.cdiv(PROGRAMS, programs))
    pieces = triton.cdiv(chunks, triton.cdiv(chunks, pieces))
    warps = max(4, chunk // WARP_ROWS)
    # The interpreter multiplies the bits of bf16; there the operands are fp32.
    operand = tl.bfloat16 if narrow and k.is_cuda else tl.float32
    precision = "ieee" if k.dtype == torch.float32 else "tf32"
    return Plan(
        batch, tokens, heads, key_dim, v.shape[3], chunk, block, chunks, pieces, warps, operand, precision, k.device
    )


@functools.cache
def _pairs(key_dim: int, padded: int, device: torch.device) -> Tensor:
    """int32 [2, padded], the two entries whose product a feature is, in the order of the state."""
    one = torch.full((1 + key_dim,), ONE)
    i, j = torch.triu_indices(key_dim, key_dim)
    first, second = torch.cat([one[:1], torch.arange(key_dim), i]), torch.cat([one, j])
    pairs = torch.full((2, padded), NONE, dtype=torch.int32)
    pairs[:, : len(first)] = torch.stack([first, second])
    return pairs.to(device)


@triton.jit
def _rows(pointer, o_t, o_x, tokens, heads, width, TRANSPOSED: tl.constexpr):
    """[C, X] of this program's row and head from [B, T, H, width] in fp32, or its transpose; zeros beyond the ends."""
    i_head = tl.program_id(1)
    base = pointer + ((i_head // heads).to(tl.int64) * tokens * heads + i_head % heads) * width
    o_t64 = o_t.to(tl.int64) * heads * width
    if TRANSPOSED:
        at, mask = o_t64[None, :] + o_x[:, None], (o_t[None, :] < tokens) & (o_x[:, None] < width)
    else:
        at, mask = o_t64[:, None] + o_x[None, :], (o_t[:, None] < tokens) & (o_x[None, :] < width)
    return tl.load(base + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, b, o_t, o_x, tokens, heads, width):
    i_head = tl.program_id(1)
    base = pointer + ((i_head // heads).to(tl.int64) * tokens * heads + i_head % heads) * width
    at, mask = (
        o_t.to(tl.int64)[:, None] * heads * width + o_x[None, :],
        (o_t[:, None] < tokens) & (o_x[None, :] < width),
    )
    tl.store(base + at, b.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scalars(pointer, o_t, tokens):
    """[C] of this program's row and head from [B, H, T]; zeros beyond the end."""
    base = pointer + tl.program_id(1).to(tl.int64) * tokens
    return tl.load(base + o_t, mask=o_t < tokens, other=0.0)


@triton.jit
def _document(p_ids, o_t, tokens, heads):
    """The document of token or tokens o_t: of the last token beyond the end, 0 before the first."""
    base = p_ids + (tl.program_id(1) // heads).to(tl.int64) * tokens
    return tl.where(o_t < 0, 0, tl.load(base + tl.minimum(tl.maximum(o_t, 0), tokens - 1)))


@triton.jit
def _weights(p_pairs, o_f, scale, F_PADDED: tl.constexpr):
    """[F] coefficients of the query's features: scale to the power of the order, halved for squares."""
    first = tl.load(p_pairs + o_f)
    second = tl.load(p_pairs + F_PADDED + o_f)
    weight = tl.where(first == second, 0.5 * scale * scale, scale * scale)
    return tl.where(first == -2, 0.0, tl.where(first == -1, 1.0, tl.where(second == -1, scale, weight)))


@triton.jit
def _choice(p_pairs, o_f, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(0/1 matrix [K, F], or [F, K] transposed, that picks each feature's entry; [F], 1 where the entry is the one)."""
    entry = tl.load(p_pairs + o_f)
    o_k = tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        chosen = entry[:, None] == o_k[None, :]
    else:
        chosen = entry[None, :] == o_k[:, None]
    return chosen.to(tl.float32).to(OPERAND), (entry == -1).to(tl.float32)


@triton.jit
def _states(
    p_x,
    p_u,
    p_inverse,
    p_drop,
    p_ids,
    p_pairs,
    p_initial,
    p_summary,
    p_states,
    p_sums,
    p_last,
    scale,
    tokens,
    heads,
    key_dim,
    value_dim,
    terms,
    chunks,
    per_piece,
    pieces,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The states S = sum of features(x) u^T and the sums z = sum of features(x) * c that enter each chunk.

    Forward x, u and c are k, v and 1. In reverse they are q and the gradients of its sums, dy * inverse and -drop, and
    state is what flows into a chunk from its right.

    Without p_states only what a piece adds to a state of zeros is left, in p_summary [B, H, pieces, F, V + 1]. With
    it, the states times the coefficients go to p_states [B, H, chunks, F, V] and p_sums [B, H, chunks, F], and the
    state that leaves the row to p_last, times the coefficients in reverse: the gradient of the initial state.
    """
    i_head = tl.program_id(1)
    i_piece = tl.program_id(2)
    o_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    in_f = o_f < terms
    b_weight = _weights(p_pairs, o_f, scale, F_PADDED)
    b_first, b_one = _choice(p_pairs, o_f, BLOCK_K, OPERAND, True)
    b_second, b_other = _choice(p_pairs + F_PADDED, o_f, BLOCK_K, OPERAND, True)
    o_state = o_f[:, None] * (value_dim + 1) + o_v[None, :]
    in_state = in_f[:, None] & (o_v[None, :] < value_dim)
    o_sum = o_f * (value_dim + 1) + value_dim
    size = terms.to(tl.int64) * (value_dim + 1)
    b_s = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    b_z = tl.zeros([BLOCK_F], tl.float32)
    count = tl.minimum(per_piece, chunks - i_piece * per_piece)
    begin = i_piece * per_piece
    if p_states is not None:
        # The document that comes with the state, and what came with it from afar.
        anchor = begin * C - 1
        if REVERSE:
            anchor = tl.minimum((begin + count) * C, tokens) - 1
        if p_initial is not None:
            kept = 1.0
            if p_ids is not None:
                entered = _document(p_ids, tokens - 1, tokens, heads) if REVERSE else 0
                kept = (_document(p_ids, anchor, tokens, heads) == entered).to(tl.float32)
            b_s = kept * tl.load(p_initial + i_head * size + o_state, mask=in_state, other=0.0)
            b_z = kept * tl.load(p_initial + i_head * size + o_sum, mask=in_f, other=0.0)
            if REVERSE:
                b_rate = tl.where(in_f, 1.0 / tl.where(in_f, b_weight, 1.0), 0.0)
                b_s *= b_rate[:, None]
                b_z *= b_rate
        if p_summary is not None:
            for i in range(0, pieces - 1 - i_piece if REVERSE else i_piece):
                j = pieces - 1 - i if REVERSE else i
                kept = 1.0
                if p_ids is not None:
                    edge = j * per_piece * C - 1 if REVERSE else (j + 1) * per_piece * C - 1
                    same = _document(p_ids, anchor, tokens, heads) == _document(p_ids, edge, tokens, heads)
                    kept = same.to(tl.float32)
                p_piece = p_summary + (i_head.to(tl.int64) * pieces + j) * size
                b_s += kept * tl.load(p_piece + o_state, mask=in_state, other=0.0)
                b_z += kept * tl.load(p_piece + o_sum, mask=in_f, other=0.0)
    for i in range(0, count):
        i_chunk = begin + (count - 1 - i if REVERSE else i)
        o_t = i_chunk * C + tl.arange(0, C)
        live = o_t < tokens
        b_x = _rows(p_x, o_t, o_k, tokens, heads, key_dim, True).to(OPERAND)
        b_u = _rows(p_u, o_t, o_v, tokens, heads, value_dim, False)
        b_c = live.to(tl.float32)
        if p_inverse is not None:
            b_u *= _scalars(p_inverse, o_t, tokens)[:, None]
            b_c = -_scalars(p_drop, o_t, tokens)
        elif REVERSE:
            b_c = tl.zeros([C], tl.float32)
        kept = 1.0
        if p_ids is not None:
            before = _document(p_ids, i_chunk * C - 1, tokens, heads)
            last = _document(p_ids, i_chunk * C + C - 1, tokens, heads)
            b_goes = _document(p_ids, o_t, tokens, heads) == (before if REVERSE else last)
            b_u = tl.where(b_goes[:, None], b_u, 0.0)
            b_c = tl.where(b_goes, b_c, 0.0)
            kept = (before == last).to(tl.float32)
        if p_states is not None:
            at = (i_head.to(tl.int64) * chunks + i_chunk) * F_PADDED
            p_at = p_states + at * value_dim + o_f[:, None] * value_dim + o_v[None, :]
            b_out = b_weight[:, None] * b_s
            tl.store(p_at, b_out.to(p_states.dtype.element_ty), mask=o_v[None, :] < value_dim)
            tl.store(p_sums + at + o_f, b_weight * b_z)
        b_phi = tl.dot(b_first, b_x, input_precision=PRECISION) + b_one[:, None]
        b_phi *= tl.dot(b_second, b_x, input_precision=PRECISION) + b_other[:, None]
        if p_ids is not None:
            b_s *= kept
            b_z *= kept
        b_z += tl.sum(b_phi * b_c[None, :], 1)
        b_s = tl.dot(b_phi.to(OPERAND), b_u.to(OPERAND), b_s, input_precision=PRECISION)
    if p_states is None:
        p_out = p_summary + (i_head.to(tl.int64) * pieces + i_piece) * size
        tl.store(p_out + o_state, b_s, mask=in_state)
        tl.store(p_out + o_sum, b_z, mask=in_f)
    elif i_piece == (0 if REVERSE else pieces - 1):
        if REVERSE:
            b_s *= b_weight[:, None]
            b_z *= b_weight
        tl.store(p_last + i_head * size + o_state, b_s, mask=in_state)
        tl.store(p_last + i_head * size + o_sum, b_z, mask=in_f)


@triton.jit
def _outputs(
    p_q,
    p_k,
    p_v,
    p_ids,
    p_pairs,
    p_states,
    p_sums,
    p_y,
    p_inverse,
    scale,
    eps,
    tokens,
    heads,
    key_dim,
    value_dim,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of a chunk, and the inverse of its normaliser [B, H, T] where p_inverse is given."""
    i_chunk = tl.program_id(0)
    o_t = i_chunk * C + tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    b_q = _rows(p_q, o_t, o_k, tokens, heads, key_dim, False).to(OPERAND)
    b_k = _rows(p_k, o_t, o_k, tokens, heads, key_dim, True).to(OPERAND)
    b_v = _rows(p_v, o_t, o_v, tokens, heads, value_dim, False).to(OPERAND)
    live = o_t[:, None] >= o_t[None, :]
    if p_ids is not None:
        b_here = _document(p_ids, o_t, tokens, heads)
        live &= b_here[:, None] == b_here[None, :]
        b_seen = b_here == _document(p_ids, i_chunk * C - 1, tokens, heads)
    b_p = scale * tl.dot(b_q, b_k, input_precision=PRECISION)
    b_p = tl.where(live, 1.0 + b_p + 0.5 * b_p * b_p, 0.0)
    b_sum = tl.sum(b_p, 1)
    b_y = tl.dot(b_p.to(OPERAND), b_v, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_chunk) * F_PADDED
    for i in range(0, F_PADDED // BLOCK_F):
        o_f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        b_first, b_one = _choice(p_pairs, o_f, BLOCK_K, OPERAND, False)
        b_second, b_other = _choice(p_pairs + F_PADDED, o_f, BLOCK_K, OPERAND, False)
        p_at = p_states + at * value_dim + o_f[:, None] * value_dim + o_v[None, :]
        b_s = tl.load(p_at, mask=o_v[None, :] < value_dim, other=0.0).to(tl.float32).to(OPERAND)
        b_phi = tl.dot(b_q, b_first, input_precision=PRECISION) + b_one[None, :]
        b_phi *= tl.dot(b_q, b_second, input_precision=PRECISION) + b_other[None, :]
        if p_ids is not None:
            b_phi = tl.where(b_seen[:, None], b_phi, 0.0)
        if p_inverse is not None:
            b_sum += tl.sum(b_phi * tl.load(p_sums + at + o_f)[None, :], 1)
        b_y = tl.dot(b_phi.to(OPERAND), b_s, b_y, input_precision=PRECISION)
    if p_inverse is not None:
        b_inverse = 1.0 / (b_sum + eps)
        b_y *= b_inverse[:, None]
        tl.store(p_inverse + tl.program_id(1).to(tl.int64) * tokens + o_t, b_inverse, mask=o_t < tokens)
    _store_rows(p_y, b_y, o_t, o_v, tokens, heads, value_dim)


@triton.jit
def _drops(p_y, p_dy, p_inverse, p_drop, tokens, heads, value_dim, C: tl.constexpr, BLOCK_V: tl.constexpr):
    """drop_t = inverse_t * dy_t . y_t, minus the gradient of the normaliser."""
    o_t = tl.program_id(0) * C + tl.arange(0, C)
    o_v = tl.arange(0, BLOCK_V)
    b_y = _rows(p_y, o_t, o_v, tokens, heads, value_dim, False)
    b_dy = _rows(p_dy, o_t, o_v, tokens, heads, value_dim, False)
    b_drop = tl.sum(b_y * b_dy, 1) * _scalars(p_inverse, o_t, tokens)
    tl.store(p_drop + tl.program_id(1).to(tl.int64) * tokens + o_t, b_drop, mask=o_t < tokens)


@triton.jit
def _query_gradients(
    p_q,
    p_k,
    p_v,
    p_dy,
    p_inverse,
    p_drop,
    p_ids,
    p_pairs,
    p_states,
    p_sums,
    p_dq,
    scale,
    tokens,
    heads,
    key_dim,
    value_dim,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a chunk: through its own scores, and through its features by the state that enters."""
    i_chunk = tl.program_id(0)
    o_t = i_chunk * C + tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    b_q = _rows(p_q, o_t, o_k, tokens, heads, key_dim, False).to(OPERAND)
    b_k = _rows(p_k, o_t, o_k, tokens, heads, key_dim, False).to(OPERAND)
    b_v = _rows(p_v, o_t, o_v, tokens, heads, value_dim, True).to(OPERAND)
    b_dy = _rows(p_dy, o_t, o_v, tokens, heads, value_dim, False).to(OPERAND)
    live = o_t[:, None] >= o_t[None, :]
    if p_ids is not None:
        b_here = _document(p_ids, o_t, tokens, heads)
        live &= b_here[:, None] == b_here[None, :]
        b_seen = b_here == _document(p_ids, i_chunk * C - 1, tokens, heads)
    b_dw = tl.dot(b_dy, b_v, input_precision=PRECISION)
    if p_inverse is not None:
        b_inverse = _scalars(p_inverse, o_t, tokens)
        b_drop = _scalars(p_drop, o_t, tokens)
        b_dw = b_dw * b_inverse[:, None] - b_drop[:, None]
    b_ds = 1.0 + scale * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_ds = tl.where(live, scale * b_ds * b_dw, 0.0)
    b_dq = tl.dot(b_ds.to(OPERAND), b_k, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_chunk) * F_PADDED
    for i in range(0, F_PADDED // BLOCK_F):
        o_f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        b_first, b_one = _choice(p_pairs, o_f, BLOCK_K, OPERAND, False)
        b_second, b_other = _choice(p_pairs + F_PADDED, o_f, BLOCK_K, OPERAND, False)
        p_at = p_states + at * value_dim + o_f[:, None] * value_dim + o_v[None, :]
        b_s = tl.load(p_at, mask=o_v[None, :] < value_dim, other=0.0).to(tl.float32).to(OPERAND)
        b_dphi = tl.dot(b_dy, tl.trans(b_s), input_precision=PRECISION)
        if p_inverse is not None:
            b_dphi = b_dphi * b_inverse[:, None] - b_drop[:, None] * tl.load(p_sums + at + o_f)[None, :]
        if p_ids is not None:
            b_dphi = tl.where(b_seen[:, None], b_dphi, 0.0)
        b_left = b_dphi * (tl.dot(b_q, b_second, input_precision=PRECISION) + b_other[None, :])
        b_dq = tl.dot(b_left.to(OPERAND), tl.trans(b_first), b_dq, input_precision=PRECISION)
        b_right = b_dphi * (tl.dot(b_q, b_first, input_precision=PRECISION) + b_one[None, :])
        b_dq = tl.dot(b_right.to(OPERAND), tl.trans(b_second), b_dq, input_precision=PRECISION)
    _store_rows(p_dq, b_dq, o_t, o_k, tokens, heads, key_dim)


@triton.jit
def _key_gradients(
    p_q,
    p_k,
    p_v,
    p_dy,
    p_inverse,
    p_drop,
    p_ids,
    p_pairs,
    p_states,
    p_sums,
    p_dk,
    p_dv,
    scale,
    tokens,
    heads,
    key_dim,
    value_dim,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a chunk: through its own scores where there are queries, and through the state that it leaves."""
    i_chunk = tl.program_id(0)
    o_t = i_chunk * C + tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    b_k = _rows(p_k, o_t, o_k, tokens, heads, key_dim, False).to(OPERAND)
    b_v = _rows(p_v, o_t, o_v, tokens, heads, value_dim, False).to(OPERAND)
    if p_ids is not None:
        b_here = _document(p_ids, o_t, tokens, heads)
        b_goes = b_here == _document(p_ids, i_chunk * C + C - 1, tokens, heads)
    b_dk = tl.zeros([C, BLOCK_K], tl.float32)
    b_dv = tl.zeros([C, BLOCK_V], tl.float32)
    if p_q is not None:
        b_q = _rows(p_q, o_t, o_k, tokens, heads, key_dim, False).to(OPERAND)
        b_g = _rows(p_dy, o_t, o_v, tokens, heads, value_dim, False)
        if p_inverse is not None:
            b_g *= _scalars(p_inverse, o_t, tokens)[:, None]
        b_g = b_g.to(OPERAND)
        live = o_t[:, None] <= o_t[None, :]
        if p_ids is not None:
            live &= b_here[:, None] == b_here[None, :]
        b_w = scale * tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_p = tl.where(live, 1.0 + b_w + 0.5 * b_w * b_w, 0.0)
        b_dv = tl.dot(b_p.to(OPERAND), b_g, b_dv, input_precision=PRECISION)
        b_dw = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
        if p_inverse is not None:
            b_dw -= _scalars(p_drop, o_t, tokens)[None, :]
        b_ds = tl.where(live, scale * (1.0 + b_w) * b_dw, 0.0)
        b_dk = tl.dot(b_ds.to(OPERAND), b_q, b_dk, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_chunk) * F_PADDED
    for i in range(0, F_PADDED // BLOCK_F):
        o_f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        b_first, b_one = _choice(p_pairs, o_f, BLOCK_K, OPERAND, False)
        b_second, b_other = _choice(p_pairs + F_PADDED, o_f, BLOCK_K, OPERAND, False)
        p_at = p_states + at * value_dim + o_f[:, None] * value_dim + o_v[None, :]
        b_s = tl.load(p_at, mask=o_v[None, :] < value_dim, other=0.0).to(tl.float32).to(OPERAND)
        b_left = tl.dot(b_k, b_first, input_precision=PRECISION) + b_one[None, :]
        b_right = tl.dot(b_k, b_second, input_precision=PRECISION) + b_other[None, :]
        b_phi = b_left * b_right
        b_dphi = tl.dot(b_v, tl.trans(b_s), input_precision=PRECISION) + tl.load(p_sums + at + o_f)[None, :]
        if p_ids is not None:
            b_phi = tl.where(b_goes[:, None], b_phi, 0.0)
            b_dphi = tl.where(b_goes[:, None], b_dphi, 0.0)
        b_dv = tl.dot(b_phi.to(OPERAND), b_s, b_dv, input_precision=PRECISION)
        b_dk = tl.dot((b_dphi * b_right).to(OPERAND), tl.trans(b_first), b_dk, input_precision=PRECISION)
        b_dk = tl.dot((b_dphi * b_left).to(OPERAND), tl.trans(b_second), b_dk, input_precision=PRECISION)
    _store_rows(p_dk, b_dk, o_t, o_k, tokens, heads, key_dim)
    _store_rows(p_dv, b_dv, o_t, o_v, tokens, heads, value_dim)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    ids: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final_state, inverse [B, H, T] of the normaliser, empty where y is not divided); see op.py."""
    cut = plan(k, v)
    q, k, v, initial, ids = packed(q, k, v, initial, ids)
    y = torch.empty_like(v)
    inverse = _per_token(cut) if normalize else y.new_empty(0, dtype=torch.float32)
    with on(q):
        states, sums, final = _chunk_states(cut, k, v, None, None, ids, initial, scale, reverse=False)
        pairs = _pairs(cut.key_dim, cut.padded, cut.device)
        _outputs[cut.grid](
            q, k, v, ids, pairs, states, sums, y, inverse if normalize else None, scale, eps,
            **cut.shape, num_warps=cut.warps,
        )  # fmt: skip
    return y, final, inverse


def backward(
    dy: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    ids: Tensor | None,
    y: Tensor,
    inverse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dinitial), from the inputs and what the forward pass returned."""
    cut = plan(k, v)
    dy, dfinal, q, k, v, initial, ids = packed(dy, dfinal, q, k, v, initial, ids)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    pairs = _pairs(cut.key_dim, cut.padded, cut.device)
    drop = _per_token(cut) if inverse.numel() else None
    scalars = (inverse, drop) if inverse.numel() else (None, None)
    with on(q):
        if drop is not None:
            _drops[cut.grid](
                y, dy, inverse, drop, cut.tokens, cut.heads, cut.value_dim, cut.chunk, cut.shape["BLOCK_V"]
            )
        states, sums, _ = _chunk_states(cut, k, v, None, None, ids, initial, scale, reverse=False)
        _query_gradients[cut.grid](
            q, k, v, dy, *scalars, ids, pairs, states, sums, dq, scale, **cut.shape, num_warps=cut.warps
        )
        del states, sums
        states, sums, dinitial = _chunk_states(cut, q, dy, *scalars, ids, dfinal, scale, reverse=True)
        _key_gradients[cut.grid](
            q, k, v, dy, *scalars, ids, pairs, states, sums, dk, dv, scale, **cut.shape, num_warps=cut.warps
        )
    return dq, dk, dv, dinitial


def summarize(k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
    """State [B, H, F, V + 1] that the piece leaves from zero; see op.py."""
    cut = plan(k, v)
    k, v, ids = packed(k, v, ids)
    with on(k):
        summary = _summaries(cut, k, v, None, None, ids, 1.0, reverse=False)
    if ids is not None:
        ends = torch.arange(1, cut.pieces + 1, device=cut.device) * (cut.per_piece * cut.chunk) - 1
        reaches = ids[:, ends.clamp(max=cut.tokens - 1)] == ids[:, -1:]
        summary *= reaches[:, None, :, None, None]
    return summary.sum(2)


def summarize_backward(dstate: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dk, dv) from the gradient of what `summarize` returns: every chunk whose end reaches the row's end sees it."""
    cut = plan(k, v)
    k, v, ids = packed(k, v, ids)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    states = torch.zeros(_state_shape(cut), dtype=_state_dtype(cut), device=cut.device)
    sums = torch.zeros(states.shape[:-1], dtype=torch.float32, device=cut.device)
    reaches = torch.ones(cut.batch, cut.chunks, device=cut.device)
    if ids is not None:
        ends = torch.arange(1, cut.chunks + 1, device=cut.device) * cut.chunk - 1
        reaches = (ids[:, ends.clamp(max=cut.tokens - 1)] == ids[:, -1:]).float()
    adjoint = reaches[:, None, :, None, None] * dstate[:, :, None]
    states[..., : cut.features, :] = adjoint[..., :-1]
    sums[..., : cut.features] = adjoint[..., -1]
    pairs = _pairs(cut.key_dim, cut.padded, cut.device)
    with on(k):
        _key_gradients[cut.grid](
            None, k, v, None, None, None, ids, pairs, states, sums, dk, dv, 1.0, **cut.shape, num_warps=cut.warps
        )
    return dk, dv


def _chunk_states(
    cut: Plan,
    x: Tensor,
    u: Tensor,
    inverse: Tensor | None,
    drop: Tensor | None,
    ids: Tensor | None,
    initial: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(states, sums, last) as `_states` describes them."""
    summary = _summaries(cut, x, u, inverse, drop, ids, scale, reverse) if cut.pieces > 1 else None
    states = torch.empty(_state_shape(cut), dtype=_state_dtype(cut), device=cut.device)
    sums = torch.empty(states.shape[:-1], dtype=torch.float32, device=cut.device)
    last = torch.empty(cut.batch, cut.heads, cut.features, cut.value_dim + 1, dtype=torch.float32, device=cut.device)
    _walk(cut, (x, u, inverse, drop, ids), initial, summary, states, sums, last, scale, reverse)
    return states, sums, last


def _summaries(
    cut: Plan,
    x: Tensor,
    u: Tensor,
    inverse: Tensor | None,
    drop: Tensor | None,
    ids: Tensor | None,
    scale: float,
    reverse: bool,
) -> Tensor:
    """[B, H, pieces, F, V + 1]: what each piece adds to a state of zeros."""
    shape = (cut.batch, cut.heads, cut.pieces, cut.features, cut.value_dim + 1)
    summary = torch.empty(shape, dtype=torch.float32, device=cut.device)
    _walk(cut, (x, u, inverse, drop, ids), None, summary, None, None, None, scale, reverse)
    return summary


def _walk(cut: Plan, inputs, initial, summary, states, sums, last, scale: float, reverse: bool) -> None:
    _states[(cut.padded // cut.block, cut.batch * cut.heads, cut.pieces)](
        *inputs,
        _pairs(cut.key_dim, cut.padded, cut.device),
        initial,
        summary,
        states,
        sums,
        last,
        scale,
        terms=cut.features,
        chunks=cut.chunks,
        per_piece=cut.per_piece,
        pieces=cut.pieces,
        REVERSE=reverse,
        num_warps=STATE_WARPS,
        **cut.shape,
    )


def _state_shape(cut: Plan) -> tuple[int, ...]:
    return cut.batch, cut.heads, cut.chunks, cut.padded, cut.value_dim


def _state_dtype(cut: Plan) -> torch.dtype:
    return torch.bfloat16 if cut.operand == tl.bfloat16 else torch.float32


def _per_token(cut: Plan) -> Tensor:
    return torch.empty(cut.batch, cut.heads, cut.tokens, dtype=torch.float32, device=cut.device)


def packed(*tensors: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them."""
    return [None if t is None else t.contiguous() for t in tensors]


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's GPU; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

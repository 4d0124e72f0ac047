"""Taylor attention in Triton: chunks by themselves, one fold over pieces of the sequence, then all chunks at once.

A chunk's outputs are a quadratic form inside it, weights 1 + s + s^2 / 2 by two small matrix products, plus the
features of its queries on the state that enters it. That state is the sum of two: what the chunks before it in its
piece left, and what enters the piece. `_states` walks pieces with a block of features in registers, from zero, and
leaves the first for every chunk, 16-bit for bf16 inputs: at chunks of 128 a little more than v weighs. `_fold` walks
the few sums that pieces leave and gives the second; bf16 features meet the two one after the other, wider ones their
sum. So k and v are read once for the states however many pieces it takes to fill the GPU. The backward pass walks the
adjoint state from right to left by the same two, with q for k and the gradient of the sums for v, and recomputes
everything else.

Features are never stored. Each is a product of two entries of [x, 1], which a matrix product with a constant 0/1 matrix
lays out where the next product wants them; the transposed matrix takes their gradient back. So the 153 packed terms of
K = 16 cost 160 or 192 columns. The coefficients of the Taylor series multiply states, not features.

The normaliser is fp32 throughout. bf16 inputs are multiplied as bf16, fp16 as tf32 (states may exceed fp16), fp32 as
fp32. Every sum has one fixed order, so bits repeat. Tokens' documents are numbered from 0, the one that entered; a
state belongs to the document of the token beside the place where it enters.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportReturnType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ..dispatch import on
from ..sizes import cdiv, next_power_of_2
from .reference import features, monomials, query_features

# Most tokens a chunk for 16-bit and for wider operands, whose tiles take twice the room, and tokens of a chunk that
# meet the others, or the state, at a time.
CHUNK, WIDE_CHUNK, PART = 128, 32, 64
# Features that a program of `_states` holds, those that the others make at a time, and either for wider operands.
STATE_BLOCK, BLOCK, WIDE_BLOCK = 64, 32, 32
# Rows a warp. Triton lays all warps of a product that feeds another along its rows; 8 on 64 rows, which leaves half of
# them none, gave a wrong dq on an H100.
WARP_ROWS = 16
# Registers a thread of the kernels over chunks where V is at most 64: two programs of eight warps then share an SM, and
# next to nothing spills.
REGISTERS: int | None = 128
# Said aloud for the others, as ptxas by itself took 32 for a wide fp32 tile and spilled the rest.
MOST_REGISTERS = 255
STAGES = 3
STATE_PART, STATE_WARPS, STATE_STAGES = 64, 4, 3
STATE_REGISTERS: int | None = None
# Programs of `_states` that fill a GPU of 132 SMs three times, two an SM.
PROGRAMS = 768
# Features that a program of `_fold` holds: few, so that there are many programs.
FOLD_BLOCK, FOLD_WARPS = 16, 2
# Of more pieces than this, `_fold` fetches sums ahead, which do not wait for the state; with two that took 6 us longer.
# So it is compiled twice at most.
FOLD_STAGES = 4
# Elements of a state that a program of `_step` holds at a time. Below STEP_ROWS rows and heads it takes STEP_VALUES of
# v's dims, else all.
STEP_TILE, STEP_ROWS, STEP_VALUES = 16384, 132, 16

# Arguments whose values compile nothing anew.
SIZES = ["per_piece", "chunks", "span", "pieces"]


@dataclass(frozen=True)
class Plan:
    """How [B, T, H, K] and [B, T, H, V] are cut, and what the kernels multiply in."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    state_block: int
    block: int
    pieces: int
    operand: Any
    apart: bool
    precision: str
    device: torch.device

    @property
    def features(self) -> int:
        """F, the packed terms."""
        return features(self.key_dim)

    @functools.cached_property
    def padded(self) -> int:
        """F filled up to whole steps."""
        return cdiv(self.features, self.block) * self.block

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return cdiv(self.tokens, self.chunk)

    @property
    def per_piece(self) -> int:
        """Chunks a piece."""
        return cdiv(self.chunks, self.pieces)

    @property
    def dtype(self) -> torch.dtype:
        """What states are stored in."""
        return torch.bfloat16 if self.operand == tl.bfloat16 else torch.float32

    @property
    def rows(self) -> int:
        """Rows and heads: programs of every kernel along its second axis."""
        return self.batch * self.heads

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, H, *shape], not filled."""
        return torch.empty(self.batch, self.heads, *shape, dtype=dtype, device=self.device)

    def states(self, count: int) -> tuple[Tensor, Tensor]:
        """Room for `count` states a row and head, and for their sums."""
        return self.empty(count, self.padded, self.value_dim, dtype=self.dtype), self.empty(count, self.padded)

    def tables(self, scale: float) -> tuple[Tensor, Tensor]:
        """(choice, weights) as `_tables` describes them."""
        return _tables(self.key_dim, self.padded, scale, self.dtype, self.device)

    @functools.cached_property
    def shape(self) -> dict[str, Any]:
        """The constants that every kernel over tokens takes."""
        return {
            "C": self.chunk,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_K": _block(self.key_dim),
            "BLOCK_V": _block(self.value_dim),
            "F_PADDED": self.padded,
            "OPERAND": self.operand,
            "PRECISION": self.precision,
        }

    def launch(self, kernel: Any, *args: Any) -> None:
        """Runs a kernel over chunks."""
        bounded = self.operand == tl.bfloat16 and self.value_dim <= 64
        kernel[(self.chunks, self.rows)](
            *args,
            self.tokens,
            self.heads,
            self.per_piece,
            **self.shape,
            BLOCK_F=self.block,
            PART=min(PART, self.chunk),
            APART=self.apart,
            num_warps=max(4, self.chunk // WARP_ROWS),
            num_stages=STAGES,
            maxnreg=REGISTERS if bounded else MOST_REGISTERS,
        )


def plan(k: Tensor, v: Tensor, whole: bool = False) -> Plan:
    """The cut for inputs: chunks by their dtype, pieces enough to fill the GPU, or one where `whole`."""
    batch, tokens, heads, key_dim = k.shape
    narrow = k.dtype == torch.bfloat16
    chunk = min(CHUNK if narrow else WIDE_CHUNK, max(16, next_power_of_2(tokens)))
    state_block, block = (STATE_BLOCK, BLOCK) if narrow else (WIDE_BLOCK, WIDE_BLOCK)
    chunks = cdiv(tokens, chunk)
    programs = batch * heads * cdiv(features(key_dim), state_block)
    pieces = 1 if whole else min(chunks, cdiv(PROGRAMS, programs))
    pieces = cdiv(chunks, cdiv(chunks, pieces))
    # The interpreter multiplies the bits of bf16; there the operands are fp32.
    operand = tl.bfloat16 if narrow and k.is_cuda else tl.float32
    precision = "ieee" if k.dtype == torch.float32 else "tf32"
    return Plan(
        batch,
        tokens,
        heads,
        key_dim,
        v.shape[3],
        chunk,
        state_block,
        block,
        pieces,
        operand,
        narrow,
        precision,
        k.device,
    )


def _block(width: int) -> int:
    return max(16, next_power_of_2(width))


@functools.cache
def _tables(key_dim: int, padded: int, scale: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """([2, F_PADDED, BLOCK_K] 0/1 matrices, the entries whose product a feature is; [F_PADDED] coefficients)."""
    entries = torch.stack(monomials(key_dim, device))
    choice = one_hot(entries, key_dim + 1)[..., :key_dim].to(dtype)
    weights = query_features(torch.ones(key_dim, device=device), scale)
    beyond = padded - len(weights)
    return pad(choice, [0, _block(key_dim) - key_dim, 0, beyond]).contiguous(), pad(weights, [0, beyond])


@functools.cache
def _entry_table(key_dim: int, device: torch.device) -> Tensor:
    """int32 [2, F]: the two entries of [x, 1] whose product a feature is."""
    return torch.stack(monomials(key_dim, device)).to(torch.int32)


@triton.jit
def _rows_at(pointer, i_chunk, tokens, heads, C: tl.constexpr, WIDTH: tl.constexpr):
    """Pointer to the first token of a chunk of this program's row and head in [B, T, H, WIDTH]."""
    i_head = tl.program_id(1)
    first = (i_head // heads).to(tl.int64) * tokens + i_chunk * C
    return pointer + (first * heads + i_head % heads) * WIDTH


@triton.jit
def _rows(
    pointer, i_chunk, tokens, heads, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """[C, BLOCK] of a chunk in fp32, or its transpose; zeros beyond the ends."""
    base = _rows_at(pointer, i_chunk, tokens, heads, C, WIDTH)
    o_t, o_x = tl.arange(0, C), tl.arange(0, BLOCK)
    left = tokens - i_chunk * C
    if TRANSPOSED:
        at, mask = (o_t * heads * WIDTH)[None, :] + o_x[:, None], (o_t[None, :] < left) & (o_x[:, None] < WIDTH)
    else:
        at, mask = (o_t * heads * WIDTH)[:, None] + o_x[None, :], (o_t[:, None] < left) & (o_x[None, :] < WIDTH)
    return tl.load(base + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, b, i_chunk, tokens, heads, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    base = _rows_at(pointer, i_chunk, tokens, heads, C, WIDTH)
    o_t, o_x = tl.arange(0, C), tl.arange(0, BLOCK)
    mask = (o_t[:, None] < tokens - i_chunk * C) & (o_x[None, :] < WIDTH)
    tl.store(base + (o_t * heads * WIDTH)[:, None] + o_x[None, :], b.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scalars(pointer, i_chunk, tokens, C: tl.constexpr):
    """[C] of a chunk of this program's row and head from [B, H, T]; zeros beyond the end."""
    base = pointer + tl.program_id(1).to(tl.int64) * tokens + i_chunk * C
    return tl.load(base + tl.arange(0, C), mask=tl.arange(0, C) < tokens - i_chunk * C, other=0.0)


@triton.jit
def _store_scalars(pointer, b, i_chunk, tokens, C: tl.constexpr):
    base = pointer + tl.program_id(1).to(tl.int64) * tokens + i_chunk * C
    tl.store(base + tl.arange(0, C), b, mask=tl.arange(0, C) < tokens - i_chunk * C)


@triton.jit
def _document(p_ids, o_t, tokens, heads):
    """The document of token or tokens o_t: of the last token beyond the end, 0 before the first."""
    base = p_ids + (tl.program_id(1) // heads).to(tl.int64) * tokens
    return tl.where(o_t < 0, 0, tl.load(base + tl.minimum(tl.maximum(o_t, 0), tokens - 1)))


@triton.jit
def _factors(
    b_x, p_choice, o_f, KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr, F_PADDED: tl.constexpr, PRECISION: tl.constexpr
):
    """(first, second [C, F], their choices [K, F]) of x [C, K]; the features are first * second + (o_f == 0)."""
    p_at = p_choice + o_f[None, :] * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    b_one, b_two = tl.load(p_at), tl.load(p_at + F_PADDED * BLOCK_K)
    b_second = tl.dot(b_x, b_two, input_precision=PRECISION) + (o_f <= KEY_DIM).to(tl.float32)[None, :]
    return tl.dot(b_x, b_one, input_precision=PRECISION), b_second, b_one, b_two


@triton.jit
def _state(p_states, i_state, o_f, kept, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, F_PADDED: tl.constexpr):
    """[F, V] of a state, zeros unless `kept`."""
    o_v = tl.arange(0, BLOCK_V)
    p_at = p_states + i_state * F_PADDED * VALUE_DIM + o_f[:, None] * VALUE_DIM + o_v[None, :]
    return tl.load(p_at, mask=(o_v[None, :] < VALUE_DIM) & kept, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def _states(
    p_x,
    p_u,
    p_y,
    p_inverse,
    p_drop,
    p_ids,
    p_choice,
    p_weights,
    p_states,
    p_sums,
    p_summary,
    tokens,
    heads,
    per_piece,
    chunks,
    C: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The states S = sum of features(x) u^T and the sums z = sum of features(x) * c of a piece from zero.

    Forward x, u and c are k, v and 1. In reverse they are q and the gradients of its sums, dy * inverse and -drop, and
    state is what flows into a chunk from its right; drop is made from y where that is given. What enters each chunk,
    times the coefficients, goes to p_states [B, H, chunks, F, V] and p_sums [B, H, chunks, F] if given; what leaves the
    piece to p_summary [B, H, pieces, F, V + 1].
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_piece = tl.program_id(2)
    o_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    in_f = o_f < F_PADDED
    p_at = p_choice + o_f[:, None] * BLOCK_K + o_k[None, :]
    b_first = tl.load(p_at, mask=in_f[:, None], other=0.0)
    b_second = tl.load(p_at + F_PADDED * BLOCK_K, mask=in_f[:, None], other=0.0)
    b_weight = tl.load(p_weights + o_f, mask=in_f, other=0.0)
    b_one = (o_f <= KEY_DIM).to(tl.float32)[:, None]
    b_constant = (o_f == 0).to(tl.float32)[:, None]
    b_s = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    b_z = tl.zeros([BLOCK_F], tl.float32)
    begin = i_piece * per_piece
    count = tl.minimum(per_piece, chunks - begin)
    for i in range(0, count):
        i_chunk = begin + (count - 1 - i if REVERSE else i)
        if p_states is not None:
            at = (i_head * chunks + i_chunk) * F_PADDED
            b_out = (b_weight[:, None] * b_s).to(p_states.dtype.element_ty)
            p_out = p_states + at * VALUE_DIM + o_f[:, None] * VALUE_DIM + o_v[None, :]
            tl.store(p_out, b_out, mask=in_f[:, None] & (o_v[None, :] < VALUE_DIM))
            tl.store(p_sums + at + o_f, b_weight * b_z, mask=in_f)
        if p_ids is not None:
            before = _document(p_ids, i_chunk * C - 1, tokens, heads)
            last = _document(p_ids, i_chunk * C + C - 1, tokens, heads)
            kept = (before == last).to(tl.float32)
            b_s *= kept
            b_z *= kept
        for j in tl.static_range(C // PART):
            i_part = i_chunk * (C // PART) + j
            b_x = _rows(p_x, i_part, tokens, heads, PART, KEY_DIM, BLOCK_K, True).to(OPERAND)
            b_u = _rows(p_u, i_part, tokens, heads, PART, VALUE_DIM, BLOCK_V, False)
            b_c = (tl.arange(0, PART) < tokens - i_part * PART).to(tl.float32)
            if p_inverse is not None:
                b_rate = _scalars(p_inverse, i_part, tokens, PART)
                if p_y is None:
                    b_c = _scalars(p_drop, i_part, tokens, PART)
                else:
                    b_y = _rows(p_y, i_part, tokens, heads, PART, VALUE_DIM, BLOCK_V, False)
                    b_c = b_rate * tl.sum(b_u * b_y, 1)
            b_phi = tl.dot(b_second, b_x, input_precision=PRECISION) + b_one
            b_phi = tl.dot(b_first, b_x, input_precision=PRECISION) * b_phi + b_constant
            if p_ids is not None:
                b_here = _document(p_ids, i_part * PART + tl.arange(0, PART), tokens, heads)
                b_phi = tl.where((b_here == (before if REVERSE else last))[None, :], b_phi, 0.0)
            if not REVERSE:
                b_z += tl.sum(b_phi * b_c[None, :], 1)
            elif p_inverse is not None:
                b_z -= tl.sum(b_phi * b_c[None, :], 1)
                b_phi *= b_rate[None, :]
            b_s = tl.dot(b_phi.to(OPERAND), b_u.to(OPERAND), b_s, input_precision=PRECISION)
    TERMS: tl.constexpr = 1 + KEY_DIM + KEY_DIM * (KEY_DIM + 1) // 2
    p_row = p_summary + ((i_head * tl.num_programs(2) + i_piece) * TERMS + o_f) * (VALUE_DIM + 1)
    in_f = o_f < TERMS
    tl.store(p_row[:, None] + o_v[None, :], b_s, mask=in_f[:, None] & (o_v[None, :] < VALUE_DIM))
    tl.store(p_row + VALUE_DIM, b_z, mask=in_f)


@triton.jit(do_not_specialize=SIZES)
def _fold(
    p_outer,
    p_summary,
    p_ids,
    p_weights,
    p_entering,
    p_sums,
    p_last,
    tokens,
    heads,
    span,
    pieces,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The states that enter pieces of `span` tokens, times the coefficients, and the one that leaves the row.

    p_outer, p_last [B, H, F, V + 1] enter and leave the row: in reverse as gradients, which are times the coefficients.
    p_summary [B, H, pieces, F, V + 1] is `_states`'; None for zeros. p_entering and p_sums are as p_states and p_sums
    there, of pieces.
    """
    i_head = tl.program_id(1).to(tl.int64)
    o_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    o_v = tl.arange(0, BLOCK_V)
    b_weight = tl.load(p_weights + o_f)
    TERMS: tl.constexpr = 1 + KEY_DIM + KEY_DIM * (KEY_DIM + 1) // 2
    in_f = o_f < TERMS
    in_v = o_v[None, :] < VALUE_DIM
    in_state = in_f[:, None] & in_v
    o_row = o_f * (VALUE_DIM + 1)
    o_state = o_row[:, None] + o_v[None, :]
    b_s = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    b_z = tl.zeros([BLOCK_F], tl.float32)
    if p_outer is not None:
        p_outer += i_head * TERMS * (VALUE_DIM + 1)
        b_s += tl.load(p_outer + o_state, mask=in_state, other=0.0)
        b_z += tl.load(p_outer + o_row + VALUE_DIM, mask=in_f, other=0.0)
    b_in = b_weight if REVERSE else tl.full([BLOCK_F], 1.0, tl.float32)
    b_out = tl.full([BLOCK_F], 1.0, tl.float32) if REVERSE else b_weight
    for i in tl.range(0, pieces, num_stages=STAGES):
        i_piece = i_head * pieces + (pieces - 1 - i if REVERSE else i)
        if p_entering is not None:
            p_at = p_entering + (i_piece * F_PADDED + o_f[:, None]) * VALUE_DIM + o_v[None, :]
            tl.store(p_at, (b_out[:, None] * b_s).to(p_entering.dtype.element_ty), mask=in_v)
            tl.store(p_sums + i_piece * F_PADDED + o_f, b_out * b_z)
        if p_summary is not None:
            if p_ids is not None:
                begin = (pieces - 1 - i if REVERSE else i) * span
                before = _document(p_ids, begin - 1, tokens, heads)
                kept = (before == _document(p_ids, begin + span - 1, tokens, heads)).to(tl.float32)
                b_s *= kept
                b_z *= kept
            p_piece = p_summary + i_piece * TERMS * (VALUE_DIM + 1)
            b_s += b_in[:, None] * tl.load(p_piece + o_state, mask=in_state, other=0.0)
            b_z += b_in * tl.load(p_piece + o_row + VALUE_DIM, mask=in_f, other=0.0)
    if p_last is not None:
        p_last += i_head * TERMS * (VALUE_DIM + 1)
        tl.store(p_last + o_state, b_s, mask=in_state)
        tl.store(p_last + o_row + VALUE_DIM, b_z, mask=in_f)


@triton.jit(do_not_specialize=SIZES)
def _outputs(
    p_q,
    p_k,
    p_v,
    p_ids,
    p_choice,
    p_states,
    p_sums,
    p_entering,
    p_entering_sums,
    p_y,
    p_inverse,
    scale,
    eps,
    tokens,
    heads,
    per_piece,
    C: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
):
    """y of a chunk, and the inverse of its normaliser [B, H, T] where p_inverse is given."""
    i_chunk = tl.program_id(0)
    o_t = tl.arange(0, C)
    b_q = _rows(p_q, i_chunk, tokens, heads, C, KEY_DIM, BLOCK_K, False).to(OPERAND)
    carried = True
    if p_ids is not None:
        b_here = _document(p_ids, i_chunk * C + o_t, tokens, heads)
        before = _document(p_ids, i_chunk * C - 1, tokens, heads)
        carried = before == _document(p_ids, i_chunk // per_piece * per_piece * C - 1, tokens, heads)
        b_seen = b_here == before
    b_sum = tl.zeros([C], tl.float32)
    b_y = tl.zeros([C, BLOCK_V], tl.float32)
    for j in tl.static_range(C // PART):
        i_part = i_chunk * (C // PART) + j
        b_k = _rows(p_k, i_part, tokens, heads, PART, KEY_DIM, BLOCK_K, True).to(OPERAND)
        b_v = _rows(p_v, i_part, tokens, heads, PART, VALUE_DIM, BLOCK_V, False).to(OPERAND)
        live = o_t[:, None] >= j * PART + tl.arange(0, PART)[None, :]
        if p_ids is not None:
            live &= b_here[:, None] == _document(p_ids, i_part * PART + tl.arange(0, PART), tokens, heads)[None, :]
        b_p = tl.dot(b_q, b_k, input_precision=PRECISION)
        b_p = tl.where(live, b_p * (b_p * (0.5 * scale * scale) + scale) + 1.0, 0.0)
        b_sum += tl.sum(b_p, 1)
        b_y = tl.dot(b_p.to(OPERAND), b_v, b_y, input_precision=PRECISION)
    i_state, i_piece = _places(i_chunk, per_piece)
    for i in range(0, F_PADDED // BLOCK_F):
        o_f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        b_s = _state(p_states, i_state, o_f, True, VALUE_DIM, BLOCK_V, F_PADDED)
        b_e = _state(p_entering, i_piece, o_f, carried, VALUE_DIM, BLOCK_V, F_PADDED)
        if not APART:
            b_s += b_e
        b_first, b_second, _, _ = _factors(b_q, p_choice, o_f, KEY_DIM, BLOCK_K, F_PADDED, PRECISION)
        b_phi = b_first * b_second + (o_f == 0).to(tl.float32)[None, :]
        if p_ids is not None:
            b_phi = tl.where(b_seen[:, None], b_phi, 0.0)
        if p_inverse is not None:
            b_z = _sums(p_sums, p_entering_sums, i_state, i_piece, o_f, carried, F_PADDED)
            b_sum += tl.sum(b_phi * b_z[None, :], 1)
        b_phi = b_phi.to(OPERAND)
        b_y = tl.dot(b_phi, b_s, b_y, input_precision=PRECISION)
        if APART:
            b_y = tl.dot(b_phi, b_e, b_y, input_precision=PRECISION)
    if p_inverse is not None:
        b_inverse = 1.0 / (b_sum + eps)
        b_y *= b_inverse[:, None]
        _store_scalars(p_inverse, b_inverse, i_chunk, tokens, C)
    _store_rows(p_y, b_y, i_chunk, tokens, heads, C, VALUE_DIM, BLOCK_V)


@triton.jit
def _places(i_chunk, per_piece):
    """(of this chunk among the states, of its piece among those that enter pieces)."""
    i_head, chunks = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    return i_head * chunks + i_chunk, i_head * tl.cdiv(chunks, per_piece) + i_chunk // per_piece


@triton.jit
def _sums(p_sums, p_entering_sums, i_state, i_piece, o_f, carried, F_PADDED: tl.constexpr):
    """[F] sums of the state that enters a chunk."""
    b_z = tl.load(p_entering_sums + i_piece * F_PADDED + o_f, mask=(o_f < F_PADDED) & carried, other=0.0)
    if p_sums is not None:
        b_z += tl.load(p_sums + i_state * F_PADDED + o_f)
    return b_z


@triton.jit(do_not_specialize=SIZES)
def _query_gradients(
    p_q,
    p_k,
    p_v,
    p_y,
    p_dy,
    p_inverse,
    p_ids,
    p_choice,
    p_states,
    p_sums,
    p_entering,
    p_entering_sums,
    p_dq,
    p_drop,
    scale,
    tokens,
    heads,
    per_piece,
    C: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
):
    """dq of a chunk: through its own scores, and through its features by the state that enters.

    Where y is divided, also drop_t = inverse_t * dy_t . y_t [B, H, T], minus the gradient of the normaliser.
    """
    i_chunk = tl.program_id(0)
    o_t = tl.arange(0, C)
    b_g = _rows(p_dy, i_chunk, tokens, heads, C, VALUE_DIM, BLOCK_V, False)
    if p_inverse is not None:
        b_g *= _scalars(p_inverse, i_chunk, tokens, C)[:, None]
        b_drop = tl.sum(b_g * _rows(p_y, i_chunk, tokens, heads, C, VALUE_DIM, BLOCK_V, False), 1)
        _store_scalars(p_drop, b_drop, i_chunk, tokens, C)
    b_g = b_g.to(OPERAND)
    b_q = _rows(p_q, i_chunk, tokens, heads, C, KEY_DIM, BLOCK_K, False).to(OPERAND)
    carried = True
    if p_ids is not None:
        b_here = _document(p_ids, i_chunk * C + o_t, tokens, heads)
        before = _document(p_ids, i_chunk * C - 1, tokens, heads)
        carried = before == _document(p_ids, i_chunk // per_piece * per_piece * C - 1, tokens, heads)
        b_seen = b_here == before
    b_dq = tl.zeros([C, BLOCK_K], tl.float32)
    for j in tl.static_range(C // PART):
        i_part = i_chunk * (C // PART) + j
        b_k = _rows(p_k, i_part, tokens, heads, PART, KEY_DIM, BLOCK_K, False).to(OPERAND)
        b_v = _rows(p_v, i_part, tokens, heads, PART, VALUE_DIM, BLOCK_V, False).to(OPERAND)
        live = o_t[:, None] >= j * PART + tl.arange(0, PART)[None, :]
        if p_ids is not None:
            live &= b_here[:, None] == _document(p_ids, i_part * PART + tl.arange(0, PART), tokens, heads)[None, :]
        b_dw = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        if p_inverse is not None:
            b_dw -= b_drop[:, None]
        b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_ds = tl.where(live, (b_p * (scale * scale) + scale) * b_dw, 0.0)
        b_dq = tl.dot(b_ds.to(OPERAND), b_k, b_dq, input_precision=PRECISION)
    i_state, i_piece = _places(i_chunk, per_piece)
    for i in range(0, F_PADDED // BLOCK_F):
        o_f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        b_s = _state(p_states, i_state, o_f, True, VALUE_DIM, BLOCK_V, F_PADDED)
        b_e = _state(p_entering, i_piece, o_f, carried, VALUE_DIM, BLOCK_V, F_PADDED)
        if not APART:
            b_s += b_e
        b_first, b_second, b_one, b_two = _factors(b_q, p_choice, o_f, KEY_DIM, BLOCK_K, F_PADDED, PRECISION)
        b_dphi = tl.dot(b_g, tl.trans(b_s), input_precision=PRECISION)
        if APART:
            b_dphi = tl.dot(b_g, tl.trans(b_e), b_dphi, input_precision=PRECISION)
        if p_inverse is not None:
            b_z = _sums(p_sums, p_entering_sums, i_state, i_piece, o_f, carried, F_PADDED)
            b_dphi -= b_drop[:, None] * b_z[None, :]
        if p_ids is not None:
            b_dphi = tl.where(b_seen[:, None], b_dphi, 0.0)
        b_dq = tl.dot((b_dphi * b_second).to(OPERAND), tl.trans(b_one), b_dq, input_precision=PRECISION)
        b_dq = tl.dot((b_dphi * b_first).to(OPERAND), tl.trans(b_two), b_dq, input_precision=PRECISION)
    _store_rows(p_dq, b_dq, i_chunk, tokens, heads, C, KEY_DIM, BLOCK_K)


@triton.jit(do_not_specialize=SIZES)
def _key_gradients(
    p_q,
    p_k,
    p_v,
    p_dy,
    p_inverse,
    p_drop,
    p_ids,
    p_choice,
    p_states,
    p_sums,
    p_entering,
    p_entering_sums,
    p_dk,
    p_dv,
    scale,
    tokens,
    heads,
    per_piece,
    C: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    F_PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
):
    """dk and dv of a chunk: through its own scores where there are queries, and through the state that it leaves."""
    i_chunk = tl.program_id(0)
    o_t = tl.arange(0, C)
    b_k = _rows(p_k, i_chunk, tokens, heads, C, KEY_DIM, BLOCK_K, False).to(OPERAND)
    b_v = _rows(p_v, i_chunk, tokens, heads, C, VALUE_DIM, BLOCK_V, False).to(OPERAND)
    carried = True
    if p_ids is not None:
        b_here = _document(p_ids, i_chunk * C + o_t, tokens, heads)
        last = _document(p_ids, i_chunk * C + C - 1, tokens, heads)
        carried = last == _document(p_ids, (i_chunk // per_piece + 1) * per_piece * C - 1, tokens, heads)
        b_goes = b_here == last
    b_dk = tl.zeros([C, BLOCK_K], tl.float32)
    b_dv = tl.zeros([C, BLOCK_V], tl.float32)
    if p_q is not None:
        for j in tl.static_range(C // PART):
            i_part = i_chunk * (C // PART) + j
            b_q = _rows(p_q, i_part, tokens, heads, PART, KEY_DIM, BLOCK_K, False).to(OPERAND)
            b_g = _rows(p_dy, i_part, tokens, heads, PART, VALUE_DIM, BLOCK_V, False)
            if p_inverse is not None:
                b_g *= _scalars(p_inverse, i_part, tokens, PART)[:, None]
            b_g = b_g.to(OPERAND)
            live = o_t[:, None] <= j * PART + tl.arange(0, PART)[None, :]
            if p_ids is not None:
                live &= b_here[:, None] == _document(p_ids, i_part * PART + tl.arange(0, PART), tokens, heads)[None, :]
            b_w = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            b_p = tl.where(live, b_w * (b_w * (0.5 * scale * scale) + scale) + 1.0, 0.0)
            b_dv = tl.dot(b_p.to(OPERAND), b_g, b_dv, input_precision=PRECISION)
            b_dw = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
            if p_inverse is not None:
                b_dw -= _scalars(p_drop, i_part, tokens, PART)[None, :]
            b_ds = tl.where(live, (b_w * (scale * scale) + scale) * b_dw, 0.0)
            b_dk = tl.dot(b_ds.to(OPERAND), b_q, b_dk, input_precision=PRECISION)
    i_state, i_piece = _places(i_chunk, per_piece)
    for i in range(0, F_PADDED // BLOCK_F):
        o_f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        b_e = _state(p_entering, i_piece, o_f, carried, VALUE_DIM, BLOCK_V, F_PADDED)
        if p_states is not None:
            b_s = _state(p_states, i_state, o_f, True, VALUE_DIM, BLOCK_V, F_PADDED)
            if not APART:
                b_e += b_s
        b_first, b_second, b_one, b_two = _factors(b_k, p_choice, o_f, KEY_DIM, BLOCK_K, F_PADDED, PRECISION)
        b_z = _sums(p_sums, p_entering_sums, i_state, i_piece, o_f, carried, F_PADDED)
        b_dphi = tl.dot(b_v, tl.trans(b_e), input_precision=PRECISION) + b_z[None, :]
        b_phi = b_first * b_second + (o_f == 0).to(tl.float32)[None, :]
        if p_ids is not None:
            b_phi = tl.where(b_goes[:, None], b_phi, 0.0)
        b_phi = b_phi.to(OPERAND)
        b_dv = tl.dot(b_phi, b_e, b_dv, input_precision=PRECISION)
        if p_states is not None and APART:
            b_dphi = tl.dot(b_v, tl.trans(b_s), b_dphi, input_precision=PRECISION)
            b_dv = tl.dot(b_phi, b_s, b_dv, input_precision=PRECISION)
        if p_ids is not None:
            b_dphi = tl.where(b_goes[:, None], b_dphi, 0.0)
        b_dk = tl.dot((b_dphi * b_second).to(OPERAND), tl.trans(b_one), b_dk, input_precision=PRECISION)
        b_dk = tl.dot((b_dphi * b_first).to(OPERAND), tl.trans(b_two), b_dk, input_precision=PRECISION)
    _store_rows(p_dk, b_dk, i_chunk, tokens, heads, C, KEY_DIM, BLOCK_K)
    _store_rows(p_dv, b_dv, i_chunk, tokens, heads, C, VALUE_DIM, BLOCK_V)


@triton.jit
def _step(
    p_q,
    p_k,
    p_v,
    p_state,
    p_entries,
    p_weights,
    p_y,
    p_next,
    eps,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """y and the next state [B, H, F, V + 1] of one token, for a block of v's dims; each block sums its own normaliser.

    A program's last column, one beyond v, is the normaliser's; the first block stores it.
    """
    i_head = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    TERMS: tl.constexpr = 1 + KEY_DIM + KEY_DIM * (KEY_DIM + 1) // 2
    b_v = tl.load(p_v + i_head * VALUE_DIM + o_v, mask=o_v < VALUE_DIM, other=0.0).to(tl.float32)
    b_y = tl.zeros([BLOCK_V], tl.float32)
    total = 0.0
    for i in range(0, tl.cdiv(TERMS, BLOCK_F)):
        o_f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        in_f = o_f < TERMS
        in_state = in_f[:, None] & (o_v[None, :] < VALUE_DIM)
        o_row = (i_head * TERMS + o_f) * (VALUE_DIM + 1)
        b_s = tl.load(p_state + o_row[:, None] + o_v[None, :], mask=in_state, other=0.0)
        b_z = tl.load(p_state + o_row + VALUE_DIM, mask=in_f, other=0.0)
        one = tl.load(p_entries + o_f, mask=in_f, other=0)
        two = tl.load(p_entries + TERMS + o_f, mask=in_f, other=0)
        b_k = _entries(p_k + i_head * KEY_DIM, one, KEY_DIM) * _entries(p_k + i_head * KEY_DIM, two, KEY_DIM)
        b_q = _entries(p_q + i_head * KEY_DIM, one, KEY_DIM) * _entries(p_q + i_head * KEY_DIM, two, KEY_DIM)
        b_q *= tl.load(p_weights + o_f, mask=in_f, other=0.0)
        b_s += b_k[:, None] * b_v[None, :]
        b_z += b_k
        b_y += tl.sum(b_q[:, None] * b_s, 0)
        total += tl.sum(b_q * b_z, 0)
        tl.store(p_next + o_row[:, None] + o_v[None, :], b_s, mask=in_state)
        tl.store(p_next + o_row + VALUE_DIM, b_z, mask=in_f & (tl.program_id(1) == 0))
    if NORMALIZE:
        b_y /= total + eps
    tl.store(p_y + i_head * VALUE_DIM + o_v, b_y.to(p_y.dtype.element_ty), mask=o_v < VALUE_DIM)


@triton.jit
def _entries(pointer, at, KEY_DIM: tl.constexpr):
    """Entries of [x, 1]."""
    return tl.load(pointer + at, mask=at < KEY_DIM, other=1.0).to(tl.float32)


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
    inverse = cut.empty(cut.tokens) if normalize else y.new_empty(0, dtype=torch.float32)
    with on(q):
        states, final = _all_states(cut, k, v, None, None, ids, initial, scale, reverse=False)
        cut.launch(_outputs, q, k, v, ids, cut.tables(scale)[0], *states, y, inverse if normalize else None, scale, eps)
    return y, final, inverse


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
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
    choice = cut.tables(scale)[0]
    scalars = (inverse, torch.empty_like(inverse)) if inverse.numel() else (None, None)
    with on(q):
        states, _ = _all_states(cut, k, v, None, None, ids, initial, scale, reverse=False)
        cut.launch(_query_gradients, q, k, v, y, dy, scalars[0], ids, choice, *states, dq, scalars[1], scale)
        del states
        states, dinitial = _all_states(cut, q, dy, *scalars, ids, dfinal, scale, reverse=True)
        cut.launch(_key_gradients, q, k, v, dy, *scalars, ids, choice, *states, dk, dv, scale)
    return dq, dk, dv, dinitial


def summarize(k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
    """State [B, H, F, V + 1] that the piece leaves from zero; see op.py."""
    cut = plan(k, v)
    k, v, ids = packed(k, v, ids)
    with on(k):
        summary = _walk(cut, k, v, None, None, None, ids, None, None, 1.0, reverse=False)
        return _folded(cut, None, summary, ids, None, None, 1.0, reverse=False)


def adjoint(scale: float, dy: Tensor, q: Tensor, y: Tensor, inverse: Tensor, ids: Tensor | None) -> Tensor:
    """dinitial; see reference.py."""
    cut = plan(q, dy)
    dy, q, y, ids = packed(dy, q, y, ids)
    divided = (y, inverse) if inverse.numel() else (None, None)
    with on(q):
        summary = _walk(cut, q, dy, *divided, None, ids, None, None, scale, reverse=True)
        return _folded(cut, None, summary, ids, None, None, scale, reverse=True)


def summarize_backward(dstate: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dk, dv) from the gradient of what `summarize` returns: every chunk whose end reaches the row's end sees it."""
    cut = plan(k, v, whole=True)
    dstate, k, v, ids = packed(dstate, k, v, ids)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    with on(k):
        entering = cut.states(1)
        _folded(cut, dstate, None, ids, *entering, 1.0, reverse=True)
        choice = cut.tables(1.0)[0]
        nothing = (None,) * 4
        cut.launch(_key_gradients, None, k, v, *nothing[:3], ids, choice, *nothing[:2], *entering, dk, dv, 1.0)
    return dk, dv


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, state) of one token; see op.py."""
    batch, heads, key_dim = k.shape
    value_dim, terms = v.shape[2], features(key_dim)
    q, k, v, state = packed(q, k, v, state)
    y, following = torch.empty_like(v), torch.empty_like(state)
    block = min(_block(value_dim), STEP_VALUES if batch * heads < STEP_ROWS else 128)
    weights = _tables(key_dim, terms, scale, torch.float32, k.device)[1]
    with on(q):
        _step[(batch * heads, cdiv(value_dim, block))](
            q, k, v, state, _entry_table(key_dim, k.device), weights, y, following, eps,
            KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_F=min(next_power_of_2(terms), STEP_TILE // block),
            BLOCK_V=block, NORMALIZE=normalize, num_warps=8 if block > STEP_VALUES else 4,
        )  # fmt: skip
    return y, following


def _all_states(
    cut: Plan,
    x: Tensor,
    u: Tensor,
    inverse: Tensor | None,
    drop: Tensor | None,
    ids: Tensor | None,
    outer: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """((states, sums) of chunks and those that enter pieces, the one that leaves the row), by `_states` and `_fold`."""
    states, entering = cut.states(cut.chunks), cut.states(cut.pieces)
    summary = _walk(cut, x, u, None, inverse, drop, ids, *states, scale, reverse)
    return (*states, *entering), _folded(cut, outer, summary, ids, *entering, scale, reverse)


def _walk(cut: Plan, x, u, y, inverse, drop, ids, states, sums, scale: float, reverse: bool) -> Tensor:
    """[B, H, pieces, F, V + 1]: what each piece adds to a state of zeros; fills `states` and `sums` if given."""
    summary = cut.empty(cut.pieces, cut.features, cut.value_dim + 1)
    _states[(cdiv(cut.padded, cut.state_block), cut.rows, cut.pieces)](
        x, u, y, inverse, drop, ids, *cut.tables(scale), states, sums, summary,
        cut.tokens, cut.heads, cut.per_piece, cut.chunks, **cut.shape,
        BLOCK_F=cut.state_block, PART=min(STATE_PART, cut.chunk), REVERSE=reverse,
        num_warps=STATE_WARPS, num_stages=STATE_STAGES, maxnreg=STATE_REGISTERS,
    )  # fmt: skip
    return summary


def _folded(cut: Plan, outer, summary, ids, entering, sums, scale: float, reverse: bool) -> Tensor:
    """[B, H, F, V + 1], the state that leaves the row; fills `entering` and its `sums` if given."""
    last = cut.empty(cut.features, cut.value_dim + 1)
    shape = {name: cut.shape[name] for name in ("KEY_DIM", "VALUE_DIM", "BLOCK_V", "F_PADDED")}
    _fold[(cut.padded // FOLD_BLOCK, cut.rows)](
        outer, summary, ids, cut.tables(scale)[1], entering, sums, last,
        cut.tokens, cut.heads, cut.per_piece * cut.chunk, cut.pieces, **shape, BLOCK_F=FOLD_BLOCK, REVERSE=reverse,
        STAGES=FOLD_STAGES if cut.pieces > FOLD_STAGES else 1, num_warps=FOLD_WARPS,
    )  # fmt: skip
    return last


def packed(*tensors: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them."""
    return [None if t is None else t.contiguous() for t in tensors]

"""Linear attention in Triton: programs walk pieces of a row with the state in registers, which never reaches memory.

One kernel does every pass without groups. It computes out_i = sum_j (x_i . y_j) u_j over the tokens j that i sees,
those of its own chunk as a small quadratic form and all others by the state S = sum_j y_j u_j^T:

    y:  x, y, u = q, k, v, left to right          dv: k, q, dy, right to left
    dq: dy, v, k, left to right                   dk: v, dy, q, right to left

where the walks for dq and dk read the state transposed. So each reads three tensors and writes one. Those for dv and dk
have one state, so where a program holds all of it they are one walk, which reads four and writes two. Where rows, heads
and blocks of columns alone do not fill the GPU the row is cut in pieces: the same kernel first leaves each piece's sum
alone, and `_fold` makes of these the states that enter the pieces.

With groups a walk is grouped.py's: from group to group, of which none sees itself, so that there is no quadratic form.
The state that enters such a row is in two parts, of the completed groups and of the open one, which joins them when it
has been walked; so such a row is always folded. At the ends of a row the state is given as (both, open) from left to
right, and its gradient, walked from right to left, as (both, -open).

bf16 inputs are multiplied as bf16, fp16 as tf32 (states may exceed fp16), fp32 as fp32, and so is all of an odd K or V.
Every sum has one fixed order, so bits repeat. No exponential is taken of a positive number. Documents and groups are
numbered from 0, those that entered.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportReturnType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on
from ..sizes import cdiv, next_power_of_2
from . import cuts
from .grouped import Groups, groups_of_piece, mark_groups, mark_of, walk_groups
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

# Tokens a chunk for 16-bit operands and for wider ones, whose tiles take twice the room, half as many above width 64.
CHUNK, WIDE_CHUNK = 64, 32

# Of more pieces than this, `_fold` fetches sums ahead, which do not wait for the state.
FOLD_STAGES = 4


class Tile(NamedTuple):
    """How a walk is laid out: columns of the state a program, warps, stages of its loads."""

    block: int
    warps: int
    stages: int


# By the padded width of x and y. All rows of the state are in registers.
TILES = {
    16: Tile(64, 4, 4),
    32: Tile(64, 4, 4),
    64: Tile(64, 4, 4),
    128: Tile(64, 4, 2),
    256: Tile(32, 4, 2),
}
WIDE_TILES = dict.fromkeys((16, 32, 64), Tile(32, 4, 1)) | {128: Tile(32, 8, 1), 256: Tile(16, 8, 1)}
# The widest keys of one walk for dv and dk. At 128 it spills 450 bytes a thread, and takes a fifth to a quarter longer
# than two; with groups it would take 3% less.
TWIN_WIDTH = 64


@dataclass(frozen=True)
class Plan:
    """How [B, T, H, K] and [B, T, Hkv, V] are cut, and what the kernels multiply in."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    width: int
    chunk: int
    pieces: int
    span: int
    operand: Any
    precision: str
    device: torch.device

    def tile(self, x_dim: int, u_dim: int, twin: bool = False) -> Tile:
        """The tile of a walk whose state has rows of x and columns of u; of one for dv and dk with `twin`.

        A fourth tensor to fetch, and a row's normaliser, each take the room of a stage; two stages are the least.
        """
        tile = (TILES if self.operand == tl.bfloat16 else WIDE_TILES)[_padded(x_dim)]
        block = max(16, min(tile.block, _padded(u_dim)))
        stages = tile.stages - twin - (self.width > self.value_dim)
        return tile._replace(block=block, stages=max(stages, min(tile.stages, 2)))

    @property
    def twin(self) -> bool:
        """Whether programs hold all columns of a state, as one walk for dv and dk takes."""
        return self.key_dim <= TWIN_WIDTH and self.value_dim <= self.tile(self.key_dim, self.value_dim).block

    @property
    def chunks(self) -> int:
        """Chunks a row."""
        return cdiv(self.tokens, self.chunk)

    def empty_states(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, Hkv, count, K, W]."""
        shape = (self.batch, self.key_heads, count, self.key_dim, self.width)
        return torch.empty(shape, dtype=dtype, device=self.device)

    @property
    def shape(self) -> dict[str, Any]:
        """What every kernel takes."""
        return {"tokens": self.tokens, "width": self.width, "C": self.chunk, "OPERAND": self.operand} | {
            "PRECISION": self.precision
        }


def _padded(width: int) -> int:
    return max(16, next_power_of_2(width))


def plan(q: Tensor | None, k: Tensor, v: Tensor, groups: Tensor | None, normalize: bool) -> Plan:
    """The cut for inputs: chunks by their dtype, pieces enough to fill the GPU."""
    batch, tokens, key_heads, key_dim = k.shape
    heads = key_heads if q is None else q.shape[2]
    # Where rows are read entry by entry, as of an odd width or of one that is no constant, ptxas 12.8 loses a uniform
    # register of wgmma's operands, and a product reads another place. Widths are constants, odd ones take no wgmma.
    odd = (key_dim | v.shape[3]) % 2
    narrow = k.dtype == torch.bfloat16 and not odd
    wide_chunk = WIDE_CHUNK if max(key_dim, v.shape[3]) <= 64 else WIDE_CHUNK // 2
    chunk = min(CHUNK if narrow else wide_chunk, cuts.UNIT, max(16, next_power_of_2(tokens)))
    # The interpreter multiplies the bits of bf16; there the operands are fp32.
    operand = tl.bfloat16 if narrow and k.is_cuda else tl.float32
    precision = "ieee" if k.dtype == torch.float32 or odd else "tf32"
    width = v.shape[3] + normalize
    pieces, span = cuts.cut_rows(tokens, batch * heads, v.shape[3], groups is not None)
    return Plan(
        batch, tokens, heads, key_heads, key_dim, v.shape[3], width, chunk, pieces, span, operand, precision, k.device,
    )  # fmt: skip


def room(q: Tensor, v: Tensor, initial: Tensor | None, state: tuple[int, ...]) -> Tensor:
    """An empty tensor as the states that enter the pieces, [B, Hkv, pieces, K, W], for one of [B, Hkv, slots, K, W].

    Of no numbers where a row is one piece that nothing enters.
    """
    pieces, _ = cuts.cut_rows(q.shape[1], q.shape[0] * q.shape[2], v.shape[3], state[2] == 2)
    shape = (0,) if initial is None and pieces == 1 else (*state[:2], pieces, *state[3:])
    return q.new_empty(shape, dtype=torch.float32)


@triton.jit
def _walk(
    p_x,
    p_y,
    p_u,
    p_out,
    p_twin,
    p_twin_out,
    p_result,
    p_inverse,
    p_drop,
    p_decay,
    p_documents,
    p_entering,
    p_leaving,
    p_states,
    scale,
    eps,
    tokens,
    heads,
    x_dim: tl.constexpr,
    u_dim: tl.constexpr,
    width,
    span,
    pieces,
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
):
    """out of a piece for a head and a block of columns of u, as the module says; without p_out only the state.

    A state lies in memory as [K, W], by y and u of the first walk; TRANSPOSED ones are read the other way. NORMALIZE
    adds the normaliser's column of the state: v has a last entry 1, and dy the gradient -drop = -dy . y of the sum.
    It meets the columns of the state (y), or its rows where TRANSPOSED (dq, dk); dv does without, but not its twin.

    The query's factor, scale * inverse, multiplies out from left to right and y from right to left.

    Args:
        p_twin: [B, T, H, V] v, for dk in p_twin_out beside dv: what a TRANSPOSED walk would make of it.
        p_result: [B, T, H, V] y, for dq of a normalised y, where p_drop is written. From right to left dk's walk and
            the twin read p_drop; TRANSPOSED walks make it from p_result where that is given.
        p_inverse: [B, H, T] of the normaliser, written with y and read after it.
        p_decay: [B, Hkv, T] log_a.
        p_entering: the states [B, Hkv, pieces, K, W] that enter; None for zero.
        p_leaving: likewise, those that leave.
        p_states: [B, Hkv, chunks, K, W], those that enter each chunk.
        SHARED: heads of x for each of y; SHARING: heads of y for each of x.
    """
    i_head = tl.program_id(1) % heads
    i_row = tl.program_id(1) // heads
    i_piece = tl.program_id(2)
    y_heads = heads // SHARED * SHARING
    i_state, o_x, o_u, size, place = state_of(heads, width, x_dim, u_dim, BLOCK_X, BLOCK_U, SHARED, TRANSPOSED)
    b_s, b_z = load_state(p_entering, i_state * pieces + i_piece, size, place, NORMALIZE)
    first = i_piece * (span // C)
    count = tl.cdiv(tl.minimum(span, tokens - i_piece * span), C)
    for i in range(0, count):
        i_chunk = first + (count - 1 - i if REVERSE else i)
        begin = i_chunk * C
        o_t = begin + tl.arange(0, C)
        if p_documents is not None:
            before = id_of(p_documents, i_row, begin - 1, tokens)
            last = id_of(p_documents, i_row, begin + C - 1, tokens)
            b_documents = id_of(p_documents, i_row, o_t, tokens)
            b_sees = b_documents == (last if REVERSE else before)
            b_goes = b_documents == (before if REVERSE else last)
        b_a = tl.zeros([C], tl.float32)
        if p_decay is not None:
            b_a = scalars_of(p_decay, i_state, o_t, tokens)
            total = tl.sum(b_a, 0)
            b_rest = tl.minimum(tl.cumsum(b_a, 0, reverse=True) - b_a, 0.0)
            b_a = tl.cumsum(b_a, 0)
        store_state(p_states, i_state * tl.cdiv(tokens, C) + i_chunk, size, place, b_s, b_z, NORMALIZE)
        if p_out is not None:
            b_x = rows_of(p_x, i_row, i_head, begin, tokens, o_x, tokens, heads, x_dim, C)
            if NORMALIZE and TRANSPOSED:
                # What x has for the normaliser's row.
                b_e = tl.full([C], 1.0, tl.float32)
                if not REVERSE:
                    b_e = minus_products(b_x, p_result, i_row, i_head, begin, tokens, o_x, tokens, heads, x_dim, C)
                    # Every block of columns finds the same; the first one writes it.
                    here = (o_t < tokens) & (tl.program_id(0) == 0)
                    tl.store(p_drop + tl.program_id(1).to(tl.int64) * tokens + o_t, -b_e, mask=here)
            b_o = tl.dot(b_x.to(OPERAND), b_s.to(OPERAND), input_precision=PRECISION)
            b_sum = tl.zeros([C], tl.float32)
            if NORMALIZE and TRANSPOSED:
                b_o += b_e[:, None] * b_z[None, :]
            elif NORMALIZE and not REVERSE:
                b_sum = tl.sum(b_x.to(tl.float32) * b_z[None, :], 1)
            if p_twin is not None:
                b_twin = rows_of(p_twin, i_row, i_head, begin, tokens, o_u, tokens, heads, u_dim, C)
                b_twin_o = tl.dot(b_twin.to(OPERAND), tl.trans(b_s).to(OPERAND), input_precision=PRECISION)
                if NORMALIZE:
                    b_twin_o += b_z[None, :]
            b_factor = tl.full([C], 1.0, tl.float32)
            if p_decay is not None:
                b_factor = tl.exp(b_rest if REVERSE else b_a)
            if p_documents is not None:
                b_factor = tl.where(b_sees, b_factor, 0.0)
            if p_decay is not None or p_documents is not None:
                b_o *= b_factor[:, None]
                b_sum *= b_factor
                if p_twin is not None:
                    b_twin_o *= b_factor[:, None]
            # Which y each x sees, and from how far.
            if REVERSE:
                live = o_t[:, None] <= o_t[None, :]
            else:
                live = o_t[:, None] >= o_t[None, :]
            if p_documents is not None:
                live &= b_documents[:, None] == b_documents[None, :]
        # What this chunk does to the state that it passes on.
        kept = 1.0
        if p_decay is not None:
            kept = tl.exp(total)
        if p_documents is not None:
            kept = tl.where(before == last, kept, 0.0)
        if p_decay is not None or p_documents is not None:
            b_s *= kept
            b_z *= kept
        if p_y is not None:
            for i_shared in range(0, SHARING):
                i_y = i_head // SHARED * SHARING + i_shared
                b_y = rows_of(p_y, i_row, i_y, begin, tokens, o_x, tokens, y_heads, x_dim, C)
                b_u = rows_of(p_u, i_row, i_y, begin, tokens, o_u, tokens, y_heads, u_dim, C)
                b_w, b_f = factors_of(
                    b_y, p_result, p_inverse, p_drop, scale, i_row, i_y, begin, tokens, o_x, tokens, y_heads, x_dim, C,
                    NORMALIZE, REVERSE
                )  # fmt: skip
                if p_out is not None:
                    b_p = tl.dot(b_x.to(OPERAND), tl.trans(b_y).to(OPERAND), input_precision=PRECISION)
                    if NORMALIZE and TRANSPOSED:
                        b_p += b_e[:, None] * b_f[None, :]
                    b_p = _seen(b_p, b_w, b_a, live, p_decay is not None, REVERSE)
                    if NORMALIZE and not TRANSPOSED and not REVERSE:
                        b_sum += tl.sum(b_p, 1)
                    b_o = tl.dot(b_p.to(OPERAND), b_u.to(OPERAND), b_o, input_precision=PRECISION)
                    if p_twin is not None:
                        b_p = tl.dot(b_twin.to(OPERAND), tl.trans(b_u).to(OPERAND), input_precision=PRECISION)
                        if NORMALIZE:
                            b_p += b_f[None, :]
                        b_p = _seen(b_p, b_w, b_a, live, p_decay is not None, REVERSE)
                        b_twin_o = tl.dot(b_p.to(OPERAND), b_y.to(OPERAND), b_twin_o, input_precision=PRECISION)
                if p_decay is not None:
                    b_w *= tl.exp(b_a if REVERSE else b_rest)
                if p_documents is not None:
                    b_w = tl.where(b_goes, b_w, 0.0)
                b_s, b_z = add_to_state(
                    b_s, b_z, b_y, b_u, b_w, b_f, REVERSE or p_decay is not None or p_documents is not None, NORMALIZE,
                    TRANSPOSED, OPERAND, PRECISION
                )  # fmt: skip
        if p_out is not None:
            if not REVERSE:
                b_rate = tl.full([C], 1.0, tl.float32)
                if NORMALIZE and not TRANSPOSED:
                    # No weight: y is 0 and, by an inverse of 0, nothing flows back.
                    b_rate = tl.where(b_sum == 0.0, 0.0, 1.0 / (scale * b_sum + eps))
                    here = (o_t < tokens) & (tl.program_id(0) == 0)
                    tl.store(p_inverse + tl.program_id(1).to(tl.int64) * tokens + o_t, b_rate, mask=here)
                elif p_inverse is not None:
                    b_rate = scalars_of(p_inverse, tl.program_id(1), o_t, tokens)
                b_o *= scale * b_rate[:, None]
            put_rows(p_out, b_o, i_row, i_head, begin, tokens, o_u, tokens, heads, u_dim, C)
        if p_twin is not None:
            put_rows(p_twin_out, b_twin_o, i_row, i_head, begin, tokens, o_x, tokens, heads, x_dim, C)
    store_state(p_leaving, i_state * pieces + i_piece, size, place, b_s, b_z, NORMALIZE)


@triton.jit
def _seen(b_p, b_w, b_a, live, DECAYS: tl.constexpr, REVERSE: tl.constexpr):
    """Products [x, y] of a chunk, weighed, where x sees y."""
    if REVERSE:
        b_p *= b_w[None, :]
    if DECAYS:
        b_gap = b_a[:, None] - b_a[None, :]
        b_p *= tl.exp(tl.minimum(-b_gap if REVERSE else b_gap, 0.0))
    return tl.where(live, b_p, 0.0)


@triton.jit
def _fold(
    p_sums,
    p_initial,
    p_opened,
    p_decays,
    p_documents,
    p_groups,
    p_marks,
    p_entering,
    p_last,
    tokens,
    heads,
    size,
    span,
    pieces,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The states that enter the pieces [B, Hkv, pieces, size], and leave the last, from what each adds alone.

    `p_opened`, the open part of the state that enters, joins behind the first piece walked.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(1) // heads
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    b_s = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        b_s = tl.load(p_initial + i_head * size + o, mask=mask, other=0.0)
    if p_opened is not None:
        b_opened = tl.load(p_opened + i_head * size + o, mask=mask, other=0.0)
    for i in tl.range(0, pieces, num_stages=STAGES):
        i_piece = pieces - 1 - i if REVERSE else i
        at = (i_head * pieces + i_piece) * size + o
        tl.store(p_entering + at, b_s, mask=mask)
        kept = 1.0
        if p_decays is not None:
            kept = tl.exp(tl.load(p_decays + i_head * pieces + i_piece))
        if p_documents is not None:
            begin, stop = i_piece * span, i_piece * span + span
            if p_groups is not None:
                first, end = groups_of_piece(p_groups, i_row, i_piece, span, pieces, tokens, REVERSE)
                begin, _ = mark_of(p_marks, i_row, first, tokens)
                stop, _ = mark_of(p_marks, i_row, end, tokens)
            before = id_of(p_documents, i_row, begin - 1, tokens)
            kept = tl.where(before == id_of(p_documents, i_row, stop - 1, tokens), kept, 0.0)
        if p_opened is not None:
            b_s += tl.where(i == 0, b_opened, 0.0)
        b_s = b_s * kept + tl.load(p_sums + at, mask=mask, other=0.0)
    tl.store(p_last + i_head * size + o, b_s, mask=mask)


@triton.jit
def _decay_gradients(
    p_q,
    p_k,
    p_v,
    p_dy,
    p_inverse,
    p_drop,
    p_decay,
    p_documents,
    p_states,
    p_adjoints,
    p_ddecay,
    scale,
    tokens,
    heads,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    width,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SHARING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of log_a of a chunk: the sum of w_ij dw_ij over the pairs j < t <= i, which its factor spans.

    i and j may each be in the chunk or beyond it, there by the states and the adjoints that enter it. No large sums
    are subtracted, as they would be from sums of q . dq and k . dk.
    """
    begin = tl.program_id(0) * C
    i_head = tl.program_id(1) % heads
    i_row = tl.program_id(1) // heads
    o_t = begin + tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * key_dim * width
    b_a = scalars_of(p_decay, tl.program_id(1), o_t, tokens)
    total = tl.sum(b_a, 0)
    b_out = tl.exp(tl.minimum(tl.cumsum(b_a, 0, reverse=True) - b_a, 0.0))
    b_a = tl.cumsum(b_a, 0)
    b_in = tl.exp(b_a)
    kept = tl.exp(total)
    live = o_t[:, None] >= o_t[None, :]
    if p_documents is not None:
        before = id_of(p_documents, i_row, begin - 1, tokens)
        last = id_of(p_documents, i_row, begin + C - 1, tokens)
        b_documents = id_of(p_documents, i_row, o_t, tokens)
        live &= b_documents[:, None] == b_documents[None, :]
        b_in = tl.where(b_documents == before, b_in, 0.0)
        b_out = tl.where(b_documents == last, b_out, 0.0)
        kept = tl.where(before == last, kept, 0.0)
    b_k = rows_of(p_k, i_row, i_head, begin, tokens, o_k, tokens, heads, key_dim, C)
    # Pairs that begin here and end beyond, and pairs that pass over the chunk.
    b_after = tl.zeros([C], tl.float32)
    b_over = tl.zeros([BLOCK_K], tl.float32)
    for i_v in range(0, tl.cdiv(width, BLOCK_V)):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        o_s = at + o_k[:, None] * width + o_v[None, :]
        in_s = (o_k[:, None] < key_dim) & (o_v[None, :] < width)
        b_v = rows_of(p_v, i_row, i_head, begin, tokens, o_v, tokens, heads, value_dim, C).to(tl.float32)
        if NORMALIZE:
            b_v += (o_v == value_dim).to(tl.float32)[None, :]
        b_s = tl.load(p_states + o_s, mask=in_s, other=0.0).to(tl.float32)
        b_d = tl.load(p_adjoints + o_s, mask=in_s, other=0.0).to(tl.float32)
        b_after += tl.sum(tl.dot(b_k.to(OPERAND), b_d.to(OPERAND), input_precision=PRECISION) * b_v, 1)
        b_over += tl.sum(b_s * b_d, 1)
    b_after *= b_out
    b_spans = o_t[:, None] >= o_t[None, :]
    b_gradient = kept * tl.sum(b_over, 0) + tl.sum(tl.where(o_t[:, None] < o_t[None, :], b_after[:, None], 0.0), 0)
    if p_q is not None:
        b_decay = tl.exp(tl.minimum(b_a[:, None] - b_a[None, :], 0.0))
        for i_shared in range(0, SHARING):
            i_q = i_head * SHARING + i_shared
            b_q = rows_of(p_q, i_row, i_q, begin, tokens, o_k, tokens, heads * SHARING, key_dim, C)
            if NORMALIZE:
                b_drop = scalars_of(p_drop, i_row * heads * SHARING + i_q, o_t, tokens)
            b_dw = tl.zeros([C, C], tl.float32)
            b_before = tl.zeros([C], tl.float32)
            for i_v in range(0, tl.cdiv(width, BLOCK_V)):
                o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
                o_s = at + o_k[:, None] * width + o_v[None, :]
                in_s = (o_k[:, None] < key_dim) & (o_v[None, :] < width)
                b_v = rows_of(p_v, i_row, i_head, begin, tokens, o_v, tokens, heads, value_dim, C).to(tl.float32)
                b_g = rows_of(p_dy, i_row, i_q, begin, tokens, o_v, tokens, heads * SHARING, value_dim, C).to(
                    tl.float32
                )
                b_s = tl.load(p_states + o_s, mask=in_s, other=0.0).to(OPERAND)
                b_part = tl.dot(b_q.to(OPERAND), b_s, input_precision=PRECISION)
                b_dw = tl.dot(b_g.to(OPERAND), tl.trans(b_v).to(OPERAND), b_dw, input_precision=PRECISION)
                if NORMALIZE:
                    b_g -= (o_v == value_dim).to(tl.float32)[None, :] * b_drop[:, None]
                b_before += tl.sum(b_part * b_g, 1)
            b_rate = tl.full([C], 1.0, tl.float32) * scale
            if NORMALIZE:
                b_dw -= b_drop[:, None]
                b_rate *= scalars_of(p_inverse, i_row * heads * SHARING + i_q, o_t, tokens)
            b_m = tl.dot(b_q.to(OPERAND), tl.trans(b_k).to(OPERAND), input_precision=PRECISION)
            b_m = tl.where(live, b_m * b_dw * b_decay, 0.0) * b_rate[:, None]
            b_spanned = tl.cumsum(b_m, 1) - b_m + (b_before * b_rate * b_in)[:, None]
            b_gradient += tl.sum(tl.where(b_spans, b_spanned, 0.0), 0)
    tl.store(p_ddecay + tl.program_id(1).to(tl.int64) * tokens + o_t, b_gradient, mask=o_t < tokens)


class Rows(NamedTuple):
    """What decides who sees whom, in every pass."""

    decay: Tensor | None
    documents: Tensor | None
    groups: Groups | None


class State(NamedTuple):
    """What enters rows [B, Hkv, K, W]: the state, or its gradient from the right; with groups the open one's apart."""

    completed: Tensor | None
    opened: Tensor | None


def forward(
    group: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, final_state, inverse of the normaliser [B, H, T] or empty, states that enter the pieces); see op.py."""
    cut = plan(q, k, v, groups, normalize)
    q, k, v = packed(q, k, v)
    y = q.new_empty(*q.shape[:3], cut.value_dim)
    inverse = _per_token(cut) if normalize else q.new_empty(0, dtype=torch.float32)
    scalars: dict[str, Any] = {"inverse": inverse if normalize else None, "scale": scale, "eps": eps}
    with on(q):
        rows, state = _rows(decay, documents, groups, group), _entered(initial, groups)
        entering, last = _entering(cut, k, v, rows, state)
        leaving = cut.empty_states(cut.pieces) if last is None else None
        _run(cut, q, k, v, y, rows, entering, leaving, normalize=normalize, **scalars)
        final = _left(cut, last if leaving is None else leaving[:, :, -1], k, v, rows, state)
    return y, final, inverse, q.new_empty(0, dtype=torch.float32) if entering is None else entering


def backward(
    group: int,
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    y: Tensor,
    inverse: Tensor,
    entering: Tensor,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, ddecay, dinitial), from the inputs and what the forward pass returned."""
    cut = plan(q, k, v, groups, normalize)
    dy, q, k, v = packed(dy, q, k, v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    drop = _per_token(cut) if normalize else None
    scalars: dict[str, Any] = {"inverse": inverse if normalize else None, "drop": drop, "scale": scale}
    states, adjoints = (_chunk_states(cut) if decay is not None else None for _ in range(2))
    with on(q):
        rows = _rows(decay, documents, groups, group)
        after = _entered(dfinal, groups, reverse=True)
        dividing = {"transposed": True, "normalize": normalize, "result": y}
        entered = entering if entering.numel() else None
        _run(cut, dy, v, k, dq, rows, entered, None, states, **dividing, **scalars)
        arriving, last = _entering(cut, q, dy, rows, after, reverse=True, **scalars)
        leaving = cut.empty_states(cut.pieces) if last is None else None
        _run_keys(cut, k, v, q, dy, dk, dv, rows, arriving, leaving, adjoints, normalize=normalize, **scalars)
        ddecay = _decays(cut, q, k, v, dy, scalars, rows, states, adjoints, normalize)
        total = last if leaving is None else leaving[:, :, 0]
        dinitial = _left(cut, total, q, dy, rows, after, reverse=True, **scalars)
    return dq, dk, dv, ddecay, dinitial


def summarize(
    group: int,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    normalize: bool,
) -> Tensor:
    """State [B, Hkv, slots, K, W] that the piece leaves from zero; see op.py."""
    cut = plan(None, k, v, groups, normalize)
    k, v = packed(k, v)
    nothing = State(None, None)
    with on(k):
        rows = _rows(decay, documents, groups, group)
        return _left(cut, _total(cut, _sums(cut, k, v, rows), rows), k, v, rows, nothing)


def adjoint(
    group: int,
    scale: float,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    y: Tensor,
    inverse: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
) -> Tensor:
    """dinitial [B, Hkv, slots, K, W]; see reference.py."""
    normalize = inverse.numel() > 0
    cut = plan(q, k, dy, groups, normalize)
    dy, q, y = packed(dy, q, y)
    divided: dict[str, Any] = {"result": y, "inverse": inverse} if normalize else {}
    walk: dict[str, Any] = {"scale": scale, "transposed": True, "reverse": True, **divided}
    nothing = State(None, None)
    with on(q):
        rows = _rows(decay, documents, groups, group)
        total = _total(cut, _sums(cut, dy, q, rows, **walk), rows, reverse=True)
        return _left(cut, total, dy, q, rows, nothing, **walk)


def summarize_backward(
    group: int,
    dstate: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk, dv, ddecay) from the gradient of what `summarize` returns: walks that meet no query."""
    cut = plan(None, k, v, groups, normalize)
    k, v = packed(k, v)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    states, adjoints = (_chunk_states(cut) if decay is not None else None for _ in range(2))
    with on(k):
        rows, after = _rows(decay, documents, groups, group), _entered(dstate, groups, reverse=True)
        arriving, _ = _entering(cut, None, None, rows, after, reverse=True)
        _run_keys(cut, k, v, None, None, dk, dv, rows, arriving, None, adjoints, normalize=normalize)
        if states is not None:
            entering, _ = _entering(cut, k, v, rows, State(None, None))
            _run(cut, None, k, v, None, rows, entering, None, states, normalize=normalize)
        ddecay = _decays(cut, None, k, v, None, {"scale": 1.0}, rows, states, adjoints, normalize)
    return dk, dv, ddecay


def _rows(decay: Tensor | None, documents: Tensor | None, groups: Tensor | None, group: int) -> Rows:
    decay, documents, groups = packed(decay, documents, groups)
    return Rows(decay, documents, None if groups is None else mark_groups(groups, documents, group))


def _entered(state: Tensor | None, groups: Tensor | None, reverse: bool = False) -> State:
    """What enters, of [B, Hkv, slots, K, W]: with groups of (both, open), or of the gradient's (both, -open)."""
    if state is None or groups is None:
        return State(None if state is None else state[:, :, 0].contiguous(), None)
    opened = (-state[:, :, 1] if reverse else state[:, :, 1]).contiguous()
    return State(state[:, :, 0] - opened, opened)


def _left(
    cut: Plan,
    total: Tensor,
    y: Tensor,
    u: Tensor,
    rows: Rows,
    entered: State,
    reverse: bool = False,
    **walk: Any,
) -> Tensor:
    """[B, Hkv, slots, K, W] of what leaves rows: `total`, and with groups what the last one walked has in it.

    Where no other group has anything in it both have the same bits, which op.py promises: all walks of a group cut it
    into the same chunks and the same products.
    """
    if rows.groups is None:
        return total[:, :, None].contiguous()
    state = cut.empty_states(1)
    _run(
        cut, None, y, u, None, rows, None, state, opened=entered.opened, reverse=reverse, last=True,
        normalize=cut.width > cut.value_dim, **walk,
    )  # fmt: skip
    return torch.stack([total, -state[:, :, 0] if reverse else state[:, :, 0]], 2)


def _entering(
    cut: Plan, y: Tensor | None, u: Tensor | None, rows: Rows, state: State, reverse: bool = False, **walk: Any
) -> tuple[Tensor | None, Tensor | None]:
    """(states that enter pieces, None for zeros; what leaves the last piece, None where the next walk leaves it)."""
    if cut.pieces == 1:
        first = state.completed
        return None if first is None else cut.empty_states(1).copy_(first[:, :, None]), None
    # Of a row in one span only the sum of the first group is needed.
    alone = rows.groups is not None and cut.pieces == 2
    entering, last = _folded(cut, _sums(cut, y, u, rows, reverse=reverse, alone=alone, **walk), rows, state, reverse)
    return entering, None if alone else last


def _total(cut: Plan, sums: Tensor, rows: Rows, reverse: bool = False) -> Tensor:
    """The state [B, Hkv, K, W] that leaves the last piece, from zero."""
    return sums[:, :, 0] if cut.pieces == 1 else _folded(cut, sums, rows, State(None, None), reverse)[1]


def _folded(cut: Plan, sums: Tensor, rows: Rows, state: State, reverse: bool) -> tuple[Tensor, Tensor]:
    """(states that enter the pieces, the state that leaves the last) from what each piece adds."""
    entering, last = torch.empty_like(sums), torch.empty_like(sums[:, :, 0])
    decays = None
    if rows.decay is not None:
        missing = cut.pieces * cut.span - cut.tokens
        decays = torch.nn.functional.pad(rows.decay, [0, missing]).unflatten(2, (cut.pieces, cut.span)).sum(-1)
    size = cut.key_dim * cut.width
    block = 256
    ids, marks, _ = rows.groups or (None, None, 0)
    _fold[(cdiv(size, block), cut.batch * cut.key_heads)](
        sums, *state, decays, rows.documents, ids, marks, entering, last, cut.tokens, cut.key_heads, size, cut.span,
        cut.pieces, BLOCK=block, REVERSE=reverse, STAGES=FOLD_STAGES if cut.pieces > FOLD_STAGES else 1,
        num_warps=2,
    )  # fmt: skip
    return entering, last


def _sums(cut: Plan, y: Tensor | None, u: Tensor | None, rows: Rows, **walk: Any) -> Tensor:
    """[B, Hkv, pieces, K, W]: what each piece adds to a state of zeros."""
    sums = cut.empty_states(cut.pieces)
    if y is None:
        return sums.zero_()
    _run(cut, None, y, u, None, rows, None, sums, normalize=cut.width > cut.value_dim, **walk)
    return sums


def _run_keys(
    cut: Plan,
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    dy: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    rows: Rows,
    arriving: Tensor | None,
    leaving: Tensor | None,
    adjoints: Tensor | None,
    normalize: bool,
    **scalars: Any,
) -> None:
    """Fills dk and dv: by one walk, which reads its tensors once for both, if a program holds all of the state.

    With decays and a normaliser that walk would spill 700 bytes a thread, the two spill 100.
    """
    if cut.twin and not (normalize and rows.decay is not None):
        _run(
            cut, k, q, dy, dv, rows, arriving, leaving, adjoints, twin=(v, dk), reverse=True, normalize=normalize,
            **scalars,
        )  # fmt: skip
        return
    _run(cut, k, q, dy, dv, rows, arriving, None, reverse=True, **scalars)
    transposed = {"transposed": True, "normalize": normalize}
    _run(cut, v, dy, q, dk, rows, arriving, leaving, adjoints, reverse=True, **transposed, **scalars)


def _run(
    cut: Plan,
    x: Tensor | None,
    y: Tensor | None,
    u: Tensor | None,
    out: Tensor | None,
    rows: Rows,
    entering: Tensor | None,
    leaving: Tensor | None,
    states: Tensor | None = None,
    *,
    twin: tuple[Tensor, Tensor] | None = None,
    opened: Tensor | None = None,
    result: Tensor | None = None,
    inverse: Tensor | None = None,
    drop: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 0.0,
    normalize: bool = False,
    transposed: bool = False,
    reverse: bool = False,
    alone: bool = False,
    last: bool = False,
) -> None:
    """A pass; of the rows' groups only the first one walked, `alone`, or only the last."""
    x_dim, u_dim = (cut.value_dim, cut.key_dim) if transposed else (cut.key_dim, cut.value_dim)
    tile = cut.tile(x_dim, u_dim, twin is not None)
    shared = cut.heads // cut.key_heads
    heads = cut.key_heads if reverse or out is None else cut.heads
    pieces = 1 if last else cut.pieces
    grid = (cdiv(u_dim, tile.block), cut.batch * heads, 1 if alone else pieces)
    sizes = cut.shape | {
        "heads": heads, "x_dim": x_dim, "u_dim": u_dim, "span": cut.span, "pieces": pieces, "BLOCK_X": _padded(x_dim),
        "BLOCK_U": tile.block, "SHARED": heads // cut.key_heads, "SHARING": shared if reverse else 1,
        "NORMALIZE": normalize, "TRANSPOSED": transposed, "REVERSE": reverse, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip
    tensors = (x, y, u, out, *(twin or (None, None)), result, inverse, drop)
    if rows.groups is None:
        others = (rows.decay, rows.documents, entering, leaving, states)
        _walk[grid](*tensors, *others, scale, eps, **sizes)
    else:
        ids, marks, most = rows.groups
        others = (ids, marks, entering, opened, leaving)
        sizes |= {"DOCUMENTS": rows.documents is not None, "WHOLE": most <= cut.chunk, "LAST": last}
        walk_groups[grid](*tensors, *others, scale, eps, skip=pieces - 1 if alone and reverse else 0, **sizes)


def _decays(cut: Plan, q, k: Tensor, v: Tensor, dy, scalars, rows: Rows, states, adjoints, normalize: bool) -> Tensor:
    """The gradient of the decays [B, Hkv, T], empty where there are none."""
    if rows.decay is None:
        return k.new_empty(0)
    ddecay = torch.empty_like(rows.decay)
    wide = cut.key_dim > 64
    _decay_gradients[(cut.chunks, cut.batch * cut.key_heads)](
        q, k, v, dy, scalars.get("inverse"), scalars.get("drop"), rows.decay, rows.documents, states, adjoints, ddecay,
        scalars["scale"], heads=cut.key_heads, key_dim=cut.key_dim, value_dim=cut.value_dim,
        BLOCK_K=_padded(cut.key_dim), BLOCK_V=16 if wide else 32, SHARING=cut.heads // cut.key_heads,
        NORMALIZE=normalize, **cut.shape, num_warps=8 if wide else 4,
    )  # fmt: skip
    return ddecay


def _chunk_states(cut: Plan) -> Tensor:
    return cut.empty_states(cut.chunks, torch.bfloat16 if cut.operand == tl.bfloat16 else torch.float32)


def _per_token(cut: Plan) -> Tensor:
    return torch.empty(cut.batch, cut.heads, cut.tokens, dtype=torch.float32, device=cut.device)


def packed(*tensors: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them."""
    return [None if t is None else t.contiguous() for t in tensors]

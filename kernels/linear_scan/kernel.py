"""The diagonal linear scan in Triton: two passes over pieces of the sequence, no communication between programs.

A program owns one row, BLOCK_D channels and one piece of the tokens, which it walks token by token with the state in
registers. `_summary` leaves what each piece does to a state; the second pass folds the summaries of the pieces before
its own, in sequence order, and walks again from its true state. Every sum has one fixed order, so bits repeat.

This is the plain version. It reads the inputs twice where they exceed the L2 cache (5/3 of the bytes a single pass
moves, forward and 16-bit); a single pass with a chained carry is the step after it. Loads are prefetched by the
loop's stages, and enough pieces are cut to fill a GPU of about 132 SMs.

Rows of a loop carry i_, offsets o_, loaded blocks b_ and pointers p_. State is fp32; every load is cast to it before
any arithmetic.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that fill a GPU: 132 SMs of 16 programs, each with 4 rows of loads in flight.
PROGRAMS = 2112
# The fold reads every earlier summary, so its cost grows with the pieces.
MOST_PIECES = 128
SHORTEST_PIECE = 32


@dataclass(frozen=True)
class Plan:
    """How [B, T, D] is cut: `pieces` of `piece` tokens (the last may be shorter) by channel blocks of `block`."""

    batch: int
    tokens: int
    width: int
    block: int
    piece: int
    pieces: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs by piece, channel block and row."""
        return self.pieces, -(-self.width // self.block), self.batch


def plan(batch: int, tokens: int, width: int) -> Plan:
    """The cut for a shape: enough pieces to fill the GPU, none shorter than 32 tokens, at most 128."""
    block = min(128, max(16, triton.next_power_of_2(width)))
    columns = batch * triton.cdiv(width, block)
    pieces = min(MOST_PIECES, triton.cdiv(PROGRAMS, columns), triton.cdiv(tokens, SHORTEST_PIECE))
    piece = triton.cdiv(tokens, pieces)
    return Plan(batch, tokens, width, block, piece, triton.cdiv(tokens, piece))


@triton.jit
def piece_span(tokens, piece, REVERSE: tl.constexpr):
    """(first token, count, step) of this program's piece in the order it is walked."""
    start = tl.program_id(0) * piece
    stop = tl.minimum(start + piece, tokens)
    if REVERSE:
        return stop - 1, stop - start, -1
    return start, stop - start, 1


@triton.jit
def entering(p_state, p_transition, b_state, o_d, mask, width, REVERSE: tl.constexpr):
    """The state that enters this program's piece: `b_state` through all pieces walked before it, in their order."""
    i_piece = tl.program_id(0)
    pieces = tl.num_programs(0)
    count = pieces - 1 - i_piece if REVERSE else i_piece
    row = tl.program_id(2).to(tl.int64) * pieces
    for i in tl.range(0, count, num_stages=4):
        at = row + (pieces - 1 - i if REVERSE else i)
        b_transition = tl.load(p_transition + at * width + o_d, mask=mask, other=0.0)
        b_state = b_transition * b_state + tl.load(p_state + at * width + o_d, mask=mask, other=0.0)
    return b_state


@triton.jit
def vector(pointer, o_d, mask, width):
    """This row's vector of [B, D] in fp32, or zeros for None."""
    b = tl.zeros(o_d.shape, tl.float32)
    if pointer is not None:
        row = tl.program_id(2).to(tl.int64) * width
        b = tl.load(pointer + row + o_d, mask=mask, other=0.0).to(tl.float32)
    return b


@triton.jit
def _factor(p_log_a, p_resets, at, o_d, mask, width):
    """exp(log_a), or zeros where token `at` (over the rows laid end to end) begins a document."""
    b_a = tl.exp(tl.load(p_log_a + at * width + o_d, mask=mask, other=0.0).to(tl.float32))
    if p_resets is not None:
        b_a = tl.where(tl.load(p_resets + at) != 0, 0.0, b_a)
    return b_a


@triton.jit
def _summary(
    p_x, p_log_a, p_resets, p_state, p_transition, tokens, width, piece, BLOCK_D: tl.constexpr, REVERSE: tl.constexpr
):
    """[B, pieces, D] twice: the state a piece leaves from zero, and the product of its factors.

    In reverse the state is the gradient that leaves the piece on its left, a_t (dh_t + state), with x for dh.
    """
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    first, count, step = piece_span(tokens, piece, REVERSE)
    row = tl.program_id(2).to(tl.int64) * tokens
    b_state = tl.zeros([BLOCK_D], tl.float32)
    b_transition = tl.zeros([BLOCK_D], tl.float32) + 1.0
    for i in tl.range(0, count, num_stages=4):
        at = row + first + i * step
        b_a = _factor(p_log_a, p_resets, at, o_d, mask, width)
        b_transition *= b_a
        b_x = tl.zeros([BLOCK_D], tl.float32)
        if p_x is not None:
            b_x = tl.load(p_x + at * width + o_d, mask=mask, other=0.0).to(tl.float32)
        b_state = b_a * (b_state + b_x) if REVERSE else b_a * b_state + b_x
    out = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * width + o_d
    tl.store(p_state + out, b_state, mask=mask)
    tl.store(p_transition + out, b_transition, mask=mask)


@triton.jit
def _walk_forward(
    p_x, p_log_a, p_resets, p_initial, p_state, p_transition, p_h, p_final, tokens, width, piece, BLOCK_D: tl.constexpr
):
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    first, count, step = piece_span(tokens, piece, False)
    row = tl.program_id(2).to(tl.int64) * tokens
    b_h = entering(p_state, p_transition, vector(p_initial, o_d, mask, width), o_d, mask, width, False)
    for i in tl.range(0, count, num_stages=4):
        at = row + first + i * step
        b_a = _factor(p_log_a, p_resets, at, o_d, mask, width)
        b_h = b_a * b_h + tl.load(p_x + at * width + o_d, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_h + at * width + o_d, b_h.to(p_h.dtype.element_ty), mask=mask)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(p_final + tl.program_id(2).to(tl.int64) * width + o_d, b_h, mask=mask)


@triton.jit
def _walk_backward(
    p_dh,
    p_dfinal,
    p_extra,
    p_log_a,
    p_resets,
    p_h,
    p_initial,
    p_state,
    p_transition,
    p_dx,
    p_dlog_a,
    p_dinitial,
    tokens,
    width,
    piece,
    BLOCK_D: tl.constexpr,
):
    """dx_t = dh_t + b_state, where b_state is a_{t+1} dx_{t+1}, the gradient that token t + 1 hands to h_t."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    first, count, step = piece_span(tokens, piece, True)
    row = tl.program_id(2).to(tl.int64) * tokens
    b_initial = vector(p_initial, o_d, mask, width)
    b_extra = vector(p_extra, o_d, mask, width)
    b_state = entering(p_state, p_transition, vector(p_dfinal, o_d, mask, width), o_d, mask, width, True)
    for i in tl.range(0, count, num_stages=4):
        t = first + i * step
        at = row + t
        b_a = _factor(p_log_a, p_resets, at, o_d, mask, width)
        b_before = tl.load(p_h + (at - 1) * width + o_d, mask=mask & (t > 0), other=0.0).to(tl.float32)
        b_before = tl.where(t > 0, b_before, b_initial)
        b_dx = b_state
        if p_dh is not None:
            b_dx += tl.load(p_dh + at * width + o_d, mask=mask, other=0.0).to(tl.float32)
        b_state = b_a * b_dx
        tl.store(p_dx + at * width + o_d, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        tl.store(p_dlog_a + at * width + o_d, (b_state * b_before + b_extra).to(p_dlog_a.dtype.element_ty), mask=mask)
    if tl.program_id(0) == 0:
        tl.store(p_dinitial + tl.program_id(2).to(tl.int64) * width + o_d, b_state, mask=mask)


@triton.jit
def _fold_pieces(p_state, p_transition, p_last, p_product, pieces, width, BLOCK_D: tl.constexpr):
    """[B, D] twice: all pieces of a row folded into one."""
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    row = tl.program_id(1).to(tl.int64)
    b_state = tl.zeros([BLOCK_D], tl.float32)
    b_product = tl.zeros([BLOCK_D], tl.float32) + 1.0
    for i in tl.range(0, pieces, num_stages=4):
        at = (row * pieces + i) * width + o_d
        b_transition = tl.load(p_transition + at, mask=mask, other=0.0)
        b_state = b_transition * b_state + tl.load(p_state + at, mask=mask, other=0.0)
        b_product *= b_transition
    tl.store(p_last + row * width + o_d, b_state, mask=mask)
    tl.store(p_product + row * width + o_d, b_product, mask=mask)


def forward(x: Tensor, log_a: Tensor, initial: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    cut = plan(*x.shape)
    x, log_a, initial, resets = packed(x, log_a, initial, resets)
    h, final = torch.empty_like(x), per_row(cut, x)
    with on(x):
        summaries = _summaries(cut, x, log_a, resets, reverse=False)
        _walk_forward[cut.grid](
            x,
            log_a,
            resets,
            initial,
            *summaries,
            h,
            final,
            cut.tokens,
            cut.width,
            cut.piece,
            BLOCK_D=cut.block,
            num_warps=2,
        )
    return h, final


def backward(
    dh: Tensor | None,
    dfinal: Tensor,
    extra: Tensor | None,
    log_a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dlog_a, dinitial); arguments as in reference.py."""
    cut = plan(*h.shape)
    dh, dfinal, extra, log_a, h, initial, resets = packed(dh, dfinal, extra, log_a, h, initial, resets)
    dx, dlog_a, dinitial = torch.empty_like(h), torch.empty_like(log_a), per_row(cut, h)
    with on(h):
        summaries = _summaries(cut, dh, log_a, resets, reverse=True)
        _walk_backward[cut.grid](
            dh,
            dfinal,
            extra,
            log_a,
            resets,
            h,
            initial,
            *summaries,
            dx,
            dlog_a,
            dinitial,
            cut.tokens,
            cut.width,
            cut.piece,
            BLOCK_D=cut.block,
            num_warps=2,
        )
    return dx, dlog_a, dinitial


def summarize(x: Tensor, log_a: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    cut = plan(*x.shape)
    x, log_a, resets = packed(x, log_a, resets)
    with on(x):
        return fold_pieces(cut, *_summaries(cut, x, log_a, resets, reverse=False))


def _summaries(
    cut: Plan, x: Tensor | None, log_a: Tensor, resets: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    state, transition = per_piece(cut, log_a), per_piece(cut, log_a)
    _summary[cut.grid](
        x,
        log_a,
        resets,
        state,
        transition,
        cut.tokens,
        cut.width,
        cut.piece,
        BLOCK_D=cut.block,
        REVERSE=reverse,
        num_warps=2,
    )
    return state, transition


def fold_pieces(cut: Plan, state: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
    """(state, transition) [B, D] of whole rows from those [B, pieces, D] of their pieces."""
    last, product = per_row(cut, state), per_row(cut, state)
    _, columns, batch = cut.grid
    _fold_pieces[(columns, batch)](
        state, transition, last, product, cut.pieces, cut.width, BLOCK_D=cut.block, num_warps=2
    )
    return last, product


def packed(*tensors: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them; bool as bytes."""
    laid = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in laid]


def per_row(cut: Plan, like: Tensor) -> Tensor:
    """Room for one fp32 vector a row, [B, D]."""
    return torch.empty(cut.batch, cut.width, dtype=torch.float32, device=like.device)


def per_piece(cut: Plan, like: Tensor) -> Tensor:
    """Room for one fp32 vector a piece, [B, pieces, D]."""
    return torch.empty(cut.batch, cut.pieces, cut.width, dtype=torch.float32, device=like.device)


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's GPU; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

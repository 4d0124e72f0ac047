"""The RG-LRU in Triton: gates, normaliser and scan in one kernel a pass; h, and nothing between, goes to memory.

Cut and folded as linear_scan/kernel.py describes, whose helpers it shares: this is the plain version that reads its
inputs twice where they exceed the L2 cache. The backward pass recomputes the gates; the gradient of a_param is summed
piece by piece and then over pieces in a fixed order, without atomics, so bits repeat.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear_scan.kernel import (
    Plan,
    entering,
    fold_pieces,
    on,
    packed,
    per_piece,
    per_row,
    piece_span,
    plan,
    vector,
)
from .reference import DECAY_SCALE, SQRT_GUARD, _rate

GUARD = tl.constexpr(SQRT_GUARD)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, to 1e-7 of itself: a Taylor polynomial above -0.5, where the difference would cancel."""
    near = 1.0 / 5040 + x * (1.0 / 40320)
    near = 1.0 / 720 + x * near
    near = 1.0 / 120 + x * near
    near = 1.0 / 24 + x * near
    near = 1.0 / 6 + x * near
    near = 0.5 + x * near
    near = x + x * x * near
    return tl.where(x > -0.5, near, tl.exp(x) - 1.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load(pointer, at, o_d, mask, width):
    return tl.load(pointer + at * width + o_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decay(p_gate_a, p_resets, b_rate, at, o_d, mask, width):
    """(r, e): the recurrence gate and a - 1, which is -1 at a document's first token."""
    b_r = _sigmoid(_load(p_gate_a, at, o_d, mask, width))
    b_e = _expm1(b_rate * b_r)
    if p_resets is not None:
        b_e = tl.where(tl.load(p_resets + at) != 0, -1.0, b_e)
    return b_r, b_e


@triton.jit
def _summary(
    p_x, p_gate_a, p_gate_x, p_rate, p_resets, p_state, p_transition, tokens, width, piece, BLOCK_D: tl.constexpr
):
    """[B, pieces, D] twice: the state a piece leaves from zero, and the product of its factors."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    first, count, step = piece_span(tokens, piece, False)
    row = tl.program_id(2).to(tl.int64) * tokens
    b_rate = tl.load(p_rate + o_d, mask=mask, other=0.0)
    b_state = tl.zeros([BLOCK_D], tl.float32)
    b_transition = tl.zeros([BLOCK_D], tl.float32) + 1.0
    for i in tl.range(0, count, num_stages=4):
        at = row + first + i * step
        b_r, b_e = _decay(p_gate_a, p_resets, b_rate, at, o_d, mask, width)
        b_i = _sigmoid(_load(p_gate_x, at, o_d, mask, width))
        b_u = tl.sqrt(-b_e * (2.0 + b_e)) * b_i * _load(p_x, at, o_d, mask, width)
        b_state = (1.0 + b_e) * b_state + b_u
        b_transition *= 1.0 + b_e
    out = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * width + o_d
    tl.store(p_state + out, b_state, mask=mask)
    tl.store(p_transition + out, b_transition, mask=mask)


@triton.jit
def _summary_reverse(
    p_dh, p_gate_a, p_rate, p_resets, p_state, p_transition, tokens, width, piece, BLOCK_D: tl.constexpr
):
    """[B, pieces, D] twice: the gradient a piece hands to its left from none on its right, and its factors' product."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    first, count, step = piece_span(tokens, piece, True)
    row = tl.program_id(2).to(tl.int64) * tokens
    b_rate = tl.load(p_rate + o_d, mask=mask, other=0.0)
    b_state = tl.zeros([BLOCK_D], tl.float32)
    b_transition = tl.zeros([BLOCK_D], tl.float32) + 1.0
    for i in tl.range(0, count, num_stages=4):
        at = row + first + i * step
        b_r, b_e = _decay(p_gate_a, p_resets, b_rate, at, o_d, mask, width)
        if p_dh is not None:
            b_state += _load(p_dh, at, o_d, mask, width)
        b_state *= 1.0 + b_e
        b_transition *= 1.0 + b_e
    out = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * width + o_d
    tl.store(p_state + out, b_state, mask=mask)
    tl.store(p_transition + out, b_transition, mask=mask)


@triton.jit
def _walk_forward(
    p_x,
    p_gate_a,
    p_gate_x,
    p_rate,
    p_resets,
    p_initial,
    p_state,
    p_transition,
    p_h,
    p_final,
    tokens,
    width,
    piece,
    BLOCK_D: tl.constexpr,
):
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    first, count, step = piece_span(tokens, piece, False)
    row = tl.program_id(2).to(tl.int64) * tokens
    b_rate = tl.load(p_rate + o_d, mask=mask, other=0.0)
    b_h = entering(p_state, p_transition, vector(p_initial, o_d, mask, width), o_d, mask, width, False)
    for i in tl.range(0, count, num_stages=4):
        at = row + first + i * step
        b_r, b_e = _decay(p_gate_a, p_resets, b_rate, at, o_d, mask, width)
        b_i = _sigmoid(_load(p_gate_x, at, o_d, mask, width))
        b_u = tl.sqrt(-b_e * (2.0 + b_e)) * b_i * _load(p_x, at, o_d, mask, width)
        b_h = (1.0 + b_e) * b_h + b_u
        tl.store(p_h + at * width + o_d, b_h.to(p_h.dtype.element_ty), mask=mask)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(p_final + tl.program_id(2).to(tl.int64) * width + o_d, b_h, mask=mask)


@triton.jit
def _walk_backward(
    p_dh,
    p_dfinal,
    p_extra,
    p_x,
    p_gate_a,
    p_gate_x,
    p_rate,
    p_resets,
    p_h,
    p_initial,
    p_state,
    p_transition,
    p_dx,
    p_dgate_a,
    p_dgate_x,
    p_drate,
    p_dinitial,
    tokens,
    width,
    piece,
    BLOCK_D: tl.constexpr,
):
    """The gradients of reference.py's `backward`; b_state is the gradient that token t + 1 hands to h_t."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    first, count, step = piece_span(tokens, piece, True)
    row = tl.program_id(2).to(tl.int64) * tokens
    b_rate = tl.load(p_rate + o_d, mask=mask, other=0.0)
    b_initial = vector(p_initial, o_d, mask, width)
    b_extra = vector(p_extra, o_d, mask, width)
    b_state = entering(p_state, p_transition, vector(p_dfinal, o_d, mask, width), o_d, mask, width, True)
    b_drate = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.range(0, count, num_stages=4):
        t = first + i * step
        at = row + t
        b_r, b_e = _decay(p_gate_a, p_resets, b_rate, at, o_d, mask, width)
        b_a = 1.0 + b_e
        b_i = _sigmoid(_load(p_gate_x, at, o_d, mask, width))
        b_x = _load(p_x, at, o_d, mask, width)
        b_before = tl.load(p_h + (at - 1) * width + o_d, mask=mask & (t > 0), other=0.0).to(tl.float32)
        b_before = tl.where(t > 0, b_before, b_initial)
        b_du = b_state
        if p_dh is not None:
            b_du += _load(p_dh, at, o_d, mask, width)
        b_state = b_a * b_du
        b_square = -b_e * (2.0 + b_e)
        b_m = tl.sqrt(b_square)
        b_dm = b_du * b_i * b_x
        b_slope = 1.0 / tl.sqrt(tl.maximum(4.0 * b_square, GUARD))
        b_dlog_a = b_state * b_before - 2.0 * b_a * b_a * b_slope * b_dm + b_extra
        b_drate += b_dlog_a * b_r
        b_dx = b_du * b_m * b_i
        b_dgate_x = b_dm * b_m * (1.0 - b_i)
        b_dgate_a = b_dlog_a * b_rate * b_r * (1.0 - b_r)
        tl.store(p_dx + at * width + o_d, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        tl.store(p_dgate_x + at * width + o_d, b_dgate_x.to(p_dgate_x.dtype.element_ty), mask=mask)
        tl.store(p_dgate_a + at * width + o_d, b_dgate_a.to(p_dgate_a.dtype.element_ty), mask=mask)
    out = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * width + o_d
    tl.store(p_drate + out, b_drate, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(p_dinitial + tl.program_id(2).to(tl.int64) * width + o_d, b_state, mask=mask)


def forward(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, initial: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    cut, rate = plan(*x.shape), _rate(a_param, torch.float32)
    x, gate_a, gate_x, initial, resets = packed(x, gate_a, gate_x, initial, resets)
    h, final = torch.empty_like(x), per_row(cut, x)
    with on(x):
        summaries = _summaries(cut, x, gate_a, gate_x, rate, resets)
        _walk_forward[cut.grid](
            x,
            gate_a,
            gate_x,
            rate,
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


def summarize(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    cut, rate = plan(*x.shape), _rate(a_param, torch.float32)
    x, gate_a, gate_x, resets = packed(x, gate_a, gate_x, resets)
    with on(x):
        return fold_pieces(cut, *_summaries(cut, x, gate_a, gate_x, rate, resets))


def backward(
    dh: Tensor | None,
    dfinal: Tensor,
    extra: Tensor | None,
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    a_param: Tensor,
    h: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_a, dgate_x, da_param, dinitial); arguments as in reference.py."""
    cut, rate = plan(*x.shape), _rate(a_param, torch.float32)
    dh, dfinal, extra, x, gate_a, gate_x, h, initial, resets = packed(
        dh, dfinal, extra, x, gate_a, gate_x, h, initial, resets
    )
    dx, dgate_a, dgate_x = (torch.empty_like(t) for t in (x, gate_a, gate_x))
    drate, dinitial = per_piece(cut, x), per_row(cut, x)
    state, transition = per_piece(cut, x), per_piece(cut, x)
    with on(x):
        shape = (cut.tokens, cut.width, cut.piece)
        _summary_reverse[cut.grid](dh, gate_a, rate, resets, state, transition, *shape, BLOCK_D=cut.block, num_warps=2)
        _walk_backward[cut.grid](
            dh,
            dfinal,
            extra,
            x,
            gate_a,
            gate_x,
            rate,
            resets,
            h,
            initial,
            state,
            transition,
            dx,
            dgate_a,
            dgate_x,
            drate,
            dinitial,
            *shape,
            BLOCK_D=cut.block,
            num_warps=2,
        )
    da_param = drate.sum((0, 1)) * (-DECAY_SCALE * torch.sigmoid(a_param.float()))
    return dx, dgate_a, dgate_x, da_param.to(a_param.dtype), dinitial


def _summaries(
    cut: Plan, x: Tensor, gate_a: Tensor, gate_x: Tensor, rate: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    state, transition = per_piece(cut, x), per_piece(cut, x)
    _summary[cut.grid](
        x,
        gate_a,
        gate_x,
        rate,
        resets,
        state,
        transition,
        cut.tokens,
        cut.width,
        cut.piece,
        BLOCK_D=cut.block,
        num_warps=2,
    )
    return state, transition

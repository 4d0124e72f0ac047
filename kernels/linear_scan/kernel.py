"""The diagonal linear scan in Triton: every input read once, every output written once, as chain.py walks tiles."""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import LOG2_E, Tile, fold, launch, packed, per_row, place, put, put_last, resets_of, steps_of, vector

# For few channels in all rows together, whose states arrive later than their tiles are done; and for many, smaller
# tiles of whole 128-byte lines (of 16 bits). The fastest of those that benchmarks.kernels_scans times on an H100.
FORWARD = Tile(rows=16, steps=16, block=32, warps=8, skip=2), Tile(rows=8, steps=16, block=64, warps=8)
BACKWARD = Tile(rows=16, steps=16, block=32, warps=8, skip=2), Tile(rows=8, steps=16, block=64, warps=8)
# Of the passes that walk once.
SUMMARY = FORWARD


@triton.jit
def _forward(
    p_x,
    p_log_a,
    p_resets,
    p_initial,
    p_h,
    p_final,
    p_transition,
    p_words,
    batch,
    tokens,
    tiles,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SKIP: tl.constexpr,
):
    i_tile, i_row, o_d, left = place(batch, tokens, WIDTH, BLOCK_D, ROWS * STEPS)
    at = i_row * tokens + i_tile * (ROWS * STEPS)
    xs = steps_of(p_x, at, o_d, left, 0.0, 1, WIDTH, ROWS, STEPS)
    logs = steps_of(p_log_a, at, o_d, left, 0.0, 1, WIDTH, ROWS, STEPS)
    resets = resets_of(p_resets, at, left, 1, ROWS, STEPS)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_h = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factors = ()
    for step in tl.static_range(STEPS):
        b_a = tl.exp2(logs[step].to(tl.float32) * LOG2_E)
        if p_resets is not None:
            b_a = tl.where(resets[step], 0.0, b_a)
        b_decay *= b_a
        b_h = b_a * b_h + xs[step].to(tl.float32)
        factors += (b_a,)
    b_h, b_decay, b_final = fold(p_words, p_initial, b_decay, b_h, i_tile, tiles, i_row, o_d, WIDTH, ROWS, SKIP)
    put_last(p_final, b_final, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
    put_last(p_transition, b_decay, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
    if p_h is not None:
        for step in tl.static_range(STEPS):
            b_h = factors[step] * b_h + xs[step].to(tl.float32)
            put(p_h, b_h, step, at, o_d, left, 1, WIDTH, ROWS, STEPS)


@triton.jit
def _backward(
    p_dh,
    p_dfinal,
    p_extra,
    p_log_a,
    p_resets,
    p_h,
    p_initial,
    p_dx,
    p_dlog_a,
    p_dinitial,
    p_words,
    batch,
    tokens,
    tiles,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SKIP: tl.constexpr,
):
    """From the last token to the first: dx_t = dh_t + g_{t+1}, g_t = a_t dx_t, the gradient that enters h_{t-1}."""
    o_t = tl.arange(0, ROWS) * STEPS
    i_tile, i_row, o_d, left = place(batch, tokens, WIDTH, BLOCK_D, ROWS * STEPS)
    at = i_row * tokens + left - 1
    dhs = steps_of(p_dh, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    logs = steps_of(p_log_a, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    befores = steps_of(p_h, at - 1, o_d, left - 1, 0.0, -1, WIDTH, ROWS, STEPS)
    resets = resets_of(p_resets, at, left, -1, ROWS, STEPS)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_g = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factors = ()
    for step in tl.static_range(STEPS):
        b_a = tl.exp2(logs[step].to(tl.float32) * LOG2_E)
        if p_resets is not None:
            b_a = tl.where(resets[step], 0.0, b_a)
        b_decay *= b_a
        if p_dh is not None:
            b_g += dhs[step].to(tl.float32)
        b_g *= b_a
        factors += (b_a,)
    b_g, _, b_dinitial = fold(p_words, p_dfinal, b_decay, b_g, i_tile, tiles, i_row, o_d, WIDTH, ROWS, SKIP)
    put_last(p_dinitial, b_dinitial, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
    b_initial = vector(p_initial, i_row, o_d, i_tile + 1 == tiles, WIDTH)
    b_extra = vector(p_extra, i_row, o_d, i_tile < tiles, WIDTH)
    for step in tl.static_range(STEPS):
        b_dx = b_g
        if p_dh is not None:
            b_dx += dhs[step].to(tl.float32)
        b_g = factors[step] * b_dx
        b_before = befores[step].to(tl.float32)
        if p_initial is not None:
            b_before = tl.where((o_t + step == left - 1)[:, None], b_initial, b_before)
        put(p_dx, b_dx, step, at, o_d, left, -1, WIDTH, ROWS, STEPS)
        put(p_dlog_a, b_g * b_before + b_extra, step, at, o_d, left, -1, WIDTH, ROWS, STEPS)


@triton.jit
def _adjoint(
    p_dh,
    p_log_a,
    p_resets,
    p_dinitial,
    p_words,
    batch,
    tokens,
    tiles,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SKIP: tl.constexpr,
):
    """What `_backward` leaves in p_dinitial for no p_dfinal, by its first walk alone."""
    i_tile, i_row, o_d, left = place(batch, tokens, WIDTH, BLOCK_D, ROWS * STEPS)
    at = i_row * tokens + left - 1
    dhs = steps_of(p_dh, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    logs = steps_of(p_log_a, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    resets = resets_of(p_resets, at, left, -1, ROWS, STEPS)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_g = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.static_range(STEPS):
        b_a = tl.exp2(logs[step].to(tl.float32) * LOG2_E)
        if p_resets is not None:
            b_a = tl.where(resets[step], 0.0, b_a)
        b_decay *= b_a
        b_g = b_a * (b_g + dhs[step].to(tl.float32))
    _, _, b_dinitial = fold(p_words, None, b_decay, b_g, i_tile, tiles, i_row, o_d, WIDTH, ROWS, SKIP)
    put_last(p_dinitial, b_dinitial, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)


def forward(x: Tensor, log_a: Tensor, initial: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    x, log_a, initial, resets = packed(x, log_a, initial, resets)
    h, final = torch.empty_like(x), per_row(x)
    launch(_forward, FORWARD, x, x, log_a, resets, initial, h, final, None)
    return h, final


def backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    extra: Tensor | None,
    log_a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dlog_a, dinitial); arguments as in reference.py."""
    dh, dfinal, extra, log_a, h, initial, resets = packed(dh, dfinal, extra, log_a, h, initial, resets)
    dx, dlog_a, dinitial = torch.empty_like(h), torch.empty_like(log_a), per_row(h)
    launch(_backward, BACKWARD, h, dh, dfinal, extra, log_a, resets, h, initial, dx, dlog_a, dinitial)
    return dx, dlog_a, dinitial


def summarize(x: Tensor, log_a: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    x, log_a, resets = packed(x, log_a, resets)
    state, transition = per_row(x), per_row(x)
    launch(_forward, SUMMARY, x, x, log_a, resets, None, None, state, transition)
    return state, transition


def adjoint(dh: Tensor, log_a: Tensor, resets: Tensor | None) -> Tensor:
    """dinitial; see reference.py."""
    dh, log_a, resets = packed(dh, log_a, resets)
    dinitial = per_row(dh)
    launch(_adjoint, SUMMARY, dh, dh, log_a, resets, dinitial)
    return dinitial

"""The RG-LRU in Triton: gates, normaliser and scan in one launch a pass; h, and nothing between, goes to memory.

Cut, walked and folded as linear_scan/chain.py describes. The backward pass recomputes the gates; the gradient of
a_param is summed tile by tile and then over tiles by a second small launch in a fixed order, without atomics, so bits
repeat. Beyond the end the recurrence gate is closed: factor 1, input 0.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on
from ..linear_scan.chain import (
    LOG2_E,
    Tile,
    choose,
    fold,
    launch,
    packed,
    per_row,
    place,
    put,
    put_last,
    resets_of,
    steps_of,
    vector,
)
from ..partials import SUM_TILE, column_sums
from ..sizes import cdiv
from .reference import DECAY_SCALE, SQRT_GUARD

GUARD = tl.constexpr(SQRT_GUARD)
SCALE = tl.constexpr(DECAY_SCALE)
# Beyond it a sigmoid is below 1e-21; squares of the denominators stay finite.
LIMIT = tl.constexpr(48.0)
# A recurrence gate so far closed that the factor is 1.
CLOSED = tl.constexpr(-48.0)

# For few channels and for many, as linear_scan's.
FORWARD = Tile(rows=16, steps=8, block=32, warps=8, registers=64, skip=2), Tile(16, 8, 32, 8, registers=64)
BACKWARD = Tile(rows=16, steps=8, block=32, warps=8, registers=128, skip=2), Tile(16, 8, 32, 8, registers=128)
# Of the passes that walk once: keeping nothing for a second walk they hold longer tiles, so that the chain is shorter.
SUMMARY = (Tile(rows=16, steps=16, block=32, warps=8, registers=128),) * 2


@triton.jit
def _sigmoids(one, two):
    """(sigmoid(one), sigmoid(two)) with one reciprocal: what limits a pass is exponentials, roots and reciprocals."""
    above_one = 1.0 + tl.exp2(tl.minimum(one * -LOG2_E, LIMIT))
    above_two = 1.0 + tl.exp2(tl.minimum(two * -LOG2_E, LIMIT))
    root = tl.rsqrt(above_one * above_two)
    inverse = root * root
    return inverse * above_two, inverse * above_one


@triton.jit
def _factor(log2_a, WIDE: tl.constexpr):
    """(a, 1 - a^2) of a = 2^log2_a <= 1, the second to 5e-7 of itself where WIDE, else to 4e-5.

    Where the difference would cancel it is the Taylor polynomial of 1 - e^z, z = 2 ln(2) log2_a, whose powers of
    2 ln(2) are in the coefficients.
    """
    a = tl.exp2(log2_a)
    if WIDE:
        near = -0.153890066 + log2_a * -0.0426673861
        near = -0.444032869 + log2_a * near
        near = -0.960906028 + log2_a * near
        near = (-1.38629436 + log2_a * near) * log2_a
        return a, tl.where(log2_a > -0.09, near, 1.0 - a * a)
    near = (-1.38629436 + log2_a * -0.960906028) * log2_a
    return a, tl.where(log2_a > -0.01, near, 1.0 - a * a)


@triton.jit
def _rate(p_a_param, o_d, WIDTH: tl.constexpr):
    """[1, D]: log_a at an open recurrence gate, -8 softplus(a_param); log(1 + z) = 2 atanh(z / (2 + z)), z <= 1."""
    b = tl.load(p_a_param + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
    z = tl.exp(-tl.abs(b))
    s = z / (2.0 + z)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15)
    series = 1.0 / 11 + q * series
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    return ((tl.maximum(b, 0.0) + 2.0 * s * (1.0 + q * series)) * -SCALE)[None, :]


@triton.jit
def _forward(
    p_x,
    p_gate_a,
    p_gate_x,
    p_a_param,
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
    WIDE: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 32
    i_tile, i_row, o_d, left = place(batch, tokens, WIDTH, BLOCK_D, ROWS * STEPS)
    at = i_row * tokens + i_tile * (ROWS * STEPS)
    gates_a = steps_of(p_gate_a, at, o_d, left, CLOSED, 1, WIDTH, ROWS, STEPS)
    gates_x = steps_of(p_gate_x, at, o_d, left, 0.0, 1, WIDTH, ROWS, STEPS)
    xs = steps_of(p_x, at, o_d, left, 0.0, 1, WIDTH, ROWS, STEPS)
    resets = resets_of(p_resets, at, left, 1, ROWS, STEPS)
    b_log2_rate = _rate(p_a_param, o_d, WIDTH) * LOG2_E
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_h = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factors, inputs = (), ()
    for step in tl.static_range(STEPS):
        b_r, b_i = _sigmoids(gates_a[step].to(tl.float32), gates_x[step].to(tl.float32))
        b_a, b_square = _factor(b_log2_rate * b_r, WIDE)
        if p_resets is not None:
            b_a = tl.where(resets[step], 0.0, b_a)
            b_square = tl.where(resets[step], 1.0, b_square)
        b_u = tl.sqrt(b_square) * b_i * xs[step].to(tl.float32)
        b_decay *= b_a
        b_h = b_a * b_h + b_u
        factors += (b_a,)
        inputs += (b_u,)
    b_h, b_decay, b_final = fold(p_words, p_initial, b_decay, b_h, i_tile, tiles, i_row, o_d, WIDTH, ROWS, SKIP)
    put_last(p_final, b_final, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
    put_last(p_transition, b_decay, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
    if p_h is not None:
        for step in tl.static_range(STEPS):
            b_h = factors[step] * b_h + inputs[step]
            put(p_h, b_h, step, at, o_d, left, 1, WIDTH, ROWS, STEPS)


@triton.jit
def _backward(
    p_dh,
    p_dfinal,
    p_extra,
    p_x,
    p_gate_a,
    p_gate_x,
    p_a_param,
    p_resets,
    p_h,
    p_initial,
    p_dx,
    p_dgate_a,
    p_dgate_x,
    p_drate,
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
    """The gradients of reference.py's `backward`, from the last token to the first.

    The state walked is the gradient that token t + 1 hands to h_t. `p_drate` is [B, tiles, D].
    """
    o_t = tl.arange(0, ROWS) * STEPS
    WIDE: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 32
    i_tile, i_row, o_d, left = place(batch, tokens, WIDTH, BLOCK_D, ROWS * STEPS)
    at = i_row * tokens + left - 1
    gates_a = steps_of(p_gate_a, at, o_d, left, CLOSED, -1, WIDTH, ROWS, STEPS)
    dhs = steps_of(p_dh, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    gates_x = steps_of(p_gate_x, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    xs = steps_of(p_x, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    befores = steps_of(p_h, at - 1, o_d, left - 1, 0.0, -1, WIDTH, ROWS, STEPS)
    resets = resets_of(p_resets, at, left, -1, ROWS, STEPS)
    b_rate = _rate(p_a_param, o_d, WIDTH)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_g = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factors, squares, opens, inlets = (), (), (), ()
    for step in tl.static_range(STEPS):
        b_r, b_i = _sigmoids(gates_a[step].to(tl.float32), gates_x[step].to(tl.float32))
        b_a, b_square = _factor(b_rate * LOG2_E * b_r, WIDE)
        if p_resets is not None:
            b_a = tl.where(resets[step], 0.0, b_a)
            b_square = tl.where(resets[step], 1.0, b_square)
        b_decay *= b_a
        if p_dh is not None:
            b_g += dhs[step].to(tl.float32)
        b_g *= b_a
        factors += (b_a,)
        squares += (b_square,)
        opens += (b_r,)
        inlets += (b_i,)
    b_g, _, b_dinitial = fold(p_words, p_dfinal, b_decay, b_g, i_tile, tiles, i_row, o_d, WIDTH, ROWS, SKIP)
    put_last(p_dinitial, b_dinitial, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
    b_initial = vector(p_initial, i_row, o_d, i_tile + 1 == tiles, WIDTH)
    b_extra = vector(p_extra, i_row, o_d, i_tile < tiles, WIDTH)
    b_drate = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.static_range(STEPS):
        b_du = b_g
        if p_dh is not None:
            b_du += dhs[step].to(tl.float32)
        b_a, b_square, b_r, b_i = factors[step], squares[step], opens[step], inlets[step]
        b_g = b_a * b_du
        b_before = befores[step].to(tl.float32)
        if p_initial is not None:
            b_before = tl.where((o_t + step == left - 1)[:, None], b_initial, b_before)
        b_into_x = b_du * b_i
        b_dm = b_into_x * xs[step].to(tl.float32)
        b_m = tl.sqrt(b_square)
        b_slope = tl.rsqrt(tl.maximum(4.0 * b_square, GUARD))
        b_dlog_a = b_g * b_before - 2.0 * b_a * b_a * b_slope * b_dm + b_extra
        b_dr = b_dlog_a * b_r
        b_drate += b_dr
        put(p_dx, b_into_x * b_m, step, at, o_d, left, -1, WIDTH, ROWS, STEPS)
        put(p_dgate_x, b_dm * b_m * (1.0 - b_i), step, at, o_d, left, -1, WIDTH, ROWS, STEPS)
        put(p_dgate_a, b_dr * b_rate * (1.0 - b_r), step, at, o_d, left, -1, WIDTH, ROWS, STEPS)
    p_sum = p_drate + (i_row * tiles + i_tile) * WIDTH + o_d
    tl.store(p_sum, tl.sum(b_drate, 0), mask=o_d < WIDTH)


@triton.jit
def _adjoint(
    p_dh,
    p_gate_a,
    p_a_param,
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
    """What `_backward` leaves in p_dinitial for no p_dfinal, by its first walk alone, which needs two inputs."""
    i_tile, i_row, o_d, left = place(batch, tokens, WIDTH, BLOCK_D, ROWS * STEPS)
    at = i_row * tokens + left - 1
    gates_a = steps_of(p_gate_a, at, o_d, left, CLOSED, -1, WIDTH, ROWS, STEPS)
    dhs = steps_of(p_dh, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    resets = resets_of(p_resets, at, left, -1, ROWS, STEPS)
    b_log2_rate = _rate(p_a_param, o_d, WIDTH) * LOG2_E
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_g = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.static_range(STEPS):
        b_a = tl.exp2(b_log2_rate * tl.sigmoid(gates_a[step].to(tl.float32)))
        if p_resets is not None:
            b_a = tl.where(resets[step], 0.0, b_a)
        b_decay *= b_a
        b_g = b_a * (b_g + dhs[step].to(tl.float32))
    _, _, b_dinitial = fold(p_words, None, b_decay, b_g, i_tile, tiles, i_row, o_d, WIDTH, ROWS, SKIP)
    put_last(p_dinitial, b_dinitial, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)


@triton.jit
def _sum_rates(p_drate, p_a_param, p_da_param, parts, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of a_param [D] from those of the rate [parts, D], of which PARTS are loaded at a time."""
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < WIDTH
    b_slope = tl.exp2(tl.load(p_a_param + o_d, mask=mask, other=0.0).to(tl.float32) * -LOG2_E) + 1.0
    b_da_param = column_sums(p_drate, parts, WIDTH, o_d, mask, PARTS) * (-SCALE / b_slope)
    tl.store(p_da_param + o_d, b_da_param.to(p_da_param.dtype.element_ty), mask=mask)


def forward(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, initial: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    x, gate_a, gate_x, a_param, initial, resets = packed(x, gate_a, gate_x, a_param, initial, resets)
    h, final = torch.empty_like(x), per_row(x)
    launch(_forward, FORWARD, x, x, gate_a, gate_x, a_param, resets, initial, h, final, None)
    return h, final


def summarize(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    x, gate_a, gate_x, a_param, resets = packed(x, gate_a, gate_x, a_param, resets)
    state, transition = per_row(x), per_row(x)
    launch(_forward, SUMMARY, x, x, gate_a, gate_x, a_param, resets, None, None, state, transition)
    return state, transition


def adjoint(dh: Tensor, gate_a: Tensor, a_param: Tensor, resets: Tensor | None) -> Tensor:
    """dinitial; see reference.py."""
    dh, gate_a, a_param, resets = packed(dh, gate_a, a_param, resets)
    dinitial = per_row(dh)
    launch(_adjoint, SUMMARY, dh, dh, gate_a, a_param, resets, dinitial)
    return dinitial


def backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
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
    dh, dfinal, extra, x, gate_a, gate_x, a_param, h, initial, resets = packed(
        dh, dfinal, extra, x, gate_a, gate_x, a_param, h, initial, resets
    )
    dx, dgate_a, dgate_x, da_param = (torch.empty_like(t) for t in (x, gate_a, gate_x, a_param))
    tiles = choose(BACKWARD, x).count(x.shape[1])
    drate = torch.empty(x.shape[0] * tiles, x.shape[2], dtype=torch.float32, device=x.device)
    dinitial = per_row(x)
    inputs = (dh, dfinal, extra, x, gate_a, gate_x, a_param, resets, h, initial)
    launch(_backward, BACKWARD, x, *inputs, dx, dgate_a, dgate_x, drate, dinitial)
    with on(x):
        _sum_rates[(cdiv(x.shape[2], SUM_TILE["BLOCK_D"]),)](
            drate, a_param, da_param, drate.shape[0], WIDTH=x.shape[2], **SUM_TILE
        )
    return dx, dgate_a, dgate_x, da_param, dinitial

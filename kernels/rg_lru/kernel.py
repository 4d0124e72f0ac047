"""The RG-LRU in Triton: gates, normaliser and scan in one launch a pass; h, and nothing between, goes to memory.

Cut, walked and folded as linear_scan/kernel.py describes, whose helpers it shares. The backward pass recomputes the
gates; the gradient of a_param is summed chunk by chunk and then over chunks by a second small launch in a fixed order,
without atomics, so bits repeat. Padding has a closed recurrence gate: factor 1, input 0.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear_scan.kernel import Cut, Tile, entering, on, packed, place, vector
from .reference import DECAY_SCALE, SQRT_GUARD

GUARD = tl.constexpr(SQRT_GUARD)
SCALE = tl.constexpr(DECAY_SCALE)
CLOSED = tl.constexpr(float("-inf"))

FORWARD = Tile(rows=8, steps=4, block=64, group=16, warps=8)
BACKWARD = Tile(rows=4, steps=8, block=64, group=16, warps=4)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, to 5e-7 of itself: a Taylor polynomial above -1/8, where the difference would cancel."""
    near = 1.0 / 24 + x * (1.0 / 120)
    near = 1.0 / 6 + x * near
    near = 0.5 + x * near
    near = x + x * x * near
    return tl.where(x > -0.125, near, tl.exp(x) - 1.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _rate(p_a_param, o_d, mask):
    """[1, D]: log_a at an open recurrence gate, -8 softplus(a_param); log(1 + z) = 2 atanh(z / (2 + z)), z <= 1."""
    b = tl.load(p_a_param + o_d, mask=mask, other=0.0).to(tl.float32)
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
    p_words,
    p_h,
    p_final,
    p_transition,
    batch,
    tokens,
    width,
    groups,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_chunk, i_row, o_d = place(p_words, batch, width, groups, GROUP, BLOCK_D)
    mask = o_d < width
    o_row = tl.arange(0, ROWS)
    first = i_chunk * (ROWS * STEPS)
    at = i_row * tokens + first
    p_x += at * width
    p_gate_a += at * width
    p_gate_x += at * width
    o = (o_row * STEPS * width)[:, None] + o_d[None, :]
    xs, gates_a, gates_x = (), (), ()
    for step in tl.static_range(STEPS):
        kept = (o_row * STEPS + step < tokens - first)[:, None] & mask[None, :]
        gates_a += (tl.load(p_gate_a + step * width + o, mask=kept, other=CLOSED),)
        gates_x += (tl.load(p_gate_x + step * width + o, mask=kept, other=0.0),)
        xs += (tl.load(p_x + step * width + o, mask=kept, other=0.0),)
    b_rate = _rate(p_a_param, o_d, mask)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_state = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factors, inputs = (), ()
    for step in tl.static_range(STEPS):
        b_e = _expm1(b_rate * _sigmoid(gates_a[step].to(tl.float32)))
        if p_resets is not None:
            o_t = o_row * STEPS + step
            b_reset = tl.load(p_resets + at + o_t, mask=o_t < tokens - first, other=0)
            b_e = tl.where(b_reset[:, None] != 0, -1.0, b_e)
        b_u = tl.sqrt(-b_e * (2.0 + b_e)) * _sigmoid(gates_x[step].to(tl.float32)) * xs[step].to(tl.float32)
        b_a = 1.0 + b_e
        b_decay *= b_a
        b_state = b_a * b_state + b_u
        factors += (b_a,)
        inputs += (b_u,)
    b_h, b_all_decay, b_all_state = entering(
        p_words, p_initial, i_chunk, i_row, b_decay, b_state, o_d, mask, width, groups, ROWS, GROUP
    )
    ends = (o_row == ROWS - 1) & (first + ROWS * STEPS >= tokens)
    o_end = i_row * width + o_d[None, :] + o_row[:, None] * 0
    if p_h is not None:
        p_h += at * width
        for step in tl.static_range(STEPS):
            b_h = factors[step] * b_h + inputs[step]
            kept = (o_row * STEPS + step < tokens - first)[:, None] & mask[None, :]
            tl.store(p_h + step * width + o, b_h.to(p_h.dtype.element_ty), mask=kept)
        tl.store(p_final + o_end, b_h, mask=ends[:, None] & mask[None, :])
    else:
        tl.store(p_final + o_end, b_all_state, mask=ends[:, None] & mask[None, :])
        tl.store(p_transition + o_end, b_all_decay, mask=ends[:, None] & mask[None, :])


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
    p_words,
    p_dx,
    p_dgate_a,
    p_dgate_x,
    p_drate,
    p_dinitial,
    batch,
    tokens,
    width,
    groups,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradients of reference.py's `backward`, from the last token to the first.

    The state walked is the gradient that token t + 1 hands to h_t. `p_drate` is [B, chunks, D].
    """
    i_chunk, i_row, o_d = place(p_words, batch, width, groups, GROUP, BLOCK_D)
    mask = o_d < width
    o_row = tl.arange(0, ROWS)
    first = tokens - 1 - i_chunk * (ROWS * STEPS)
    at = i_row * tokens + first
    p_x += at * width
    p_gate_a += at * width
    p_gate_x += at * width
    p_h += at * width
    if p_dh is not None:
        p_dh += at * width
    o = o_d[None, :] - (o_row * STEPS * width)[:, None]
    dhs, xs, gates_a, gates_x, befores = (), (), (), (), ()
    for step in tl.static_range(STEPS):
        o_t = o_row * STEPS + step
        kept = (o_t <= first)[:, None] & mask[None, :]
        gates_a += (tl.load(p_gate_a - step * width + o, mask=kept, other=CLOSED),)
        if p_dh is not None:
            dhs += (tl.load(p_dh - step * width + o, mask=kept, other=0.0),)
    for step in tl.static_range(STEPS):
        o_t = o_row * STEPS + step
        kept = (o_t <= first)[:, None] & mask[None, :]
        inside = (o_t < first)[:, None] & mask[None, :]
        gates_x += (tl.load(p_gate_x - step * width + o, mask=kept, other=0.0),)
        xs += (tl.load(p_x - step * width + o, mask=kept, other=0.0),)
        befores += (tl.load(p_h - (step + 1) * width + o, mask=inside, other=0.0),)
    b_rate = _rate(p_a_param, o_d, mask)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_state = tl.zeros([ROWS, BLOCK_D], tl.float32)
    walked = ()
    for step in tl.static_range(STEPS):
        b_e = _expm1(b_rate * _sigmoid(gates_a[step].to(tl.float32)))
        if p_resets is not None:
            o_t = o_row * STEPS + step
            b_reset = tl.load(p_resets + at - o_t, mask=o_t <= first, other=0)
            b_e = tl.where(b_reset[:, None] != 0, -1.0, b_e)
        b_decay *= 1.0 + b_e
        if p_dh is not None:
            b_state += dhs[step].to(tl.float32)
        b_state *= 1.0 + b_e
        walked += (b_e,)
    b_state, _, _ = entering(p_words, p_dfinal, i_chunk, i_row, b_decay, b_state, o_d, mask, width, groups, ROWS, GROUP)
    b_initial = vector(p_initial, i_row, o_d, mask, width)
    b_extra = vector(p_extra, i_row, o_d, mask, width)
    b_drate = tl.zeros([ROWS, BLOCK_D], tl.float32)
    p_dx += at * width
    p_dgate_a += at * width
    p_dgate_x += at * width
    for step in tl.static_range(STEPS):
        o_t = o_row * STEPS + step
        kept = (o_t <= first)[:, None] & mask[None, :]
        b_du = b_state
        if p_dh is not None:
            b_du += dhs[step].to(tl.float32)
        b_e = walked[step]
        b_a = 1.0 + b_e
        b_state = b_a * b_du
        b_before = befores[step].to(tl.float32)
        if p_initial is not None:
            b_before = tl.where((o_t == first)[:, None], b_initial, b_before)
        b_i = _sigmoid(gates_x[step].to(tl.float32))
        b_square = -b_e * (2.0 + b_e)
        b_m = tl.sqrt(b_square)
        b_into_x = b_du * b_i
        b_dm = b_into_x * xs[step].to(tl.float32)
        b_slope = tl.rsqrt(tl.maximum(4.0 * b_square, GUARD))
        b_dlog_a = b_state * b_before - 2.0 * b_a * b_a * b_slope * b_dm + b_extra
        b_r = _sigmoid(gates_a[step].to(tl.float32))
        b_dr = b_dlog_a * b_r
        b_drate += b_dr
        b_dgate_a = b_dr * b_rate * (1.0 - b_r)
        b_dgate_x = b_dm * b_m * (1.0 - b_i)
        tl.store(p_dx - step * width + o, (b_into_x * b_m).to(p_dx.dtype.element_ty), mask=kept)
        tl.store(p_dgate_x - step * width + o, b_dgate_x.to(p_dgate_x.dtype.element_ty), mask=kept)
        tl.store(p_dgate_a - step * width + o, b_dgate_a.to(p_dgate_a.dtype.element_ty), mask=kept)
    chunks = tl.cdiv(tokens, ROWS * STEPS)
    tl.store(p_drate + (i_row * chunks + i_chunk) * width + o_d, tl.sum(b_drate, 0), mask=mask)
    ends = (o_row == ROWS - 1) & (first < ROWS * STEPS)
    o_end = i_row * width + o_d[None, :] + o_row[:, None] * 0
    tl.store(p_dinitial + o_end, b_state, mask=ends[:, None] & mask[None, :])


@triton.jit
def _sum_rates(p_drate, p_a_param, p_da_param, parts, width, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of a_param [D] from those of the rate [parts, D], of which PARTS are loaded at a time."""
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    o_part = tl.arange(0, PARTS)[:, None]
    o = o_part.to(tl.int64) * width + o_d[None, :]
    b_sum = tl.zeros([PARTS, BLOCK_D], tl.float32)
    for begin in tl.range(0, parts, PARTS):
        b_sum += tl.load(p_drate + o, mask=(o_part < parts - begin) & mask[None, :], other=0.0)
        p_drate += PARTS * width
    b_slope = _sigmoid(tl.load(p_a_param + o_d, mask=mask, other=0.0).to(tl.float32)) * -SCALE
    tl.store(p_da_param + o_d, (tl.sum(b_sum, 0) * b_slope).to(p_da_param.dtype.element_ty), mask=mask)


def forward(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, initial: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    cut = Cut(FORWARD, *x.shape)
    x, gate_a, gate_x, a_param, initial, resets = packed(x, gate_a, gate_x, a_param, initial, resets)
    h, final = torch.empty_like(x), cut.per_row(x)
    inputs = (x, gate_a, gate_x, a_param, resets, initial, cut.words(x))
    with on(x):
        _forward[cut.grid](*inputs, h, final, None, *cut.sizes, **cut.constants)
    return h, final


def summarize(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    cut = Cut(FORWARD, *x.shape)
    x, gate_a, gate_x, a_param, resets = packed(x, gate_a, gate_x, a_param, resets)
    state, transition = cut.per_row(x), cut.per_row(x)
    inputs = (x, gate_a, gate_x, a_param, resets, None, cut.words(x))
    with on(x):
        _forward[cut.grid](*inputs, None, state, transition, *cut.sizes, **cut.constants)
    return state, transition


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
    cut = Cut(BACKWARD, *x.shape)
    dh, dfinal, extra, x, gate_a, gate_x, a_param, h, initial, resets = packed(
        dh, dfinal, extra, x, gate_a, gate_x, a_param, h, initial, resets
    )
    dx, dgate_a, dgate_x, da_param = (torch.empty_like(t) for t in (x, gate_a, gate_x, a_param))
    drate = torch.empty(cut.batch * cut.chunks, cut.width, dtype=torch.float32, device=x.device)
    dinitial = cut.per_row(x)
    inputs = (dh, dfinal, extra, x, gate_a, gate_x, a_param, resets, h, initial, cut.words(x))
    with on(x):
        _backward[cut.grid](*inputs, dx, dgate_a, dgate_x, drate, dinitial, *cut.sizes, **cut.constants)
        _sum_rates[(triton.cdiv(cut.width, 16),)](
            drate, a_param, da_param, drate.shape[0], cut.width, PARTS=128, BLOCK_D=16, num_warps=4
        )
    return dx, dgate_a, dgate_x, da_param, dinitial

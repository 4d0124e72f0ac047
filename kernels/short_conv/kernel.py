"""The short causal convolution in Triton: one pass over memory forward, one backward.

A program owns one row, BLOCK_D channels and ROWS stretches of STEPS tokens. A thread owns a few channels of a stretch
and walks its tokens in registers: each input is loaded once, for all the taps it serves, and the entries that a
stretch needs from its neighbours come from L1. Taps go UNROLL at a time, so that wide filters need no more registers
than narrow ones: a group of N taps loads N - 1 entries more than there are tokens. The FIRST taps stand before the
loop: all of a narrow filter's, those beyond whole groups of a wide one's, often none.

Backward, dz = dy * activation'(z). With at most UNROLL taps z is made again where it is needed, the entries right of a
stretch included; wider filters, which arithmetic bounds, get dz from a pass of its own. From dz at t + s follow both
dx_t and x_t's part in the gradient of tap s, and a tail is no more than the tokens before 0. Each program leaves one
sum a tap and channel, and those are summed in a fixed order: no atomics, so bits repeat.

Offsets are o_, loaded blocks b_, pointers p_, indices of the walk i_. Sums are fp32; every load is cast to it before
any arithmetic.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on
from ..partials import SUM_TILE, column_sums
from ..sizes import cdiv, next_power_of_2

# Taps taken at a time: with as many the backward pass makes z again, and a loop runs over those beyond.
UNROLL = 8


@dataclass(frozen=True)
class Tile:
    """What a program owns: `rows` stretches of `steps` tokens by `block` channels."""

    rows: int
    steps: int
    block: int
    warps: int

    def columns(self, width: int) -> int:
        """Channels of a program."""
        return min(self.block, max(16, next_power_of_2(width)))

    def chunks(self, tokens: int) -> int:
        """Programs that share the tokens of a row."""
        return -(-tokens // (self.rows * self.steps))

    def constants(self, width: int, taps: int) -> dict[str, int]:
        """The compile-time sizes every kernel takes."""
        cut = {"ROWS": self.rows, "STEPS": self.steps, "BLOCK_D": self.columns(width), "num_warps": self.warps}
        # The same taps before the loop and in it took 32 s of CPU to compile, with 32 taps; the loop alone takes 2.5.
        first = taps % UNROLL if taps > UNROLL else taps
        return cut | {"TAPS": taps, "FIRST": first, "UNROLL": UNROLL}


# With up to UNROLL taps, and with more.
FORWARD = Tile(rows=8, steps=16, block=64, warps=4), Tile(rows=8, steps=16, block=64, warps=4)
BACKWARD = Tile(rows=8, steps=16, block=64, warps=4), Tile(rows=16, steps=8, block=64, warps=8)


@triton.jit
def _place(chunks, width, BLOCK_D: tl.constexpr):
    """(chunk, row, o_d) of this program; neighbours share tokens, so that entries left of a chunk are in L2."""
    columns = tl.cdiv(width, BLOCK_D)
    i_program = tl.program_id(0)
    i_chunk = i_program // columns % chunks
    i_row = (i_program // columns // chunks).to(tl.int64)
    return i_chunk, i_row, i_program % columns * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def _load(pointer, step, begin, end, o_d, width, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Token `step` of every stretch, [ROWS, D], zeros outside [begin, end); all count from the chunk's first token."""
    o_t = tl.arange(0, ROWS) * STEPS + step
    kept = ((o_t >= begin) & (o_t < end))[:, None] & (o_d < width)[None, :]
    o = (tl.arange(0, ROWS) * STEPS * width)[:, None] + o_d[None, :]
    return tl.load(pointer + step * width + o, mask=kept, other=0.0)


@triton.jit
def _entries(
    p_x,
    p_tail,
    step,
    first,
    tokens,
    o_d,
    width,
    COUNT: tl.constexpr,
    LEFT: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """COUNT inputs of every stretch from `step` on, of which the first LEFT can lie left of the piece."""
    found = ()
    for i in tl.static_range(COUNT):
        b_x = _load(p_x, step + i, -first, tokens - first, o_d, width, ROWS, STEPS)
        if p_tail is not None and i < LEFT:
            b_tail = _load(p_tail, step + i, 1 - TAPS - first, -first, o_d, width, ROWS, STEPS)
            before = tl.arange(0, ROWS) * STEPS + step + i < -first
            b_x = tl.where(before[:, None], b_tail, b_x)
        found += (b_x,)
    return found


@triton.jit
def _positions(p_positions, step, first, tokens, COUNT: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Positions [ROWS, 1] in their documents of COUNT tokens of every stretch from `step` on; none without any."""
    found = ()
    if p_positions is not None:
        for i in tl.static_range(COUNT):
            o_t = tl.arange(0, ROWS) * STEPS + step + i
            inside = (o_t >= -first) & (o_t < tokens - first)
            b = tl.load(p_positions + o_t, mask=inside, other=0)
            found += (tl.minimum(b, 2**31 - 1).to(tl.int32)[:, None],)
    return found


@triton.jit
def _filter(p_weight, i_tap, o_d, width, stride_s, N: tl.constexpr, TAPS: tl.constexpr):
    """The N taps from `i_tap` on, [1, D]; tap s multiplies the entry s tokens back."""
    found = ()
    for i in tl.static_range(N):
        b = tl.load(p_weight + (TAPS - 1 - i_tap - i) * stride_s, mask=o_d < width, other=0.0)
        found += (b.to(tl.float32)[None, :],)
    return found


@triton.jit
def _add_taps(
    sums,
    p_x,
    p_tail,
    p_weight,
    positions,
    i_tap,
    first,
    tokens,
    o_d,
    width,
    stride_s,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The sums z of COUNT tokens with N taps from `i_tap` on added."""
    entries = _entries(p_x, p_tail, 1 - N - i_tap, first, tokens, o_d, width, COUNT + N - 1, LEFT, TAPS, ROWS, STEPS)
    taps = _filter(p_weight, i_tap, o_d, width, stride_s, N, TAPS)
    found = ()
    # A mask that chooses between sums is a predicate of the addition; between addends it is one instruction more.
    for step in tl.static_range(COUNT):
        b_sum = sums[step]
        for i in tl.static_range(N):
            b_next = b_sum + taps[i] * entries[step + N - 1 - i].to(tl.float32)
            b_sum = b_next if len(positions) == 0 else tl.where(positions[step] >= i_tap + i, b_next, b_sum)
        found += (b_sum,)
    return found


@triton.jit
def _bias(p_bias, o_d, width, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """COUNT sums [ROWS, D] to begin with: the bias, or zeros."""
    b_sum = tl.zeros([ROWS, o_d.shape[0]], tl.float32)
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_d, mask=o_d < width, other=0.0).to(tl.float32)[None, :]
    found = ()
    for _ in tl.static_range(COUNT):
        found += (b_sum,)
    return found


@triton.jit
def _activated(b_z, ACTIVATION: tl.constexpr):
    """(activation(z), its slope there); both activations are z * sigmoid(something of z)."""
    b_inner, b_slope = b_z, 1.0
    if ACTIVATION == "gelu":
        b_inner = 1.5957691216057308 * b_z * (1.0 + 0.044715 * b_z * b_z)
        b_slope = 1.5957691216057308 * (1.0 + 0.134145 * b_z * b_z)
    # exp2 and the square of a reciprocal root take two and three instructions, exp and a division five and eight. What
    # a gate lacks to 1 is exact this way where it is small; the bound keeps that product finite.
    b_closing = tl.exp2(tl.minimum(b_inner * -1.4426950408889634, 100.0))
    b_root = tl.rsqrt(1.0 + b_closing)
    b_gate = b_root * b_root
    b_y = b_z * b_gate
    return b_y, b_gate + b_y * (b_closing * b_gate) * b_slope


@triton.jit
def _forward(
    p_x,
    p_weight,
    p_bias,
    p_tail,
    p_positions,
    p_dy,
    p_out,
    chunks,
    tokens,
    width,
    group,
    stride_d,
    stride_s,
    TAPS: tl.constexpr,
    FIRST: tl.constexpr,
    UNROLL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y; or, given dy, dz = dy * activation'(z)."""
    i_chunk, i_row, o_d = _place(chunks, width, BLOCK_D)
    first = i_chunk * (ROWS * STEPS)
    at = i_row * tokens + first
    p_x += at * width
    p_weight += o_d // group * stride_d
    if p_tail is not None:
        p_tail += ((i_row + 1) * (TAPS - 1) + first) * width
    if p_positions is not None:
        p_positions += at
    positions = _positions(p_positions, 0, first, tokens, STEPS, ROWS, STEPS)
    sums = _bias(p_bias, o_d, width, STEPS, ROWS)
    if FIRST > 0:
        sums = _add_taps(
            sums,
            p_x,
            p_tail,
            p_weight,
            positions,
            0,
            first,
            tokens,
            o_d,
            width,
            stride_s,
            STEPS,
            FIRST,
            FIRST - 1,
            TAPS,
            ROWS,
            STEPS,
        )
    for i_tap in tl.range(FIRST, TAPS, UNROLL):
        sums = _add_taps(
            sums,
            p_x,
            p_tail,
            p_weight,
            positions,
            i_tap,
            first,
            tokens,
            o_d,
            width,
            stride_s,
            STEPS,
            UNROLL,
            STEPS + UNROLL - 1,
            TAPS,
            ROWS,
            STEPS,
        )
    p_out += at * width
    o_row = tl.arange(0, ROWS)
    o = (o_row * STEPS * width)[:, None] + o_d[None, :]
    for step in tl.static_range(STEPS):
        b = sums[step]
        if ACTIVATION is not None:
            b, b_slope = _activated(b, ACTIVATION)
            if p_dy is not None:
                b_dy = _load(p_dy + at * width, step, 0, tokens - first, o_d, width, ROWS, STEPS)
                b = b_dy.to(tl.float32) * b_slope
        kept = (o_row * STEPS + step < tokens - first)[:, None] & (o_d < width)[None, :]
        tl.store(p_out + step * width + o, b.to(p_out.dtype.element_ty), mask=kept)


@triton.jit
def _spread(
    sums,
    xs,
    window,
    p_weight,
    p_positions,
    p_parts,
    i_tap,
    first,
    tokens,
    o_d,
    width,
    stride_s,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The sums dx with N taps from `i_tap` on added; stores those taps' gradients. `window` is dz from `i_tap` on."""
    taps = _filter(p_weight, i_tap, o_d, width, stride_s, N, TAPS)
    positions = _positions(p_positions, i_tap, first, tokens, STEPS + N - 1, ROWS, STEPS)
    gradients = ()
    for _ in tl.static_range(N):
        gradients += (tl.zeros([ROWS, o_d.shape[0]], tl.float32),)
    found = ()
    for step in tl.static_range(STEPS):
        b_dx = sums[step]
        b_x = xs[step].to(tl.float32)
        added = ()
        for i in tl.static_range(N):
            b_dz = window[step + i].to(tl.float32)
            b_next, b_gradient = b_dx + taps[i] * b_dz, gradients[i] + b_x * b_dz
            if len(positions) > 0:
                m_same = positions[step + i] >= i_tap + i
                b_next, b_gradient = tl.where(m_same, b_next, b_dx), tl.where(m_same, b_gradient, gradients[i])
            b_dx = b_next
            added += (b_gradient,)
        gradients = added
        found += (b_dx,)
    for i in tl.static_range(N):
        tl.store(p_parts + (TAPS - 1 - i_tap - i) * width + o_d, tl.sum(gradients[i], 0), mask=o_d < width)
    return found


@triton.jit
def _window(p_dy, i_tap, first, tokens, o_d, width, COUNT: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """COUNT of dy of every stretch from its token `i_tap` on."""
    found = ()
    for i in tl.static_range(COUNT):
        found += (_load(p_dy, i_tap + i, -first, tokens - first, o_d, width, ROWS, STEPS),)
    return found


@triton.jit
def _backward(
    p_dy,
    p_x,
    p_weight,
    p_bias,
    p_tail,
    p_positions,
    p_dx,
    p_dtail,
    p_parts,
    chunks,
    tokens,
    width,
    group,
    stride_d,
    stride_s,
    TAPS: tl.constexpr,
    FIRST: tl.constexpr,
    UNROLL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx, dtail and the program's part of dweight and dbias; without ACTIVATION `p_dy` is dz."""
    COUNT: tl.constexpr = STEPS + max(FIRST - 1, 0)
    i_chunk, i_row, o_d = _place(chunks, width, BLOCK_D)
    first = i_chunk * (ROWS * STEPS)
    if p_tail is not None:
        first -= TAPS - 1
        p_tail += ((i_row + 1) * (TAPS - 1) + first) * width
    at = i_row * tokens + first
    p_dy += at * width
    p_x += at * width
    p_weight += o_d // group * stride_d
    p_parts += (i_row * chunks + i_chunk) * (TAPS + 1) * width
    if p_positions is not None:
        p_positions += at
    window = _window(p_dy, 0, first, tokens, o_d, width, COUNT, ROWS, STEPS)
    if ACTIVATION is not None:
        positions = _positions(p_positions, 0, first, tokens, COUNT, ROWS, STEPS)
        zs = _add_taps(
            _bias(p_bias, o_d, width, COUNT, ROWS),
            p_x,
            p_tail,
            p_weight,
            positions,
            0,
            first,
            tokens,
            o_d,
            width,
            stride_s,
            COUNT,
            TAPS,
            2 * TAPS - 2,
            TAPS,
            ROWS,
            STEPS,
        )
        through = ()
        for step in tl.static_range(COUNT):
            _, b_slope = _activated(zs[step], ACTIVATION)
            through += (window[step].to(tl.float32) * b_slope,)
        window = through
    if p_bias is not None:
        b_dbias = window[0].to(tl.float32)
        for step in tl.static_range(1, STEPS):
            b_dbias += window[step].to(tl.float32)
        tl.store(p_parts + TAPS * width + o_d, tl.sum(b_dbias, 0), mask=o_d < width)
    xs = _entries(p_x, p_tail, 0, first, tokens, o_d, width, STEPS, TAPS - 1, TAPS, ROWS, STEPS)
    sums = _bias(None, o_d, width, STEPS, ROWS)
    if FIRST > 0:
        sums = _spread(
            sums,
            xs,
            window,
            p_weight,
            p_positions,
            p_parts,
            0,
            first,
            tokens,
            o_d,
            width,
            stride_s,
            FIRST,
            TAPS,
            ROWS,
            STEPS,
        )
    for i_tap in tl.range(FIRST, TAPS, UNROLL):
        sums = _spread(
            sums,
            xs,
            _window(p_dy, i_tap, first, tokens, o_d, width, STEPS + UNROLL - 1, ROWS, STEPS),
            p_weight,
            p_positions,
            p_parts,
            i_tap,
            first,
            tokens,
            o_d,
            width,
            stride_s,
            UNROLL,
            TAPS,
            ROWS,
            STEPS,
        )
    p_dx += at * width
    o_row = tl.arange(0, ROWS)
    o = (o_row * STEPS * width)[:, None] + o_d[None, :]
    for step in tl.static_range(STEPS):
        o_t = o_row * STEPS + step
        kept = ((o_t >= -first) & (o_t < tokens - first))[:, None] & (o_d < width)[None, :]
        tl.store(p_dx + step * width + o, sums[step].to(p_dx.dtype.element_ty), mask=kept)
        if p_tail is not None and step < TAPS - 1:
            kept = (o_t < -first)[:, None] & (o_d < width)[None, :]
            p_end = p_dtail + ((i_row + 1) * (TAPS - 1) + first + step) * width
            tl.store(p_end + o, sums[step].to(p_dtail.dtype.element_ty), mask=kept)


@triton.jit
def _sum_parts(
    p_parts, p_dweight, p_dbias, parts, width, TAPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dweight [D, TAPS] and dbias [D] from [parts, TAPS + 1, D], of which PARTS are loaded at a time."""
    i_tap = tl.program_id(1)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = o_d < width
    b = column_sums(p_parts + i_tap * width, parts, (TAPS + 1) * width, o_d, mask, PARTS)
    tl.store(p_dweight + o_d * TAPS + i_tap, b.to(p_dweight.dtype.element_ty), mask=mask & (i_tap < TAPS))
    if p_dbias is not None:
        tl.store(p_dbias + o_d, b.to(p_dbias.dtype.element_ty), mask=mask & (i_tap == TAPS))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    positions: Tensor | None,
    activation: str | None,
) -> Tensor:
    """y [B, T, D] in x's dtype; see op.py."""
    x, weight, bias, tail, positions = _packed(x, weight, bias, tail, positions)
    y = torch.empty_like(x)
    _launch_forward(x, weight, bias, tail, positions, None, y, activation)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    positions: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dtail); dbias and dtail hold nothing where there is no bias and no tail."""
    x, weight, bias, tail, positions, dy = _packed(x, weight, bias, tail, positions, dy)
    (batch, tokens, width), (filters, taps) = x.shape, weight.shape
    is_wide = taps > UNROLL
    if is_wide and activation is not None:
        dz = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _launch_forward(x, weight, bias, tail, positions, dy, dz, activation)
        dy, activation = dz, None
    dx = torch.empty_like(x)
    dtail = x.new_empty((batch, taps - 1, width), dtype=torch.float32 if tail is None else tail.dtype)
    dbias = x.new_empty(width, dtype=torch.float32 if bias is None else bias.dtype)
    dweight = x.new_empty((width, taps), dtype=weight.dtype if filters == width else torch.float32)
    tail = tail if taps > 1 else None
    tile = BACKWARD[is_wide]
    chunks = tile.chunks(tokens if tail is None else tokens + taps - 1)
    parts = torch.empty(batch * chunks, taps + 1, width, dtype=torch.float32, device=x.device)
    sizes = (chunks, tokens, width, width // filters, *weight.stride())
    outputs = (dx, None if tail is None else dtail, parts)
    with on(x):
        _backward[(batch * chunks * cdiv(width, tile.columns(width)),)](
            dy, x, weight, bias, tail, positions, *outputs, *sizes, ACTIVATION=activation, **tile.constants(width, taps)
        )
        _sum_parts[(cdiv(width, SUM_TILE["BLOCK_D"]), taps + (bias is not None))](
            parts, dweight, None if bias is None else dbias, batch * chunks, width, taps, **SUM_TILE
        )
    if filters < width:
        dweight = dweight.view(filters, -1, taps).sum(1).to(weight.dtype)
    return dx, dweight, dbias, dtail


def _launch_forward(x, weight, bias, tail, positions, dy, out, activation) -> None:
    (batch, tokens, width), (filters, taps) = x.shape, weight.shape
    tile = FORWARD[taps > UNROLL]
    chunks = tile.chunks(tokens)
    sizes = (chunks, tokens, width, width // filters, *weight.stride())
    with on(x):
        _forward[(batch * chunks * cdiv(width, tile.columns(width)),)](
            x,
            weight,
            bias,
            tail if taps > 1 else None,
            positions,
            dy,
            out,
            *sizes,
            ACTIVATION=activation,
            **tile.constants(width, taps),
        )


def _packed(x: Tensor, weight: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them; a wide filter with its channels side by side."""
    weight = weight.contiguous() if weight.shape[1] <= UNROLL else weight.t().contiguous().t()
    return [x.contiguous(), weight, *(None if t is None else t.contiguous() for t in others)]

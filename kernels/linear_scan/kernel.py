"""The diagonal linear scan in Triton: one launch a pass, every input read once, every output written once.

The tokens of a row are cut into tiles of ROWS x STEPS tokens by BLOCK_D channels: ROWS stretches of STEPS tokens, a
stretch's tokens one after another in the registers of the threads that own its channels. Two walks over those
registers are all the arithmetic there is:

    1. the stretch from a zero state, for its pair (product of factors, state it leaves);
    2. the stretch again from its true state, for the outputs.

Between them the pairs are folded over the stretches of the tile, and the tile waits for the pair of everything before
it, which the tile before publishes as soon as it has its own. So a state crosses T / (ROWS x STEPS) programs one after
the other, about a microsecond each, beside the loads and stores of all the others. Every fold has one fixed order, so
bits repeat.

Programs are persistent. They take tickets for tiles, the first tiles of all channels before the second ones, and load
the tile of the next ticket while they walk the present one. A tile that is waited for is always in work: of all the
tickets taken the lowest is some program's present one.

A pair is one 64-bit word a channel whose sign bit, spare since factors are >= 0, says that it is there: data and flag
arrive together and need no fence. 16 channels are one 32-byte sector of a token in bf16; the neighbours' sectors meet
in L2.

The adjoint is the same scan over mirrored tokens. Tokens beyond the end have factor 1 and input 0.

Offsets are o_, loaded blocks b_, pointers p_, indices of the walk i_. State is fp32; every load is cast to it before
any arithmetic.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


# The word of (1, 0), there.
IDENTITY = tl.constexpr((0x3F800000 << 32) - 2**63)
# Steps whose document starts are loaded together, at least a tile's.
SPAN = tl.constexpr(16)
HIGH_BIT = tl.constexpr(-(2**31))
LOW_BITS = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Tile:
    """`rows` stretches of `steps` tokens by `block` channels, walked by `warps`; `programs` of them to an SM."""

    rows: int
    steps: int
    block: int
    warps: int
    programs: int


FORWARD = Tile(rows=16, steps=16, block=16, warps=4, programs=3)
BACKWARD = Tile(rows=16, steps=16, block=16, warps=4, programs=2)


@triton.jit
def take(counter):
    """The next ticket."""
    return tl.atomic_add(counter, 1, sem="relaxed").to(tl.int32)


@triton.jit
def place(ticket, batch, tokens, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """(tile in the order walked, row, o_d, tokens of the row from the tile on) of a ticket."""
    columns: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i_tile = ticket // (columns * batch)
    rest = ticket % (columns * batch)
    o_d = rest % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    return i_tile, (rest // columns).to(tl.int64), o_d, tokens - i_tile * TILE


@triton.jit
def steps_of(
    pointer, at, o_d, left, other, SIGN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    """A tile's blocks [ROWS, D], one a step, `other` from the `left`-th token on; () for None.

    `at` is the token the tile begins with, SIGN the direction it is walked in.
    """
    blocks = ()
    if pointer is not None:
        o_t = tl.arange(0, ROWS) * STEPS
        o = (SIGN * WIDTH * o_t)[:, None] + o_d[None, :]
        pointer += at * WIDTH
        for step in tl.static_range(STEPS):
            kept = (o_t + step < left)[:, None] & (o_d < WIDTH)[None, :]
            blocks += (tl.load(pointer + SIGN * WIDTH * step + o, mask=kept, other=other),)
    return blocks


@triton.jit
def resets_of(pointer, at, left, SIGN: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Whether a tile's tokens [ROWS, SPAN] begin documents, as bytes; zeros for None."""
    b = tl.zeros([ROWS, SPAN], tl.uint8)
    if pointer is not None:
        o_step = tl.arange(0, SPAN)[None, :]
        o_t = (tl.arange(0, ROWS) * STEPS)[:, None] + o_step
        b = tl.load(pointer + at + SIGN * o_t, mask=(o_t < left) & (o_step < STEPS), other=0)
    return b


@triton.jit
def bits_of(b_resets):
    """[ROWS] of 32-bit words: bit s is set where step s begins a document."""
    return tl.sum((b_resets != 0).to(tl.int32) << tl.arange(0, SPAN)[None, :], 1)


@triton.jit
def begins(b_bits, step):
    """[ROWS, 1]: whether a step begins a document."""
    return ((b_bits >> step) & 1)[:, None] != 0


@triton.jit
def put(
    pointer, b, step, at, o_d, left, SIGN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    """Stores the block [ROWS, D] of one step of a tile."""
    o_t = tl.arange(0, ROWS) * STEPS
    kept = (o_t + step < left)[:, None] & (o_d < WIDTH)[None, :]
    o = (SIGN * WIDTH * o_t)[:, None] + o_d[None, :]
    tl.store(pointer + at * WIDTH + SIGN * WIDTH * step + o, b.to(pointer.dtype.element_ty), mask=kept)


@triton.jit
def put_last(pointer, b, i_row, o_d, holds, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Stores the last stretch's vector of [ROWS, D] where it `holds`; nothing for None."""
    if pointer is not None:
        last = (tl.arange(0, ROWS) == ROWS - 1)[:, None] & (o_d < WIDTH)[None, :] & holds
        tl.store(pointer + i_row * WIDTH + o_d[None, :] + tl.zeros([ROWS, 1], tl.int32), b, mask=last)


@triton.jit
def vector(pointer, i_row, o_d, holds, WIDTH: tl.constexpr):
    """A row's vector of [B, D] as [1, D] where it `holds`, else zeros; zeros for None."""
    b = tl.zeros(o_d.shape, tl.float32)
    if pointer is not None:
        b = tl.load(pointer + i_row * WIDTH + o_d, mask=(o_d < WIDTH) & holds, other=0.0).to(tl.float32)
    return b[None, :]


@triton.jit
def _compose_both(decay_one, state_one, before_one, enters_one, decay_two, state_two, before_two, enters_two):
    """Two pairs for a stretch `one` followed by a stretch `two`: of both, and of what lies before their last part."""
    return (
        decay_one * decay_two,
        decay_two * state_one + state_two,
        decay_one * before_two,
        before_two * state_one + enters_two,
    )


@triton.jit
def _word(b_decay, b_state):
    high = b_decay.to(tl.int32, bitcast=True) | HIGH_BIT
    low = b_state.to(tl.uint32, bitcast=True).to(tl.int64)
    return (high.to(tl.int64) << 32) | low


@triton.jit
def _before(p_words, i_word, i_tile, o_d, WIDTH: tl.constexpr):
    """The pair [1, D] of the row before the tile, once it is there."""
    wanted = (o_d < WIDTH) & (i_tile > 0)
    p_word = p_words + (i_word - 1) * WIDTH + o_d
    b_words = tl.load(p_word, mask=wanted, other=IDENTITY, volatile=True)
    while tl.max((b_words >> 32).to(tl.int32), 0) >= 0:
        b_words = tl.load(p_word, mask=wanted, other=IDENTITY, volatile=True)
    b_decay = ((b_words >> 32).to(tl.int32) & LOW_BITS).to(tl.float32, bitcast=True)
    b_state = b_words.to(tl.int32).to(tl.float32, bitcast=True)
    return b_decay[None, :], b_state[None, :]


@triton.jit
def fold(p_words, p_initial, b_decay, b_state, i_tile, tiles, i_row, o_d, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(state that enters each stretch, product of the row's factors up to its end, state that leaves it).

    `b_decay`, `b_state` [ROWS, D] are the stretches' own pairs. Waits for the tile before and publishes the pair of the
    row up to this one's end, the initial state included.
    """
    b_one, b_zero = tl.full(b_decay.shape, 1.0, tl.float32), tl.zeros(b_decay.shape, tl.float32)
    b_decay, b_state, b_above, b_from_above = tl.associative_scan((b_decay, b_state, b_one, b_zero), 0, _compose_both)
    i_word = i_row * tiles + i_tile
    b_before, b_enters = _before(p_words, i_word, i_tile, o_d, WIDTH)
    b_enters += vector(p_initial, i_row, o_d, i_tile == 0, WIDTH)
    b_state += b_decay * b_enters
    b_decay *= b_before
    put_last(p_words, _word(b_decay, b_state), i_word, o_d, i_tile + 1 < tiles, WIDTH, ROWS)
    return b_above * b_enters + b_from_above, b_decay, b_state


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
):
    TILE: tl.constexpr = ROWS * STEPS
    counter = p_words + tl.full((), WIDTH, tl.int64) * batch * tiles
    i_tile, i_row, o_d, left = place(take(counter), batch, tokens, WIDTH, BLOCK_D, TILE)
    at = i_row * tokens + i_tile * TILE
    xs = steps_of(p_x, at, o_d, left, 0.0, 1, WIDTH, ROWS, STEPS)
    logs = steps_of(p_log_a, at, o_d, left, 0.0, 1, WIDTH, ROWS, STEPS)
    b_resets = resets_of(p_resets, at, left, 1, ROWS, STEPS)
    ticket = take(counter)
    while i_tile < tiles:
        next_tile, next_row, next_d, next_left = place(ticket, batch, tokens, WIDTH, BLOCK_D, TILE)
        next_at = next_row * tokens + next_tile * TILE
        next_xs = steps_of(p_x, next_at, next_d, next_left, 0.0, 1, WIDTH, ROWS, STEPS)
        next_logs = steps_of(p_log_a, next_at, next_d, next_left, 0.0, 1, WIDTH, ROWS, STEPS)
        b_next_resets = resets_of(p_resets, next_at, next_left, 1, ROWS, STEPS)
        ticket = take(counter)
        b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
        b_h = tl.zeros([ROWS, BLOCK_D], tl.float32)
        factors = ()
        b_bits = bits_of(b_resets)
        for step in tl.static_range(STEPS):
            b_a = tl.exp2(logs[step].to(tl.float32) * LOG2_E)
            if p_resets is not None:
                b_a = tl.where(begins(b_bits, step), 0.0, b_a)
            b_decay *= b_a
            b_h = b_a * b_h + xs[step].to(tl.float32)
            factors += (b_a,)
        b_h, b_decay, b_final = fold(p_words, p_initial, b_decay, b_h, i_tile, tiles, i_row, o_d, WIDTH, ROWS)
        put_last(p_final, b_final, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
        put_last(p_transition, b_decay, i_row, o_d, i_tile + 1 == tiles, WIDTH, ROWS)
        if p_h is not None:
            for step in tl.static_range(STEPS):
                b_h = factors[step] * b_h + xs[step].to(tl.float32)
                put(p_h, b_h, step, at, o_d, left, 1, WIDTH, ROWS, STEPS)
        xs, logs, b_resets = next_xs, next_logs, b_next_resets
        i_tile, i_row, o_d, left, at = next_tile, next_row, next_d, next_left, next_at


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
):
    """From the last token to the first: dx_t = dh_t + g_{t+1}, g_t = a_t dx_t, the gradient that enters h_{t-1}."""
    TILE: tl.constexpr = ROWS * STEPS
    o_t = tl.arange(0, ROWS) * STEPS
    counter = p_words + tl.full((), WIDTH, tl.int64) * batch * tiles
    i_tile, i_row, o_d, left = place(take(counter), batch, tokens, WIDTH, BLOCK_D, TILE)
    at = i_row * tokens + left - 1
    dhs = steps_of(p_dh, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    logs = steps_of(p_log_a, at, o_d, left, 0.0, -1, WIDTH, ROWS, STEPS)
    befores = steps_of(p_h, at - 1, o_d, left - 1, 0.0, -1, WIDTH, ROWS, STEPS)
    b_resets = resets_of(p_resets, at, left, -1, ROWS, STEPS)
    ticket = take(counter)
    while i_tile < tiles:
        next_tile, next_row, next_d, next_left = place(ticket, batch, tokens, WIDTH, BLOCK_D, TILE)
        next_at = next_row * tokens + next_left - 1
        next_dhs = steps_of(p_dh, next_at, next_d, next_left, 0.0, -1, WIDTH, ROWS, STEPS)
        next_logs = steps_of(p_log_a, next_at, next_d, next_left, 0.0, -1, WIDTH, ROWS, STEPS)
        next_befores = steps_of(p_h, next_at - 1, next_d, next_left - 1, 0.0, -1, WIDTH, ROWS, STEPS)
        b_next_resets = resets_of(p_resets, next_at, next_left, -1, ROWS, STEPS)
        ticket = take(counter)
        b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
        b_g = tl.zeros([ROWS, BLOCK_D], tl.float32)
        factors = ()
        b_bits = bits_of(b_resets)
        for step in tl.static_range(STEPS):
            b_a = tl.exp2(logs[step].to(tl.float32) * LOG2_E)
            if p_resets is not None:
                b_a = tl.where(begins(b_bits, step), 0.0, b_a)
            b_decay *= b_a
            if p_dh is not None:
                b_g += dhs[step].to(tl.float32)
            b_g *= b_a
            factors += (b_a,)
        b_g, _, b_dinitial = fold(p_words, p_dfinal, b_decay, b_g, i_tile, tiles, i_row, o_d, WIDTH, ROWS)
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
        dhs, logs, befores, b_resets = next_dhs, next_logs, next_befores, b_next_resets
        i_tile, i_row, o_d, left, at = next_tile, next_row, next_d, next_left, next_at


def forward(x: Tensor, log_a: Tensor, initial: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    x, log_a, initial, resets = packed(x, log_a, initial, resets)
    h, final = torch.empty_like(x), per_row(x)
    launch(_forward, FORWARD, x, x, log_a, resets, initial, h, final, None)
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
    dh, dfinal, extra, log_a, h, initial, resets = packed(dh, dfinal, extra, log_a, h, initial, resets)
    dx, dlog_a, dinitial = torch.empty_like(h), torch.empty_like(log_a), per_row(h)
    launch(_backward, BACKWARD, h, dh, dfinal, extra, log_a, resets, h, initial, dx, dlog_a, dinitial)
    return dx, dlog_a, dinitial


def summarize(x: Tensor, log_a: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    x, log_a, resets = packed(x, log_a, resets)
    state, transition = per_row(x), per_row(x)
    launch(_forward, FORWARD, x, x, log_a, resets, None, None, state, transition)
    return state, transition


def launch(kernel: Any, tile: Tile, like: Tensor, *arguments: Tensor | None) -> None:
    """Runs a pass over [B, T, D] of `like`, on its GPU."""
    batch, tokens, width = like.shape
    block = min(tile.block, max(16, 1 << (width - 1).bit_length()))
    tiles = -(-tokens // (tile.rows * tile.steps))
    # The pairs that tiles publish, none there yet, and after them the counter of tickets.
    words = torch.zeros(batch * tiles * width + 1, dtype=torch.int64, device=like.device)
    programs = min(batch * tiles * -(-width // block), tile.programs * _multiprocessors(like.device))
    sizes = {"ROWS": tile.rows, "STEPS": tile.steps, "BLOCK_D": block, "num_warps": tile.warps}
    with on(like):
        kernel[(programs,)](*arguments, words, batch, tokens, tiles, WIDTH=width, **sizes)


def _multiprocessors(device: torch.device) -> int:
    """Of the GPU; the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's GPU; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def per_row(like: Tensor) -> Tensor:
    """Room for one fp32 vector a row, [B, D]."""
    return torch.empty(like.shape[0], like.shape[2], dtype=torch.float32, device=like.device)


def packed(*tensors: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them; bool as bytes."""
    laid = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in laid]

"""The diagonal linear scan in Triton: one launch a pass, every input read once, every output written once.

A program owns one row, BLOCK_D channels and a chunk of ROWS x STEPS tokens: ROWS stretches of STEPS tokens each, a
stretch to a warp, its tokens one after another in the registers of the threads that own its channels. Two walks over
those registers are all the arithmetic there is:

    1. the stretch from a zero state, for its pair (product of factors, state it leaves);
    2. the stretch again from its true state, for the outputs.

Between them the pairs are folded, over the stretches of the chunk and then over the chunks before it. Chunks come in
groups of GROUP. Each publishes its pair to its group, and each folds what its group has published before it; slot 0 of
a group holds the pair of everything before the group, which the last chunk of the group before publishes. A state thus
crosses tokens / (ROWS x STEPS x GROUP) programs one after the other, about a microsecond each, while their loads and
stores overlap. Every fold has one fixed order, so bits repeat.

A pair is one 64-bit word a channel whose sign bit, spare since factors are >= 0, says that it is there: data and flag
arrive together and need no fence. Programs take tickets, so the chunks that one waits for are always running.

The adjoint is the same scan over mirrored tokens. Lengths that no chunk divides are padded with factor 1 and input 0.

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


@dataclass(frozen=True)
class Tile:
    """What a program owns: `rows` stretches of `steps` tokens by `block` channels; `group` chunks to a group."""

    rows: int
    steps: int
    block: int
    group: int
    warps: int


FORWARD = Tile(rows=8, steps=16, block=64, group=8, warps=8)
BACKWARD = Tile(rows=8, steps=8, block=64, group=16, warps=8)

# The word of (1, 0), ready.
IDENTITY = tl.constexpr((0x3F800000 << 32) - 2**63)
HIGH_BIT = tl.constexpr(-(2**31))
LOW_BITS = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Cut:
    """How [B, T, D] is cut into chunks."""

    tile: Tile
    batch: int
    tokens: int
    width: int

    @property
    def block(self) -> int:
        """Channels of a program."""
        return min(self.tile.block, max(16, 1 << (self.width - 1).bit_length()))

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-self.tokens // (self.tile.rows * self.tile.steps))

    @property
    def groups(self) -> int:
        """Groups of chunks of a row."""
        return -(-self.chunks // self.tile.group)

    @property
    def grid(self) -> tuple[int]:
        """Programs."""
        return (self.batch * self.chunks * -(-self.width // self.block),)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The run-time sizes every kernel takes."""
        return self.batch, self.tokens, self.width, self.groups

    @property
    def constants(self) -> dict[str, int]:
        """The compile-time sizes every kernel takes."""
        tile = self.tile
        return {
            "ROWS": tile.rows,
            "STEPS": tile.steps,
            "BLOCK_D": self.block,
            "GROUP": tile.group,
            "num_warps": tile.warps,
        }

    def words(self, like: Tensor) -> Tensor:
        """The pairs that chunks publish, none there yet, and after them the counter of tickets."""
        slots = self.batch * self.groups * self.tile.group
        return torch.zeros(slots * self.width + 1, dtype=torch.int64, device=like.device)

    def per_row(self, like: Tensor) -> Tensor:
        """Room for one fp32 vector a row, [B, D]."""
        return torch.empty(self.batch, self.width, dtype=torch.float32, device=like.device)


@triton.jit
def place(p_words, batch, width, groups, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """(chunk in the order walked, row, o_d) of this program, in the order in which programs start."""
    # A size that is 1 arrives as a constant, which has no methods, so the product starts from a tensor.
    counter = p_words + tl.full((), GROUP, tl.int64) * batch * groups * width
    ticket = tl.atomic_add(counter, 1, sem="relaxed").to(tl.int32)
    columns = tl.cdiv(width, BLOCK_D)
    i_chunk = ticket // (columns * batch)
    rest = ticket % (columns * batch)
    return i_chunk, (rest // columns).to(tl.int64), rest % columns * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def _compose(decay_one, state_one, decay_two, state_two):
    """The pair of a stretch `one` followed by a stretch `two`."""
    return decay_one * decay_two, decay_two * state_one + state_two


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
def entering(
    p_words,
    p_initial,
    i_chunk,
    i_row,
    b_decay,
    b_state,
    o_d,
    mask,
    width,
    groups,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The state that enters each stretch, and the pair of the row up to the stretch's end from a zero state.

    `b_decay`, `b_state` [ROWS, D] are the stretches' own pairs. Publishes the chunk's and, of a group's last chunk,
    the one of the row so far.
    """
    o_row = tl.arange(0, ROWS)[:, None]
    b_one, b_zero = tl.full(b_decay.shape, 1.0, tl.float32), tl.zeros(b_decay.shape, tl.float32)
    b_decay, b_state, b_above_decay, b_above_state = tl.associative_scan(
        (b_decay, b_state, b_one, b_zero), 0, _compose_both
    )
    i_group = i_chunk // GROUP
    i_slot = i_chunk % GROUP
    p_group = p_words + (i_row * groups + i_group) * GROUP * width
    p_row = p_group + o_d[None, :] + o_row * 0
    whole = (o_row == ROWS - 1) & mask[None, :]
    tl.store(p_row + (i_slot + 1) * width, _word(b_decay, b_state), mask=whole & (i_slot < GROUP - 1))
    b_before_decay, b_before_state = _before(p_group, i_group, i_slot, o_d, mask, width, GROUP)
    b_decay, b_state = _compose(b_before_decay, b_before_state, b_decay, b_state)
    closes = (i_slot == GROUP - 1) & (i_group + 1 < groups)
    tl.store(p_row + GROUP * width, _word(b_decay, b_state), mask=whole & closes)
    if p_initial is not None:
        b_initial = tl.load(p_initial + i_row * width + o_d, mask=mask, other=0.0)
        b_before_state += b_before_decay * b_initial[None, :]
    return b_above_decay * b_before_state + b_above_state, b_decay, b_state


@triton.jit
def _before(p_group, i_group, i_slot, o_d, mask, width, GROUP: tl.constexpr):
    """The pair [1, D] of the row before this chunk, once all that make it up are published."""
    o_slot = tl.arange(0, GROUP)
    earlier = (o_slot <= i_slot) & (o_slot + i_group > 0)
    p_slots = p_group + o_slot[:, None] * width + o_d[None, :]
    wanted = earlier[:, None] & mask[None, :]
    b_words = tl.load(p_slots, mask=wanted, other=IDENTITY, volatile=True)
    while tl.max(tl.max(b_words, 1), 0) >= 0:
        b_words = tl.load(p_slots, mask=wanted, other=IDENTITY, volatile=True)
    b_decay = ((b_words >> 32).to(tl.int32) & LOW_BITS).to(tl.float32, bitcast=True)
    b_state = b_words.to(tl.int32).to(tl.float32, bitcast=True)
    b_decay, b_state = tl.associative_scan((b_decay, b_state), 0, _compose)
    last = o_slot[:, None] == GROUP - 1
    b_decay = tl.sum(tl.where(last, b_decay, 0.0), 0)
    b_state = tl.sum(tl.where(last, b_state, 0.0), 0)
    return b_decay[None, :], b_state[None, :]


@triton.jit
def vector(pointer, i_row, o_d, mask, width):
    """This row's vector of [B, D] as [1, D], or zeros for None."""
    b = tl.zeros(o_d.shape, tl.float32)
    if pointer is not None:
        b = tl.load(pointer + i_row * width + o_d, mask=mask, other=0.0).to(tl.float32)
    return b[None, :]


@triton.jit
def _forward(
    p_x,
    p_log_a,
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
    p_log_a += at * width
    o = (o_row * STEPS * width)[:, None] + o_d[None, :]
    xs, factors = (), ()
    for step in tl.static_range(STEPS):
        kept = (o_row * STEPS + step < tokens - first)[:, None] & mask[None, :]
        xs += (tl.load(p_x + step * width + o, mask=kept, other=0.0),)
        factors += (tl.load(p_log_a + step * width + o, mask=kept, other=0.0),)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_state = tl.zeros([ROWS, BLOCK_D], tl.float32)
    walked = ()
    for step in tl.static_range(STEPS):
        b_a = tl.exp(factors[step].to(tl.float32))
        if p_resets is not None:
            o_t = o_row * STEPS + step
            b_reset = tl.load(p_resets + at + o_t, mask=o_t < tokens - first, other=0)
            b_a = tl.where(b_reset[:, None] != 0, 0.0, b_a)
        b_decay *= b_a
        b_state = b_a * b_state + xs[step].to(tl.float32)
        walked += (b_a,)
    b_h, b_all_decay, b_all_state = entering(
        p_words, p_initial, i_chunk, i_row, b_decay, b_state, o_d, mask, width, groups, ROWS, GROUP
    )
    ends = (o_row == ROWS - 1) & (first + ROWS * STEPS >= tokens)
    o_end = i_row * width + o_d[None, :] + o_row[:, None] * 0
    if p_h is not None:
        p_h += at * width
        for step in tl.static_range(STEPS):
            b_h = walked[step] * b_h + xs[step].to(tl.float32)
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
    p_log_a,
    p_resets,
    p_h,
    p_initial,
    p_words,
    p_dx,
    p_dlog_a,
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
    """From the last token to the first: dx_t = dh_t + g_{t+1}, g_t = a_t dx_t, the gradient that enters h_{t-1}."""
    i_chunk, i_row, o_d = place(p_words, batch, width, groups, GROUP, BLOCK_D)
    mask = o_d < width
    o_row = tl.arange(0, ROWS)
    first = tokens - 1 - i_chunk * (ROWS * STEPS)
    at = i_row * tokens + first
    p_log_a += at * width
    p_h += at * width
    if p_dh is not None:
        p_dh += at * width
    o = o_d[None, :] - (o_row * STEPS * width)[:, None]
    dhs, factors, befores = (), (), ()
    for step in tl.static_range(STEPS):
        o_t = o_row * STEPS + step
        kept = (o_t <= first)[:, None] & mask[None, :]
        if p_dh is not None:
            dhs += (tl.load(p_dh - step * width + o, mask=kept, other=0.0),)
        factors += (tl.load(p_log_a - step * width + o, mask=kept, other=0.0),)
        inside = (o_t < first)[:, None] & mask[None, :]
        befores += (tl.load(p_h - (step + 1) * width + o, mask=inside, other=0.0),)
    b_decay = tl.full([ROWS, BLOCK_D], 1.0, tl.float32)
    b_state = tl.zeros([ROWS, BLOCK_D], tl.float32)
    walked = ()
    for step in tl.static_range(STEPS):
        b_a = tl.exp(factors[step].to(tl.float32))
        if p_resets is not None:
            o_t = o_row * STEPS + step
            b_reset = tl.load(p_resets + at - o_t, mask=o_t <= first, other=0)
            b_a = tl.where(b_reset[:, None] != 0, 0.0, b_a)
        b_decay *= b_a
        if p_dh is not None:
            b_state += dhs[step].to(tl.float32)
        b_state *= b_a
        walked += (b_a,)
    b_state, _, _ = entering(p_words, p_dfinal, i_chunk, i_row, b_decay, b_state, o_d, mask, width, groups, ROWS, GROUP)
    b_initial = vector(p_initial, i_row, o_d, mask, width)
    b_extra = vector(p_extra, i_row, o_d, mask, width)
    p_dx += at * width
    p_dlog_a += at * width
    for step in tl.static_range(STEPS):
        o_t = o_row * STEPS + step
        kept = (o_t <= first)[:, None] & mask[None, :]
        b_dx = b_state
        if p_dh is not None:
            b_dx += dhs[step].to(tl.float32)
        b_state = walked[step] * b_dx
        b_before = befores[step].to(tl.float32)
        if p_initial is not None:
            b_before = tl.where((o_t == first)[:, None], b_initial, b_before)
        tl.store(p_dx - step * width + o, b_dx.to(p_dx.dtype.element_ty), mask=kept)
        b_dlog_a = b_state * b_before + b_extra
        tl.store(p_dlog_a - step * width + o, b_dlog_a.to(p_dlog_a.dtype.element_ty), mask=kept)
    ends = (o_row == ROWS - 1) & (first < ROWS * STEPS)
    p_end = p_dinitial + i_row * width + o_d[None, :]
    tl.store(p_end + o_row[:, None] * 0, b_state, mask=ends[:, None] & mask[None, :])


def forward(x: Tensor, log_a: Tensor, initial: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, final_state); see op.py."""
    cut = Cut(FORWARD, *x.shape)
    x, log_a, initial, resets = packed(x, log_a, initial, resets)
    h, final = torch.empty_like(x), cut.per_row(x)
    with on(x):
        _forward[cut.grid](x, log_a, resets, initial, cut.words(x), h, final, None, *cut.sizes, **cut.constants)
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
    cut = Cut(BACKWARD, *h.shape)
    dh, dfinal, extra, log_a, h, initial, resets = packed(dh, dfinal, extra, log_a, h, initial, resets)
    dx, dlog_a, dinitial = torch.empty_like(h), torch.empty_like(log_a), cut.per_row(h)
    inputs = (dh, dfinal, extra, log_a, resets, h, initial, cut.words(h))
    with on(h):
        _backward[cut.grid](*inputs, dx, dlog_a, dinitial, *cut.sizes, **cut.constants)
    return dx, dlog_a, dinitial


def summarize(x: Tensor, log_a: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(state, transition); see op.py."""
    cut = Cut(FORWARD, *x.shape)
    x, log_a, resets = packed(x, log_a, resets)
    state, transition = cut.per_row(x), cut.per_row(x)
    with on(x):
        _forward[cut.grid](x, log_a, resets, None, cut.words(x), None, state, transition, *cut.sizes, **cut.constants)
    return state, transition


def packed(*tensors: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them; bool as bytes."""
    laid = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in laid]


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's GPU; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

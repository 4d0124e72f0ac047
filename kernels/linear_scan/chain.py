"""A diagonal scan over tiles of tokens in Triton, one launch a pass: what linear_scan and rg_lru share.

The tokens of a row are cut into tiles of ROWS x STEPS tokens by BLOCK_D channels: ROWS stretches of STEPS tokens, a
stretch's tokens one after another in the registers of the threads that own its channels. Two walks over those
registers are all the arithmetic there is:

    1. the stretch from a zero state, for its pair (product of factors, state it leaves);
    2. the stretch again from its true state, for the outputs.

Between them the pairs are folded over the stretches of the tile, and the tile waits for the pair of everything before
it, which the tile before publishes as soon as it has its own. So a state crosses T / (ROWS x STEPS) programs one after
the other, 0.8 us each, beside the loads and stores of all the others. Where few rows leave that chain in sight, it
skips every other tile (SKIP = 2): a tile publishes its own pair at once, and waits for that of the tile before and for
the pair of everything before that one, which the tile two before it publishes. Every fold has one fixed order, so
bits repeat.

The first tiles of all channels come before the second ones, and a GPU begins programs in the order of their numbers
(CUB's scans rest on that as well), so the tile that is waited for is always done or in work.

A pair is one 64-bit word a channel whose sign bit, spare since factors are >= 0, says that it is there: data and flag
arrive together and need no fence. All warps of a program poll. Each must go on with what it has seen itself, for what
one sees another may not see yet; so the lanes of a warp hold all channels of a poll, and no word of it crosses warps.
A word has one reader, which clears it.

The adjoint is the same scan over mirrored tokens. Tokens beyond the end have factor 1 and input 0.

Offsets are o_, loaded blocks b_, pointers p_, indices of the walk i_. State is fp32; every load is cast to it before
any arithmetic.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on
from ..sizes import cdiv, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
# The word of (1, 0), there.
IDENTITY = tl.constexpr((0x3F800000 << 32) - 2**63)
HIGH_BIT = tl.constexpr(-(2**31))
LOW_BITS = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Tile:
    """`rows` stretches of `steps` tokens by `block` channels, walked by `warps` of at most so many `registers`.

    The chain of states goes to the next tile, or with a `skip` of 2 to the one after it.
    """

    rows: int
    steps: int
    block: int
    warps: int
    registers: int | None = None
    skip: int = 1

    def __post_init__(self) -> None:
        # A warp's 32 lanes poll a part each, of two at most; skipping more, a tile's own word would have two readers.
        assert self.block <= 64 and self.skip in (1, 2), self

    def count(self, tokens: int) -> int:
        """Tiles of a row."""
        return cdiv(tokens, self.rows * self.steps)


# From so many channels in all rows together on, states arrive before their tiles are done.
MANY = 8192


@triton.jit
def place(batch, tokens, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """(tile in the order walked, row, o_d, tokens of the row from the tile on) of the program."""
    columns: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i_tile = tl.program_id(0) // (columns * batch)
    rest = tl.program_id(0) % (columns * batch)
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
    """Whether a tile's tokens begin documents, [ROWS, 1] a step; () for None."""
    blocks = ()
    if pointer is not None:
        o_t = tl.arange(0, ROWS) * STEPS
        for step in tl.static_range(STEPS):
            b = tl.load(pointer + at + SIGN * (o_t + step), mask=o_t + step < left, other=0)
            blocks += ((b != 0)[:, None],)
    return blocks


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
def _pair(b_word):
    """The pair [1, D] of a word."""
    b_decay = ((b_word >> 32).to(tl.int32) & LOW_BITS).to(tl.float32, bitcast=True)
    return b_decay[None, :], b_word.to(tl.int32).to(tl.float32, bitcast=True)[None, :]


@triton.jit
def _polled(p_tile, i_tile, o_d, BACK: tl.constexpr, WIDTH: tl.constexpr, SKIP: tl.constexpr):
    """Pointers and mask of the word that is read of the tile BACK before: of the row up to its end, or of it alone.

    The first for BACK == SKIP, the second for a nearer one.
    """
    kind: tl.constexpr = SKIP - 1 if BACK == SKIP else 0
    return p_tile + (kind - BACK * SKIP) * WIDTH + o_d, (o_d < WIDTH) & (i_tile >= BACK)


@triton.jit
def _poll(p_tile, i_tile, channels, WIDTH: tl.constexpr, SKIP: tl.constexpr, PARTS: tl.constexpr):
    """What is there of the words before a tile: of each part of its channels those of SKIP tiles, the nearest first."""
    words = ()
    for part in tl.static_range(PARTS):
        for back in tl.static_range(1, SKIP + 1):
            p_word, wanted = _polled(p_tile, i_tile, channels[part], back, WIDTH, SKIP)
            words += (tl.load(p_word, mask=wanted, other=IDENTITY, volatile=True),)
    return words


@triton.jit
def _missing(words, COUNT: tl.constexpr):
    """Whether a word is not there yet."""
    b_all = words[0]
    for i in tl.static_range(1, COUNT):
        b_all = b_all & words[i]
    return tl.max((b_all >> 32).to(tl.int32), 0) >= 0


@triton.jit
def _before(p_tile, i_tile, b_initial, o_d, WIDTH: tl.constexpr, SKIP: tl.constexpr, BLOCK_D: tl.constexpr):
    """The pair [1, D] of the row before the tile, `b_initial` [1, D] included, once it is there."""
    PARTS: tl.constexpr = 2 if BLOCK_D > 32 else 1
    if PARTS == 2:
        channels = tl.split(tl.reshape(o_d, [BLOCK_D // 2, 2]))
    else:
        channels = (o_d,)
    words = _poll(p_tile, i_tile, channels, WIDTH, SKIP, PARTS)
    while _missing(words, PARTS * SKIP):
        words = _poll(p_tile, i_tile, channels, WIDTH, SKIP, PARTS)
    for i in tl.static_range(SKIP):
        b_word = words[SKIP - 1 - i]
        if PARTS == 2:
            b_word = tl.reshape(tl.join(b_word, words[2 * SKIP - 1 - i]), [BLOCK_D])
        b_factor, b_leaves = _pair(b_word)
        if i == 0:
            # Where there is an initial state, this is the identity.
            b_decay, b_state = b_factor, b_initial + b_leaves
        else:
            b_decay, b_state = b_decay * b_factor, b_factor * b_state + b_leaves
    return b_decay, b_state


@triton.jit
def _clear(p_tile, i_tile, o_d, WIDTH: tl.constexpr, SKIP: tl.constexpr):
    """Leaves the words that the tile has read as they were found, once all its warps have."""
    tl.debug_barrier()
    for back in tl.static_range(1, SKIP + 1):
        p_word, wanted = _polled(p_tile, i_tile, o_d, back, WIDTH, SKIP)
        tl.store(p_word, tl.zeros(o_d.shape, tl.int64), mask=wanted)


@triton.jit
def fold(
    p_words,
    p_initial,
    b_decay,
    b_state,
    i_tile,
    tiles,
    i_row,
    o_d,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
):
    """(state that enters each stretch, product of the row's factors up to its end, state that leaves it).

    `b_decay`, `b_state` [ROWS, D] are the stretches' own pairs. Waits for the words before and publishes SKIP words a
    channel: the pair of the tile alone, where the chain skips, and that of the row up to its end, with the initial
    state.
    """
    b_one, b_zero = tl.full(b_decay.shape, 1.0, tl.float32), tl.zeros(b_decay.shape, tl.float32)
    b_decay, b_state, b_above, b_from_above = tl.associative_scan((b_decay, b_state, b_one, b_zero), 0, _compose_both)
    i_word = (i_row * tiles + i_tile) * SKIP
    p_tile = p_words + i_word * WIDTH
    if SKIP == 2:
        put_last(p_words, _word(b_decay, b_state), i_word, o_d, i_tile + 1 < tiles, WIDTH, ROWS)
    b_initial = vector(p_initial, i_row, o_d, i_tile < SKIP, WIDTH)
    b_before, b_enters = _before(p_tile, i_tile, b_initial, o_d, WIDTH, SKIP, b_decay.shape[1])
    b_state += b_decay * b_enters
    b_decay *= b_before
    put_last(p_words, _word(b_decay, b_state), i_word + SKIP - 1, o_d, i_tile + SKIP < tiles, WIDTH, ROWS)
    _clear(p_tile, i_tile, o_d, WIDTH, SKIP)
    return b_above * b_enters + b_from_above, b_decay, b_state


def launch(kernel: Any, tiles: tuple[Tile, Tile], like: Tensor, *arguments: Tensor | None) -> None:
    """Runs a pass over [B, T, D] of `like`, on its GPU."""
    batch, tokens, width = like.shape
    tile = choose(tiles, like)
    block = min(tile.block, max(16, next_power_of_2(width)))
    count = tile.count(tokens)
    sizes = {"ROWS": tile.rows, "STEPS": tile.steps, "BLOCK_D": block, "SKIP": tile.skip, "num_warps": tile.warps}
    if tile.registers and like.is_cuda:
        sizes["maxnreg"] = tile.registers
    with on(like), _words(like, batch * count * tile.skip * width) as words:
        kernel[(batch * count * cdiv(width, block),)](*arguments, words, batch, tokens, count, WIDTH=width, **sizes)


# Words of each device's default stream, all 0 between passes: they are cleared once, not by a launch a pass. No more
# than MOST of them, 32 MiB, are kept: beside so large a pass a launch costs nothing.
_WORDS: dict[torch.device, Tensor] = {}
MOST = 2**22


@contextlib.contextmanager
def _words(like: Tensor, count: int) -> Iterator[Tensor]:
    """At least `count` words that are 0, for one pass on the current stream, which leaves them so.

    On another stream, so in any CUDA graph, a pass has words of its own: a graph may be replayed beside other passes,
    and what is allocated while one is made or prepared is the graph's.
    """
    device = like.device
    kept = count <= MOST and not (like.is_cuda and torch.cuda.current_stream(device).cuda_stream)
    words = _WORDS.pop(device, None) if kept else None
    if words is None or words.numel() < count:
        words = torch.zeros(count, dtype=torch.int64, device=device)
    # Not put back by a launch that failed, nor lent to another thread meanwhile.
    yield words
    if kept:
        _WORDS[device] = words


def choose(tiles: tuple[Tile, Tile], like: Tensor) -> Tile:
    """The tile for [B, T, D], of those for (few channels, many) in all rows together."""
    return tiles[like.shape[0] * like.shape[2] >= MANY]


def per_row(like: Tensor) -> Tensor:
    """Room for one fp32 vector a row, [B, D]."""
    return torch.empty(like.shape[0], like.shape[2], dtype=torch.float32, device=like.device)


def packed(*tensors: Tensor | None) -> list[Any]:
    """The tensors laid out contiguously, as the kernels address them; bool as bytes."""
    laid = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in laid]

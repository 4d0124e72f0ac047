"""Attention in Triton: a pass for y, on Hopper GPUs often hopper.py's, and backward one for dq and one for dk and dv.

The queries of a key head are laid out as rows: with G = H / Hkv query heads to a key head, row r is head r % G of
token r // G. A block of rows then holds all heads of a few tokens, so a key block is loaded once for the whole group,
a block is hardly wider than its window, and dk and dv sum over the group's heads inside one program. Any G fits
without padding. Where that leaves so few programs for dk and dv that a GPU's last round is badly filled, several share
the rows of a key block and their fp32 parts are added.

A block meets only keys that one of its rows may keep, and masks only the edge blocks among them: the blocks that
every row keeps whole go through a loop of their own. Under ALiBi, `_reach` bounds the distance at which a weight can
exceed 2^-48 of its row's largest, so steep heads meet few keys and lose nothing that fp32 could hold. Every sum has
one fixed order, so bits repeat; the only atomics are those of maxima, which any order leaves the same.

Scores are in base 2. Indices carry i_, offsets o_, loaded blocks b_, pointers p_ and flags m_.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import contextlib
import functools
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..dispatch import log_choice, on, processors
from ..partials import sum_partials
from ..sizes import cdiv, next_power_of_2
from . import scoring as rules
from .scoring import Scoring, statistics_shape

LOG2_E, NEGLIGIBLE = tl.constexpr(rules.LOG2_E), tl.constexpr(rules.NEGLIGIBLE)
EVERYWHERE, NEVER = tl.constexpr(rules.EVERYWHERE), tl.constexpr(rules.NEVER)


class Tile(NamedTuple):
    """Rows and keys of a block, warps of a program, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


# Wider heads take dk and dv in a pass each, at one product more: blocks of 128 keys, whose sums fill the registers
# alone, keep the scores of a warp's keys in that warp.
MOST_SHARED = 128
# With a window of at most so many keys hardly a block is whole: every block is masked, in one loop whose loads all
# begin at once; hopper.py's larger blocks take 1.7 times the time of a window of 64.
NARROW = 128
# Of hopper.py's kernel. With 512 tokens of 16 heads of 128 `_forward` takes 0.8 to 0.9 of its time.
HOPPER_DIMS, LEAST_TOKENS = (64, 128, 256), 2048
# The releases of Triton whose Gluon, which may change, it was compiled with.
GLUON_RELEASES = ("3.6", "3.7")
# Programs that may share the rows of a key block, and up to how many rounds of programs that is looked into. What a
# part costs to write and to read again, and the launches that add parts up, in blocks of rows: by their bytes, at a
# copy's speed, 5 of heads of 128 and 7 of 256, which take 2 us. Of 26 shapes timed on an H100 the choice is at most a
# tenth above the best.
PARTS, MOST_ROUNDS = (1, 2, 4, 8), 8
PART_COST, SUM_COST = 6, 8
# Elements of a block whose norms are compared: 64 a thread, in loads that all begin at once.
NORMS_BLOCK = 16384

# By padded head dim, for 16-bit inputs; smaller heads take the first. The fastest of those that
# benchmarks.kernels_attention times on an H100, where query heads share a key head under a window.
TILES: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(128, 64, 8, 2)},
    "dq": {64: Tile(128, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(128, 32, 8, 2)},
    "dkv": {64: Tile(128, 64, 4, 2), 128: Tile(64, 128, 8, 3)},
    "dk": {256: Tile(32, 128, 8, 3)},
    "dv": {256: Tile(32, 128, 8, 3)},
}
# Likewise where each query head has a key head of its own, or the window is narrow, if another tile.
SINGLE_TILES: dict[str, dict[int, Tile]] = {
    "dq": {128: Tile(128, 64, 8, 3)},
}
NARROW_TILES: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(64, 32, 4, 3)},
    "dq": {64: Tile(64, 32, 4, 3)},
    "dkv": {64: Tile(64, 64, 4, 3)},
}


def tile_of(work: str, dtype: torch.dtype, dim: int, groups: int, window: int) -> Tile:
    """The tile of a pass at a padded head dim, a number of query heads to a key head and a window."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    dim = max(64, dim)
    tiles = NARROW_TILES if window <= NARROW and groups > 1 else SINGLE_TILES if groups == 1 else {}
    return tiles.get(work, {}).get(dim, TILES[work][dim])


@triton.jit
def _reach(p_slopes, p_norms, factor, HEADS: tl.constexpr, GROUPS: tl.constexpr):
    """At larger distances than this from its nearest key, no query of this program's heads gives a weight.

    Scores lie within +-bound = factor |q| |k| of 0, so a key `d` farther than another has a weight, relative to it, of
    at most 2^(2 bound - slope d). Of several heads, the largest; a slope not above 0, or a bound that is infinite or
    NaN, reaches everywhere.
    """
    o_head = tl.program_id(1) * GROUPS + tl.arange(0, triton.next_power_of_2(GROUPS)) % GROUPS
    p_row = p_norms + tl.program_id(2) * (HEADS + HEADS // GROUPS)
    b_q = tl.sqrt(tl.load(p_row + o_head))
    b_k = tl.sqrt(tl.load(p_row + HEADS + tl.program_id(1)))
    b_slope = tl.load(p_slopes + o_head) * LOG2_E
    b_far = (2 * factor * b_q * b_k + NEGLIGIBLE) / b_slope
    b_far = tl.where((b_slope > 0) & (b_far < EVERYWHERE), tl.ceil(b_far), EVERYWHERE)
    return tl.max(b_far, 0).to(tl.int32)


@triton.jit
def _row_span(p_doc_start, reach, i_low, i_high, tokens, keys, offset, window):
    """(start, stop) of the keys that some of queries i_low to i_high keep, (first, end) of those that all keep."""
    i_batch = tl.program_id(2).to(tl.int64)
    low, high = i_low - window + 1, i_high - window + 1
    if p_doc_start is not None:
        low = tl.maximum(low, tl.load(p_doc_start + i_batch * tokens + i_low))
        high = tl.maximum(high, tl.load(p_doc_start + i_batch * tokens + i_high))
    last = keys - 1 + offset
    if reach is not None:
        low = tl.maximum(low, tl.minimum(i_low, last) - reach)
    stop = tl.minimum(i_high, last) - offset + 1
    start = tl.minimum(tl.maximum(low - offset, 0), stop)
    return start, stop, high - offset, tl.minimum(i_low, last) - offset + 1


@triton.jit
def _largest_norm(p, tokens, i_head, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D, BLOCK_M: tl.constexpr):
    """The bits of the largest |x|^2 of a head in BLOCK_M tokens of x [B, T, HEADS, DIM]; NaN's are above all others."""
    i_token = tl.program_id(0) * BLOCK_M
    o_token = tl.arange(0, BLOCK_M)
    base = (tl.program_id(2).to(tl.int64) * tokens + i_token) * HEADS + i_head
    b = _load(p, base, o_token * HEADS, o_token < tokens - i_token, DIM, BLOCK_D).to(tl.float32)
    # Of a NaN the sign may be set, of another square not.
    return tl.max(tl.sum(b * b, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def _norms(
    p_q,
    p_k,
    p_norms,
    tokens,
    keys,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block's part in the largest squared norms [B, H + Hkv] of queries and keys, at first 0, written as bits."""
    i_head = tl.program_id(1)
    if i_head < HEADS:
        b = _largest_norm(p_q, tokens, i_head, HEADS, DIM, BLOCK_D, BLOCK_M)
    else:
        b = _largest_norm(p_k, keys, i_head - HEADS, HEADS // GROUPS, DIM, BLOCK_D, BLOCK_M)
    tl.atomic_max(p_norms + tl.program_id(2) * tl.num_programs(1) + i_head, b, sem="relaxed")


@triton.jit
def _cut(start, stop, first, end, BLOCK: tl.constexpr, INNER: tl.constexpr):
    """Blocks that cover [start, stop): (edge blocks on the left, start of the inner ones, their end, edge blocks).

    The inner blocks lie inside [first, end); there are none unless INNER.
    """
    left = tl.cdiv(stop - start, BLOCK)
    if INNER:
        left = tl.minimum(tl.cdiv(tl.maximum(first - start, 0), BLOCK), left)
    inner = start + left * BLOCK
    inner_end = inner
    if INNER:
        inner_end += tl.maximum(tl.minimum(end, stop) - inner, 0) // BLOCK * BLOCK
    return left, inner, inner_end, left + tl.cdiv(tl.maximum(stop - inner_end, 0), BLOCK)


@triton.jit
def _rows(i_first, tokens, HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the rows from i_first on: their queries, their head in the group, their place in [B * T * H] and a mask.

    The place comes in two parts, a 64-bit base and small offsets. Rows of one key head lie end to end.
    """
    o_row = tl.arange(0, BLOCK_M)
    o_query = (i_first + o_row) // GROUPS
    o_group = i_first + o_row - o_query * GROUPS
    first = tl.program_id(2).to(tl.int64) * tokens * HEADS
    if GROUPS == HEADS:
        base = first + i_first
        o_place = o_row
    elif GROUPS == 1:
        base = first + i_first.to(tl.int64) * HEADS + tl.program_id(1)
        o_place = o_row * HEADS
    else:
        i_query = i_first // GROUPS
        base = first + i_query * HEADS + tl.program_id(1) * GROUPS
        o_place = (o_query - i_query) * HEADS + o_group
    return o_query, o_group, base, o_place, o_query < tokens


@triton.jit
def _statistics(i_first, tokens, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the rows from i_first on lie in the statistics [B, Hkv, T * G], end to end."""
    i_head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return i_head * tokens * GROUPS + i_first + tl.arange(0, BLOCK_M)


@triton.jit
def _row_limits(p_doc_start, o_query, mask, tokens, keys, offset, window):
    """The positions of the first and the last key each query keeps."""
    o_first = o_query - window + 1
    if p_doc_start is not None:
        p_row = p_doc_start + tl.program_id(2).to(tl.int64) * tokens
        o_first = tl.maximum(o_first, tl.load(p_row + o_query, mask=mask, other=0))
    o_last = tl.minimum(o_query, keys - 1 + offset)
    return o_first, tl.where(mask, o_last, NEVER)


@triton.jit
def _load(p, base, o_place, mask, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[places, BLOCK_D] of a matrix with rows of DIM; zeros outside. `mask` None: every row is inside."""
    o_dim = tl.arange(0, BLOCK_D)
    p_block = p + base * DIM + (o_place[:, None] * DIM + o_dim[None, :])
    if mask is None:
        if DIM == BLOCK_D:
            b = tl.load(p_block)
        else:
            b = tl.load(p_block, mask=(o_dim < DIM)[None, :], other=0.0)
    else:
        if DIM == BLOCK_D:
            b = tl.load(p_block, mask=mask[:, None], other=0.0)
        else:
            b = tl.load(p_block, mask=mask[:, None] & (o_dim < DIM)[None, :], other=0.0)
    return b


@triton.jit
def _store(p, base, o_place, mask, b, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    o_dim = tl.arange(0, BLOCK_D)
    p_block = p + base * DIM + (o_place[:, None] * DIM + o_dim[None, :])
    tl.store(p_block, b.to(p.dtype.element_ty), mask=mask[:, None] & (o_dim < DIM)[None, :])


@triton.jit
def _load_keys(p, base, i_key, keys, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D, BLOCK_N, EDGE: tl.constexpr):
    """[BLOCK_N, BLOCK_D] from key i_key on; `base` is where this program's key head begins in [B * T_k * Hkv]."""
    o_key = tl.arange(0, BLOCK_N)
    first = base + i_key * KEY_HEADS
    if EDGE:
        b = _load(p, first, o_key * KEY_HEADS, o_key < keys - i_key, DIM, BLOCK_D)
    else:
        b = _load(p, first, o_key * KEY_HEADS, None, DIM, BLOCK_D)
    return b


@triton.jit
def _slopes(p_slopes, o_group, GROUPS: tl.constexpr):
    """This program's slopes for base 2: a scalar for one head, else [rows]; 0 without ALiBi."""
    if p_slopes is None:
        b = 0.0
    elif GROUPS == 1:
        b = tl.load(p_slopes + tl.program_id(1)) * LOG2_E
    else:
        b = tl.load(p_slopes + tl.program_id(1) * GROUPS + o_group) * LOG2_E
    return b


@triton.jit
def _bias(b_slope, o_query, i_at, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """slope (p - i) for keys at positions p from i_at on, in two parts: [1 or rows, keys] and [rows].

    For 16-bit inputs the first part is slope (p - i_at), the same for every block, and one operation a score. The
    cancellation between the parts costs up to slope * BLOCK_N roundings of fp32, too many for fp32 inputs.
    """
    if PRECISION == "ieee":
        o_distance = (i_at + tl.arange(0, BLOCK_N)[None, :] - o_query[:, None]).to(tl.float32)
        b_shift = tl.zeros(o_query.shape, tl.float32)
    else:
        o_distance = tl.arange(0, BLOCK_N)[None, :].to(tl.float32)
        b_shift = b_slope * (i_at - o_query).to(tl.float32)
    if GROUPS == 1:
        b_bias = b_slope * o_distance
    else:
        b_bias = b_slope[:, None] * o_distance
    return b_bias, b_shift


@triton.jit
def _attend(
    b_y,
    b_total,
    b_highest,
    b_q,
    b_slope,
    p_k,
    p_v,
    base,
    o_query,
    o_first,
    o_last,
    i_key,
    keys,
    offset,
    factor,
    KEY_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BIASED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One key block into the running (y, sum of weights, highest score)."""
    b_k = _load_keys(p_k, base, i_key, keys, KEY_HEADS, KEY_DIM, BLOCK_K, BLOCK_N, EDGE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if EDGE:
        o_at = i_key + offset + tl.arange(0, BLOCK_N)[None, :]
        b_s = tl.where((o_at >= o_first[:, None]) & (o_at <= o_last[:, None]), b_s, float("-inf"))
    if BIASED:
        b_bias, b_shift = _bias(b_slope, o_query, i_key + offset, GROUPS, BLOCK_N, PRECISION)
        b_s = b_s * factor + b_bias
        b_next = tl.maximum(b_highest, tl.max(b_s, 1) + b_shift)
    else:
        b_next = tl.maximum(b_highest, tl.max(b_s, 1) * factor)
    b_base = b_next
    if EDGE:
        b_base = tl.where(b_next == float("-inf"), 0.0, b_next)
    b_decay = tl.exp2(b_highest - b_base)
    if BIASED:
        b_p = tl.exp2(b_s - (b_base - b_shift)[:, None])
    else:
        b_p = tl.exp2(b_s * factor - b_base[:, None])
    b_v = _load_keys(p_v, base, i_key, keys, KEY_HEADS, VALUE_DIM, BLOCK_V, BLOCK_N, EDGE)
    b_y = tl.dot(b_p.to(b_v.dtype), b_v, b_y * b_decay[:, None], input_precision=PRECISION)
    return b_y, b_total * b_decay + tl.sum(b_p, 1), b_next


@triton.jit
def _forward(
    p_q,
    p_k,
    p_v,
    p_doc_start,
    p_slopes,
    p_norms,
    p_y,
    p_lse,
    tokens,
    keys,
    offset,
    window,
    factor,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """y and log-sum-exp of a block of rows; the last rows, which meet most keys, begin first."""
    KEY_HEADS: tl.constexpr = HEADS // GROUPS
    BIASED: tl.constexpr = p_slopes is not None
    i_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    i_high = tl.minimum((i_row + BLOCK_M - 1) // GROUPS, tokens - 1)
    o_query, o_group, base, o_place, mask = _rows(i_row, tokens, HEADS, GROUPS, BLOCK_M)
    reach = _reach(p_slopes, p_norms, factor, HEADS, GROUPS) if BIASED else None
    start, stop, first, end = _row_span(p_doc_start, reach, i_row // GROUPS, i_high, tokens, keys, offset, window)
    left, inner, inner_end, edges = _cut(start, stop, first, end, BLOCK_N, INNER)
    o_first, o_last = _row_limits(p_doc_start, o_query, mask, tokens, keys, offset, window)
    key_base = tl.program_id(2).to(tl.int64) * keys * KEY_HEADS + tl.program_id(1)
    b_slope = _slopes(p_slopes, o_group, GROUPS)
    b_q = _load(p_q, base, o_place, mask, KEY_DIM, BLOCK_K)
    b_y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_highest = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    if INNER:
        for i_key in range(inner, inner_end, BLOCK_N):
            b_y, b_total, b_highest = _attend(
                b_y, b_total, b_highest, b_q, b_slope, p_k, p_v, key_base, o_query, o_first, o_last, i_key, keys,
                offset, factor, KEY_HEADS, GROUPS, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, BLOCK_N, PRECISION, BIASED,
                False
            )  # fmt: skip
    for i in range(0, edges):
        i_key = tl.where(i < left, start + i * BLOCK_N, inner_end + (i - left) * BLOCK_N)
        b_y, b_total, b_highest = _attend(
            b_y, b_total, b_highest, b_q, b_slope, p_k, p_v, key_base, o_query, o_first, o_last, i_key, keys, offset,
            factor, KEY_HEADS, GROUPS, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, BLOCK_N, PRECISION, BIASED, True
        )  # fmt: skip
    b_none = b_total == 0
    b_y = b_y / tl.where(b_none, 1.0, b_total)[:, None]
    _store(p_y, base, o_place, mask, b_y, VALUE_DIM, BLOCK_V)
    tl.store(
        p_lse + _statistics(i_row, tokens, GROUPS, BLOCK_M),
        tl.where(b_none, float("inf"), b_highest + tl.log2(b_total)),
        mask=mask,
    )


@triton.jit
def _descend(
    b_dq,
    b_q,
    b_dy,
    b_lse,
    b_delta,
    b_slope,
    p_k,
    p_v,
    base,
    o_query,
    o_first,
    o_last,
    i_key,
    keys,
    offset,
    factor,
    KEY_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BIASED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One key block into dq: p (dy v - delta) k, unscaled."""
    b_k = _load_keys(p_k, base, i_key, keys, KEY_HEADS, KEY_DIM, BLOCK_K, BLOCK_N, EDGE)
    b_v = _load_keys(p_v, base, i_key, keys, KEY_HEADS, VALUE_DIM, BLOCK_V, BLOCK_N, EDGE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor
    b_base = b_lse
    if BIASED:
        b_bias, b_shift = _bias(b_slope, o_query, i_key + offset, GROUPS, BLOCK_N, PRECISION)
        b_s += b_bias
        b_base = b_lse - b_shift
    b_p = tl.exp2(b_s - b_base[:, None])
    if EDGE:
        o_at = i_key + offset + tl.arange(0, BLOCK_N)[None, :]
        b_p = tl.where((o_at >= o_first[:, None]) & (o_at <= o_last[:, None]), b_p, 0.0)
    b_dp = tl.dot(b_dy, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _backward_queries(
    p_dy,
    p_q,
    p_k,
    p_v,
    p_y,
    p_lse,
    p_doc_start,
    p_slopes,
    p_norms,
    p_dq,
    p_delta,
    tokens,
    keys,
    offset,
    window,
    factor,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """dq of a block of rows, and delta = sum(dy y), which the pass for dk and dv reads."""
    KEY_HEADS: tl.constexpr = HEADS // GROUPS
    BIASED: tl.constexpr = p_slopes is not None
    i_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    i_high = tl.minimum((i_row + BLOCK_M - 1) // GROUPS, tokens - 1)
    o_query, o_group, base, o_place, mask = _rows(i_row, tokens, HEADS, GROUPS, BLOCK_M)
    reach = _reach(p_slopes, p_norms, factor, HEADS, GROUPS) if BIASED else None
    start, stop, first, end = _row_span(p_doc_start, reach, i_row // GROUPS, i_high, tokens, keys, offset, window)
    left, inner, inner_end, edges = _cut(start, stop, first, end, BLOCK_N, INNER)
    o_first, o_last = _row_limits(p_doc_start, o_query, mask, tokens, keys, offset, window)
    key_base = tl.program_id(2).to(tl.int64) * keys * KEY_HEADS + tl.program_id(1)
    b_slope = _slopes(p_slopes, o_group, GROUPS)
    b_dy = _load(p_dy, base, o_place, mask, VALUE_DIM, BLOCK_V)
    b_y = _load(p_y, base, o_place, mask, VALUE_DIM, BLOCK_V)
    b_delta = tl.sum(b_dy.to(tl.float32) * b_y.to(tl.float32), 1)
    o_statistic = _statistics(i_row, tokens, GROUPS, BLOCK_M)
    tl.store(p_delta + o_statistic, b_delta, mask=mask)
    b_q = _load(p_q, base, o_place, mask, KEY_DIM, BLOCK_K)
    b_lse = tl.load(p_lse + o_statistic, mask=mask, other=float("inf"))
    b_dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if INNER:
        for i_key in range(inner, inner_end, BLOCK_N):
            b_dq = _descend(
                b_dq, b_q, b_dy, b_lse, b_delta, b_slope, p_k, p_v, key_base, o_query, o_first, o_last, i_key, keys,
                offset, factor, KEY_HEADS, GROUPS, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, BLOCK_N, PRECISION, BIASED,
                False
            )  # fmt: skip
    for i in range(0, edges):
        i_key = tl.where(i < left, start + i * BLOCK_N, inner_end + (i - left) * BLOCK_N)
        b_dq = _descend(
            b_dq, b_q, b_dy, b_lse, b_delta, b_slope, p_k, p_v, key_base, o_query, o_first, o_last, i_key, keys, offset,
            factor, KEY_HEADS, GROUPS, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, BLOCK_N, PRECISION, BIASED, True
        )  # fmt: skip
    _store(p_dq, base, o_place, mask, b_dq * scale, KEY_DIM, BLOCK_K)


@triton.jit
def _gather(
    b_dk,
    b_dv,
    b_k,
    b_v,
    o_key,
    o_until,
    p_dy,
    p_q,
    p_lse,
    p_delta,
    p_slopes,
    i_row,
    i_at,
    tokens,
    factor,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One block of rows into dk (unscaled) if DK and dv if DV; scores lie as [keys, rows]."""
    o_query, o_group, base, o_place, inside = _rows(i_row, tokens, HEADS, GROUPS, BLOCK_M)
    mask = inside if EDGE else None
    b_q = _load(p_q, base, o_place, mask, KEY_DIM, BLOCK_K)
    b_dy = _load(p_dy, base, o_place, mask, VALUE_DIM, BLOCK_V)
    o_statistic = _statistics(i_row, tokens, GROUPS, BLOCK_M)
    b_lse = tl.load(p_lse + o_statistic, mask=mask, other=float("inf") if EDGE else None)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * factor
    if p_slopes is not None:
        b_slope = _slopes(p_slopes, o_group, GROUPS)
        b_bias, b_shift = _bias(b_slope, o_query, i_at, GROUPS, BLOCK_N, PRECISION)
        b_s += tl.trans(b_bias)
        b_lse -= b_shift
    b_p = tl.exp2(b_s - b_lse[None, :])
    if EDGE:
        keep = (o_query[None, :] >= o_key[:, None]) & (o_query[None, :] < o_until[:, None])
        b_p = tl.where(keep, b_p, 0.0)
    if DV:
        b_dv = tl.dot(b_p.to(b_dy.dtype), b_dy, b_dv, input_precision=PRECISION)
    if DK:
        b_delta = tl.load(p_delta + o_statistic, mask=mask, other=0.0 if EDGE else None)
        b_dp = tl.dot(b_v, tl.trans(b_dy), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _turn(
    inner, inner_end, window, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr
):
    """Rows past the first inner one at which a walk over them begins, to go round; a multiple of BLOCK_M.

    Neighbouring key blocks share most of their rows and programs run in step. Began each at its own first row, all
    would have read more than L2 holds before a row came round again: at a window of 2,048 and 16 heads of 128 on an
    H100, 4.5 GB from DRAM, 64% of what it can. So they begin at multiples of a period, the inner rows of a whole span
    or a share of them, and read the same rows at the same time; a walk without such a multiple begins at its first.
    """
    period = tl.maximum((window - BLOCK_N + 1) * GROUPS // (PARTS * BLOCK_M) * BLOCK_M, BLOCK_M)
    turn = (period - inner % period) // BLOCK_M * BLOCK_M
    return tl.where(turn < inner_end - inner, turn, 0)


@triton.jit
def _backward_keys(
    p_dy,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_until,
    p_slopes,
    p_norms,
    p_dk,
    p_dv,
    tokens,
    keys,
    offset,
    window,
    factor,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
    TURN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dk and dv of a block of keys, over all rows that keep one of them; one alone where the other's pointer is None.

    With PARTS > 1 as so many parts, [PARTS, ...] of what dk and dv are: a program each, of as many blocks of rows, the
    last of fewer or of none, which writes zeros. Programs lie part by part.

    The key at position p is kept by queries max(p, 0) to min(until, p + window) - 1; `until` [B, T_k] is where the
    documents end that see it. TURN for a window smaller than the rows: without one the spans of key blocks differ, and
    each walk begins at its first row.
    """
    KEY_HEADS: tl.constexpr = HEADS // GROUPS
    DK: tl.constexpr = p_dk is not None
    DV: tl.constexpr = p_dv is not None
    i_block = tl.program_id(0)
    if PARTS > 1:
        blocks = tl.cdiv(keys, BLOCK_N)
        i_part = i_block // blocks
        i_block -= i_part * blocks
    i_key = i_block * BLOCK_N
    i_batch = tl.program_id(2).to(tl.int64)
    i_last = tl.minimum(i_key + BLOCK_N, keys) - 1
    o_block = tl.arange(0, BLOCK_N)
    m_key = o_block < keys - i_key
    o_key = i_key + offset + o_block
    o_until = o_key + window
    stop, end = i_last + offset + window, i_key + offset + window
    if p_until is not None:
        p_until += i_batch * keys
        o_until = tl.minimum(o_until, tl.load(p_until + i_key + o_block, mask=m_key, other=0))
        stop = tl.minimum(stop, tl.load(p_until + i_last))
        end = tl.minimum(end, tl.load(p_until + i_key))
    if p_slopes is not None:
        # To queries beyond all keys the last one is nearest: as far away as it is, they keep what it reaches.
        i_far = i_last + _reach(p_slopes, p_norms, factor, HEADS, GROUPS)
        stop = tl.where(i_far < keys - 1, tl.minimum(stop, i_far + offset + 1), stop)
    stop = tl.minimum(stop, tokens)
    start = tl.minimum(tl.maximum(i_key + offset, 0), stop)
    # Even rows at which blocks begin let the statistics be loaded by pairs.
    i_first, i_stop = start * GROUPS // 16 * 16, stop * GROUPS
    if PARTS > 1:
        share = tl.cdiv(i_stop - i_first, PARTS * BLOCK_M) * BLOCK_M
        i_first += i_part * share
        i_stop = tl.maximum(tl.minimum(i_stop, i_first + share), i_first)
    left, inner, inner_end, edges = _cut(
        i_first, i_stop, tl.maximum(i_last + offset, 0) * GROUPS, end * GROUPS, BLOCK_M, INNER
    )
    base = (i_batch * keys + i_key) * KEY_HEADS + tl.program_id(1)
    o_place = o_block * KEY_HEADS
    b_k = _load(p_k, base, o_place, m_key, KEY_DIM, BLOCK_K)
    b_v = _load(p_v, base, o_place, m_key, VALUE_DIM, BLOCK_V) if DK else None
    b_dk = tl.zeros([BLOCK_N, BLOCK_K if DK else 1], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V if DV else 1], tl.float32)
    for i in range(0, edges):
        i_row = tl.where(i < left, i_first + i * BLOCK_M, inner_end + (i - left) * BLOCK_M)
        b_dk, b_dv = _gather(
            b_dk, b_dv, b_k, b_v, o_key, o_until, p_dy, p_q, p_lse, p_delta, p_slopes, i_row, i_key + offset, tokens,
            factor, HEADS, GROUPS, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION, DK, DV, True
        )  # fmt: skip
    if INNER:
        turn = _turn(inner, inner_end, window, GROUPS, BLOCK_M, BLOCK_N, PARTS) if TURN else 0
        for i in range(inner + turn, inner_end + turn, BLOCK_M):
            i_row = tl.where(i < inner_end, i, i - (inner_end - inner)) if TURN else i
            b_dk, b_dv = _gather(
                b_dk, b_dv, b_k, b_v, o_key, o_until, p_dy, p_q, p_lse, p_delta, p_slopes, i_row, i_key + offset,
                tokens, factor, HEADS, GROUPS, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION, DK,
                DV, False
            )  # fmt: skip
    if PARTS > 1:
        base += tl.num_programs(2).to(tl.int64) * i_part * keys * KEY_HEADS
    if DK:
        _store(p_dk, base, o_place, m_key, b_dk * scale, KEY_DIM, BLOCK_K)
    if DV:
        _store(p_dv, base, o_place, m_key, b_dv, VALUE_DIM, BLOCK_V)


def forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], base-2 log-sum-exp of the scores [B, Hkv, T * G]); see op.py."""
    q, k, v = _packed(q, k, v)
    scoring = _packed_rules(scoring)
    with _on(q):
        norms = largest_norms(q, k, scoring)
        if covers(q, k, v, scoring):
            from . import hopper

            log_choice("attention forward", "cuda", q.dtype, "auto or triton", "hopper")
            return hopper.forward(q, k, v, norms, scoring)
        y = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(statistics_shape(q, k), dtype=torch.float32)
        _launch("forward", _forward, (q, k, v, scoring.doc_start, scoring.slopes, norms, y, lse), q, k, v, scoring)
    return y, lse


def covers(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether hopper.py's kernel computes the forward pass of these contiguous tensors.

    It does on an NVIDIA GPU of capability 9.0, with one of GLUON_RELEASES, for heads of HOPPER_DIMS in 16 bits, from
    LEAST_TOKENS queries on, where the last key is the last query's own and a window is not NARROW. TMA takes keys and
    values from addresses of 16 bytes.
    """
    square = LEAST_TOKENS <= q.shape[1] == k.shape[1] + scoring.key_offset
    wide = scoring.window is None or scoring.window > NARROW
    heads = q.shape[3] == v.shape[3] and q.shape[3] in HOPPER_DIMS and q.dtype in (torch.bfloat16, torch.float16)
    if not (q.is_cuda and square and wide and heads and _is_hopper(q.device.index)):
        return False
    return k.data_ptr() % 16 == 0 == v.data_ptr() % 16


@functools.cache
def _is_hopper(device: int) -> bool:
    known = triton.__version__.rpartition(".")[0] in GLUON_RELEASES and not knobs.runtime.interpret
    return known and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); the scores are computed once more for each pass."""
    dy, q, k, v = _packed(dy, q, k, v)
    scoring = _packed_rules(scoring)
    with _on(q):
        norms = largest_norms(q, k, scoring)
        dq, delta = backward_queries(dy, q, k, v, y, lse, norms, scoring)
        return dq, *backward_keys(dy, q, k, v, lse, delta, norms, scoring)


def backward_queries(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, norms: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """(dq, delta [B, Hkv, T * G]) of contiguous inputs."""
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    tensors = (dy, q, k, v, y, lse, scoring.doc_start, scoring.slopes, norms, dq, delta)
    _launch("dq", _backward_queries, tensors, q, k, v, scoring, scoring.scale)
    return dq, delta


def backward_keys(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, norms: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """(dk, dv) of contiguous inputs: in one pass, or for heads wider than MOST_SHARED in one each."""
    tensors = (dy, q, k, v, lse, delta, _until(k, scoring), scoring.slopes, norms)
    turn = scoring.window is not None and scoring.window < q.shape[1]
    both = max(q.shape[3], v.shape[3]) <= MOST_SHARED
    parts = _parts("dkv" if both else "dk", q, k, v, scoring)
    lead, dtype = ((parts,), torch.float32) if parts > 1 else ((), k.dtype)

    def run(work: str, *of: Tensor | None) -> list[Tensor]:
        """The gradients of those of k and v that are given."""
        out = [None if t is None else t.new_empty((*lead, *t.shape), dtype=dtype) for t in of]
        _launch(work, _backward_keys, (*tensors, *out), q, k, v, scoring, scoring.scale, TURN=turn, PARTS=parts)
        return [sum_partials(t, k.dtype) if parts > 1 else t for t in out if t is not None]

    if both:
        dk, dv = run("dkv", k, v)
    else:
        [dv], [dk] = run("dv", None, v), run("dk", k, None)
    return dk, dv


def _parts(work: str, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> int:
    """How many programs share the rows of a key block in a pass."""
    (batch, tokens, heads, _), (_, keys, key_heads, _) = q.shape, k.shape
    tile = _tile(work, q, k, v, scoring)
    # A multiprocessor has room for one program of 8 warps, or two of 4.
    at_once = processors(q) * max(1, 8 // tile.warps)
    window, groups = scoring.most_keys(tokens), heads // key_heads
    return parts_of(tile, at_once, batch * key_heads, tokens, keys, scoring.key_offset, window, groups)


@functools.cache
def parts_of(
    tile: Tile, at_once: int, copies: int, tokens: int, keys: int, key_offset: int, window: int, groups: int
) -> int:
    """How many programs share the rows of a key block: as few as are done within a tenth of the soonest.

    Plays the launch through: programs in their order, `at_once` of them at a time, each as long as its walk.

    Args:
        copies: batch rows times key heads.
        window: the most keys a query keeps; of documents and ALiBi, which keep fewer, nothing is known here.
    """
    walks = []
    for key in range(key_offset, keys + key_offset, tile.keys):
        last = min(key + tile.keys, keys + key_offset) - 1
        walks.append(cdiv(max(0, min(last + window, tokens) - max(key, 0)) * groups, tile.rows))
    if len(walks) * copies > MOST_ROUNDS * at_once:
        return 1

    def finish(parts: int) -> float:
        ends = [0.0] * at_once
        for walk in walks * (parts * copies):
            heapq.heapreplace(ends, ends[0] + cdiv(walk, parts) + (PART_COST if parts > 1 else 0))
        return max(ends) + (SUM_COST if parts > 1 else 0)

    times = {parts: finish(parts) for parts in PARTS}
    return min(parts for parts, time in times.items() if time <= 1.1 * min(times.values()))


def _launch(
    work: str,
    kernel: Any,
    tensors: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    *last,
    **constants,
) -> None:
    """Runs a pass: programs for each block of its rows ("forward", "dq") or keys, key head and batch row."""
    batch, tokens, heads, _ = q.shape
    groups = heads // k.shape[2]
    window = scoring.most_keys(tokens)
    tile = _tile(work, q, k, v, scoring)
    by_rows = work in ("forward", "dq")
    blocks = cdiv(tokens * groups, tile.rows) if by_rows else cdiv(k.shape[1], tile.keys) * constants["PARTS"]
    kernel[blocks, k.shape[2], batch](
        *tensors,
        tokens,
        k.shape[1],
        scoring.key_offset,
        window,
        scoring.scale * rules.LOG2_E,
        *last,
        HEADS=heads,
        GROUPS=groups,
        KEY_DIM=q.shape[3],
        VALUE_DIM=v.shape[3],
        BLOCK_K=_padded(q),
        BLOCK_V=_padded(v),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        INNER=window > NARROW,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _tile(work: str, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tile:
    groups, window = q.shape[2] // k.shape[2], scoring.most_keys(q.shape[1])
    return tile_of(work, q.dtype, max(_padded(q), _padded(v)), groups, window)


def _padded(tensor: Tensor) -> int:
    """The head dim as blocks have it."""
    return max(16, next_power_of_2(tensor.shape[3]))


def largest_norms(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor | None:
    """fp32 [B, H + Hkv]: the largest |q|^2 of each head and the largest |k|^2; None without ALiBi."""
    if scoring.slopes is None:
        return None
    (batch, tokens, heads, dim), key_heads = q.shape, k.shape[2]
    norms = q.new_zeros(batch, heads + key_heads, dtype=torch.float32)
    block_d = _padded(q)
    block_m = NORMS_BLOCK // block_d
    _norms[cdiv(max(tokens, k.shape[1]), block_m), heads + key_heads, batch](
        q,
        k,
        norms.view(torch.int32),
        tokens,
        k.shape[1],
        HEADS=heads,
        GROUPS=heads // key_heads,
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        num_warps=8,
    )
    return norms


def _until(k: Tensor, scoring: Scoring) -> Tensor | None:
    """int32 [B, T_k]: the number of leading queries whose document begins at or before each key."""
    doc_start, offset = scoring.doc_start, scoring.key_offset
    if doc_start is None:
        return None
    positions = torch.arange(offset, k.shape[1] + offset, dtype=torch.int32, device=k.device)
    positions = positions.expand(k.shape[0], -1).contiguous()
    return torch.searchsorted(doc_start, positions, right=True, out_int32=True)


def _packed(*tensors: Tensor) -> list[Tensor]:
    """The tensors laid out contiguously, as the kernels address them."""
    return [t.contiguous() for t in tensors]


def _packed_rules(scoring: Scoring) -> Scoring:
    """Likewise its tensors, the slopes in fp32."""
    start, slopes = scoring.doc_start, scoring.slopes
    return scoring._replace(
        doc_start=None if start is None else start.contiguous(),
        slopes=None if slopes is None else slopes.float().contiguous(),
    )


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's GPU; nothing to do for the interpreter, which cannot compute in bf16."""
    if tensor.dtype == torch.bfloat16 and not tensor.is_cuda:
        raise ValueError("attention: Triton's interpreter computes bfloat16 products wrongly; use float16 or float32")
    return on(tensor)

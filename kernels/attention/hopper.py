"""Attention's forward pass for Hopper GPUs in Gluon, for 16-bit inputs; see kernel.py, whose `covers` says when.

A program has two warp groups that compute, 64 rows each, and a warp that loads for both. The loader brings blocks of K
and V by TMA into a ring each: `full` barriers tell of bytes that came, `empty` ones that both groups are done with a
block. A group multiplies its rows with key block s while its product of block s - 1 with V runs, and makes the softmax
of block s beside the latter (FlashAttention 3, arXiv 2407.08608). The groups take turns to issue their products, so
that the softmax of one meets the products of the other.

Rows, spans, edge blocks and the reach of ALiBi are kernel.py's. Here the edge blocks come first: the first block is
peeled off the loops and masked whatever it is. Spans are in positions of keys, which below 0 are a halo's.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..sizes import cdiv
from . import scoring as rules
from .scoring import Scoring, statistics_shape

LOG2_E, NEGLIGIBLE = gl.constexpr(rules.LOG2_E), gl.constexpr(rules.NEGLIGIBLE)
EVERYWHERE, NEVER = gl.constexpr(rules.EVERYWHERE), gl.constexpr(rules.NEVER)
# Groups that compute; the turns are written for two. A third leaves each too few registers: y, a block's scores and
# another's weights fill those of two, and some scalars spill, most with ALiBi over groups of heads.
CONSUMERS = gl.constexpr(2)
# Of a group, as many as a wgmma takes; and of a program. Programs that take several tiles in turn gain nothing.
ROWS = gl.constexpr(64)
BLOCK_M = gl.constexpr(128)
# Keys of a block by head dim, and blocks in each ring: the fastest of those tried by hand on an H100.
KEYS = {64: 128, 128: 128, 256: 64}
STAGES = gl.constexpr(2)
# Of the blocks of K and V: one batch row, tokens, a head's numbers.
RING = gl.NVMMASharedLayout(128, 16, 3)


@gluon.jit
def _reach(p_slopes, p_norms, factor, i_head, i_batch, HEADS: gl.constexpr, GROUPS: gl.constexpr):
    """As kernel.py's, where it is explained."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_head = i_head * GROUPS + gl.arange(0, triton.next_power_of_2(GROUPS), LAYOUT) % GROUPS
    p_row = p_norms + i_batch * (HEADS + HEADS // GROUPS)
    b_q = gl.sqrt(gl.load(p_row + o_head))
    b_k = gl.sqrt(gl.load(p_row + HEADS + i_head))
    b_slope = gl.load(p_slopes + o_head) * LOG2_E
    b_far = (2 * factor * b_q * b_k + NEGLIGIBLE) / b_slope
    b_far = gl.where((b_slope > 0) & (b_far < EVERYWHERE), gl.ceil(b_far), EVERYWHERE)
    return gl.max(b_far, 0).to(gl.int32)


@gluon.jit
def _cut(p_doc_start, reach, i_block, i_batch, tokens, offset, window, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr):
    """(start, left, inner, inner end, edges, blocks) of the keys that BLOCK_M rows from i_block on meet; never none."""
    i_low = i_block // GROUPS
    i_high = gl.minimum((i_block + BLOCK_M - 1) // GROUPS, tokens - 1)
    low, first = i_low - window + 1, i_high - window + 1
    if p_doc_start is not None:
        p_row = p_doc_start + i_batch.to(gl.int64) * tokens
        low = gl.maximum(low, gl.load(p_row + i_low))
        first = gl.maximum(first, gl.load(p_row + i_high))
    if reach is not None:
        low = gl.maximum(low, i_low - reach)
    start, stop, end = gl.maximum(low, offset), i_high + 1, i_low + 1
    left = gl.minimum(gl.cdiv(gl.maximum(first - start, 0), BLOCK_N), gl.cdiv(stop - start, BLOCK_N))
    inner = start + left * BLOCK_N
    inner_end = inner + gl.maximum(end - inner, 0) // BLOCK_N * BLOCK_N
    edges = left + gl.cdiv(gl.maximum(stop - inner_end, 0), BLOCK_N)
    return start, left, inner, inner_end, edges, edges + (inner_end - inner) // BLOCK_N


@gluon.jit
def _load_keys(k_desc, v_desc, rings, span, offset, DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """The loader: K and V of every block in turn; zeros beyond the last key of the batch row."""
    _, k_ring, v_ring, k_full, k_empty, v_full, v_empty, _ = rings
    start, left, inner, inner_end, edges, blocks = span
    i_batch, column = gl.program_id(2), gl.program_id(1) * DIM
    for s in range(0, blocks):
        i_edge = gl.where(s < left, start + s * BLOCK_N, inner_end + (s - left) * BLOCK_N)
        i_key = gl.where(s < edges, i_edge, inner + (s - edges) * BLOCK_N) - offset
        stage = s % STAGES
        # On a fresh barrier a wait for the odd phase passes.
        phase = ((s // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), BLOCK_N * DIM * 2)
        tma.async_copy_global_to_shared(k_desc, [i_batch, i_key, column], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), BLOCK_N * DIM * 2)
        tma.async_copy_global_to_shared(v_desc, [i_batch, i_key, column], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _rows(i_first, tokens, HEADS: gl.constexpr, GROUPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Of ROWS rows from i_first on: queries, heads in the group, places in [B * T * H] in two parts and a mask."""
    o_row = i_first + gl.arange(0, ROWS, LAYOUT)
    o_query = o_row // GROUPS
    o_group = o_row - o_query * GROUPS
    i_query = i_first // GROUPS
    base = (gl.program_id(2).to(gl.int64) * tokens + i_query) * HEADS + gl.program_id(1) * GROUPS
    return o_query, o_group, base, (o_query - i_query) * HEADS + o_group, o_query < tokens


@gluon.jit
def _places(
    i_first, tokens, HEADS: gl.constexpr, GROUPS: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Where the numbers of ROWS rows from i_first on lie in [B * T * H * DIM], in two parts, and a mask."""
    _, _, base, o_place, inside = _rows(i_first, tokens, HEADS, GROUPS, gl.SliceLayout(1, LAYOUT))
    o_dim = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    return base * DIM, o_place[:, None] * DIM + o_dim[None, :], inside[:, None]


@gluon.jit
def _scores(q, k_ring, k_full, s, DIM: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Begins the product of the rows with key block s."""
    stage = s % STAGES
    mbarrier.wait(k_full.index(stage), (s // STAGES) & 1)
    b_k = k_ring.index(stage).reshape((BLOCK_N, DIM)).permute((1, 0))
    return warpgroup_mma(q, b_k, gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def _weigh(
    b_s, b_total, b_highest, rows, i_at, factor, BIASED: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr, EDGE: gl.constexpr
):  # fmt: skip
    """(weights, decay of the earlier ones, sum of weights, highest score) with the keys from position i_at on.

    A thread has two keys of every eight. The bias is that of a key's eight, which takes a register each, and that of
    its place among them, which goes into the row's base: a register for each of its keys would not be left.
    """
    b_slope, o_query, o_first, o_last = rows
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    if EDGE:
        o_at = (i_at + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)))[None, :]
        b_s = gl.where((o_at >= o_first[:, None]) & (o_at <= o_last[:, None]), b_s, float("-inf"))
    if BIASED:
        b_e = gl.reshape(b_s, [ROWS, BLOCK_N // 8, 8])
        WIDE: gl.constexpr = b_e.type.layout
        PAIR: gl.constexpr = gl.SliceLayout(1, WIDE)
        o_eight = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, WIDE))).to(gl.float32) * 8
        o_place = gl.arange(0, 8, gl.SliceLayout(0, PAIR)).to(gl.float32)
        b_shift = b_slope * (i_at - o_query).to(gl.float32)
        if GROUPS == 1:
            b_e = b_e * factor + (b_slope * o_eight)[None, :, None]
            b_place = (b_slope * o_place)[None, :]
        else:
            b_steep = gl.convert_layout(b_slope, gl.SliceLayout(1, gl.SliceLayout(2, WIDE)))
            b_e = b_e * factor + b_steep[:, None, None] * o_eight[None, :, None]
            b_place = gl.convert_layout(b_slope, gl.SliceLayout(1, PAIR))[:, None] * o_place[None, :]
        b_most = gl.convert_layout(gl.max(gl.max(b_e, 1) + b_place, 1), ROW)
        b_next = gl.maximum(b_highest, b_most + b_shift)
    else:
        b_next = gl.maximum(b_highest, gl.max(b_s, 1) * factor)
    b_base = b_next
    if EDGE:
        b_base = gl.where(b_next == float("-inf"), 0.0, b_next)
    b_decay = gl.exp2(b_highest - b_base)
    if BIASED:
        b_under = b_place - gl.convert_layout(b_base - b_shift, gl.SliceLayout(1, PAIR))[:, None]
        b_w = gl.convert_layout(gl.reshape(gl.exp2(b_e + b_under[:, None, :]), [ROWS, BLOCK_N]), LAYOUT)
    else:
        b_w = gl.exp2(b_s * factor - b_base[:, None])
    return b_w, b_decay, b_total * b_decay + gl.sum(b_w, 1), b_next


@gluon.jit
def _rounded(b_w, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """The weights as a factor of the product with V.

    Rounded after the loop's turn: where a loop carries 16-bit operands, triton 3.6 swaps the halves of registers.
    """
    return gl.convert_layout(b_w.to(dtype), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def _attend(
    s, i_at, b_y, b_w, b_total, b_highest, rings, rows, factor, BIASED: gl.constexpr, GROUPS: gl.constexpr,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr, S_LAYOUT: gl.constexpr, Y_LAYOUT: gl.constexpr, WHO: gl.constexpr,
    EDGE: gl.constexpr
):  # fmt: skip
    """Block s - 1 into y, and the weights of block s, whose keys begin at position i_at."""
    q_all, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns = rings
    before, phase = (s - 1) % STAGES, ((s - 1) // STAGES) & 1
    b_p = _rounded(b_w, v_ring.dtype, Y_LAYOUT)
    # The first group's first wait passes; every other one is for the other group.
    mbarrier.wait(turns.index(WHO), ((s - 1) & 1) ^ (1 - WHO))
    b_s = _scores(q_all.index(WHO), k_ring, k_full, s, DIM, BLOCK_N, S_LAYOUT)
    mbarrier.wait(v_full.index(before), phase)
    b_y = warpgroup_mma(b_p, v_ring.index(before).reshape((BLOCK_N, DIM)), b_y, is_async=True)
    mbarrier.arrive(turns.index(1 - WHO), count=1)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    mbarrier.arrive(k_empty.index(s % STAGES), count=1)
    b_w, b_decay, b_total, b_highest = _weigh(
        b_s, b_total, b_highest, rows, i_at, factor, BIASED, GROUPS, BLOCK_N, S_LAYOUT, EDGE
    )  # fmt: skip
    # Passes at once: a branch that ptxas does not move the wait below over, to before the exponentials.
    mbarrier.wait(v_full.index(before), phase)
    b_y, _ = warpgroup_mma_wait(0, deps=[b_y, b_p])
    mbarrier.arrive(v_empty.index(before), count=1)
    b_y = b_y * gl.convert_layout(b_decay, gl.SliceLayout(1, Y_LAYOUT))[:, None]
    return b_y, b_w, b_total, b_highest


@gluon.jit
def _consume(
    rings, tensors, span, i_block, tokens, window, factor, WHO: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """A warp group: y and log-sum-exp of its ROWS of the program's rows."""
    q_all, k_ring, v_ring, k_full, k_empty, v_full, v_empty, _ = rings
    p_q, p_y, p_lse, p_doc_start, p_slopes = tensors
    start, left, inner, inner_end, edges, blocks = span
    BIASED: gl.constexpr = p_slopes is not None
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    Y_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    i_row = i_block + WHO * ROWS
    i_head = gl.program_id(1)
    # q by way of registers, which suits any group; 16 bytes a thread.
    base, o_wide, inside = _places(i_row, tokens, HEADS, GROUPS, DIM, WIDE)
    q = q_all.index(WHO)
    q.store(gl.load(p_q + base + o_wide, mask=inside, other=0.0))
    fence_async_shared()
    o_query, o_group, _, _, mask = _rows(i_row, tokens, HEADS, GROUPS, ROW)
    o_first = o_query - window + 1
    if p_doc_start is not None:
        p_row = p_doc_start + gl.program_id(2).to(gl.int64) * tokens
        o_first = gl.maximum(o_first, gl.load(p_row + o_query, mask=mask, other=0))
    b_slope = 0.0
    if BIASED:
        if GROUPS == 1:
            b_slope = gl.load(p_slopes + i_head) * LOG2_E
        else:
            b_slope = gl.load(p_slopes + i_head * GROUPS + o_group) * LOG2_E
    rows = (b_slope, o_query, o_first, gl.where(mask, o_query, NEVER))
    b_total = gl.zeros([ROWS], gl.float32, ROW)
    b_highest = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    b_y = gl.zeros([ROWS, DIM], gl.float32, Y_LAYOUT)
    b_s = warpgroup_mma_wait(0, deps=[_scores(q, k_ring, k_full, 0, DIM, BLOCK_N, S_LAYOUT)])
    mbarrier.arrive(k_empty.index(0), count=1)
    i_at = gl.where(edges == 0, inner, gl.where(left == 0, inner_end, start))
    b_w, _, b_total, b_highest = _weigh(
        b_s, b_total, b_highest, rows, i_at, factor, BIASED, GROUPS, BLOCK_N, S_LAYOUT, True
    )  # fmt: skip
    for s in range(1, edges):
        i_at = gl.where(s < left, start + s * BLOCK_N, inner_end + (s - left) * BLOCK_N)
        b_y, b_w, b_total, b_highest = _attend(
            s, i_at, b_y, b_w, b_total, b_highest, rings, rows, factor, BIASED, GROUPS, DIM, BLOCK_N, S_LAYOUT,
            Y_LAYOUT, WHO, True
        )  # fmt: skip
    for s in range(gl.maximum(edges, 1), blocks):
        i_at = inner + (s - edges) * BLOCK_N
        b_y, b_w, b_total, b_highest = _attend(
            s, i_at, b_y, b_w, b_total, b_highest, rings, rows, factor, BIASED, GROUPS, DIM, BLOCK_N, S_LAYOUT,
            Y_LAYOUT, WHO, False
        )  # fmt: skip
    last = blocks - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    b_p = _rounded(b_w, v_ring.dtype, Y_LAYOUT)
    b_y = warpgroup_mma(b_p, v_ring.index(last % STAGES).reshape((BLOCK_N, DIM)), b_y, is_async=True)
    b_y, _ = warpgroup_mma_wait(0, deps=[b_y, b_p])
    b_none = b_total == 0
    b_inverse = 1.0 / gl.where(b_none, 1.0, b_total)
    b_y = b_y * gl.convert_layout(b_inverse, gl.SliceLayout(1, Y_LAYOUT))[:, None]
    # y in q's place, so that stores are 16 bytes wide; places anew, or they would take registers through the loops.
    q.store(b_y.to(p_y.dtype.element_ty))
    # There always are blocks: this only hides from the compiler that the places are those of q.
    base, o_wide, inside = _places(gl.where(blocks > 0, i_row, 0), tokens, HEADS, GROUPS, DIM, WIDE)
    gl.store(p_y + base + o_wide, q.load(WIDE), mask=inside)
    p_statistic = p_lse + (gl.program_id(2).to(gl.int64) * (HEADS // GROUPS) + i_head) * tokens * GROUPS
    o_statistic = i_row + gl.arange(0, ROWS, ROW)
    gl.store(p_statistic + o_statistic, gl.where(b_none, float("inf"), b_highest + gl.log2(b_total)), mask=mask)


@gluon.jit(do_not_specialize=["tokens", "offset", "window"])
def _forward_by_groups(
    p_q,
    k_desc,
    v_desc,
    p_doc_start,
    p_slopes,
    p_norms,
    p_y,
    p_lse,
    tokens,
    offset,
    window,
    factor,
    HEADS: gl.constexpr,
    GROUPS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """y and log-sum-exp of BLOCK_M rows of a key head; the last rows, which meet most keys, begin first."""
    i_block = (gl.num_programs(0) - 1 - gl.program_id(0)) * BLOCK_M
    i_head, i_batch = gl.program_id(1), gl.program_id(2)
    reach = None
    if p_slopes is not None:
        reach = _reach(p_slopes, p_norms, factor, i_head, i_batch, HEADS, GROUPS)
    span = _cut(p_doc_start, reach, i_block, i_batch, tokens, offset, window, GROUPS, BLOCK_N)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_all = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, ROWS, DIM], Q_LAYOUT)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, DIM], k_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    rings = (q_all, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns)
    tensors = (p_q, p_y, p_lse, p_doc_start, p_slopes)
    gl.warp_specialize(
        [
            (_consume, (rings, tensors, span, i_block, tokens, window, factor, 0, HEADS, GROUPS, DIM, BLOCK_N)),
            (_consume, (rings, tensors, span, i_block, tokens, window, factor, 1, HEADS, GROUPS, DIM, BLOCK_N)),
            (_load_keys, (k_desc, v_desc, rings, span, offset, DIM, BLOCK_N)),
        ],
        [4, 1],
        [240, 24],
    )


def forward(q: Tensor, k: Tensor, v: Tensor, norms: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """As kernel.forward, of contiguous inputs that kernel.covers."""
    batch, tokens, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    y = torch.empty_like(q)
    lse = q.new_empty(statistics_shape(q, k), dtype=torch.float32)
    # Batch rows are a dimension of their own: beyond the end of one there are zeros, not the next one's keys.
    shape, strides = [batch, keys, key_heads * dim], [keys * key_heads * dim, key_heads * dim, 1]
    block = [1, KEYS[dim], dim]
    _forward_by_groups[cdiv(tokens * heads // key_heads, BLOCK_M.value), key_heads, batch](
        q,
        *(TensorDescriptor(t, shape, strides, block, RING) for t in (k, v)),
        scoring.doc_start,
        scoring.slopes,
        norms,
        y,
        lse,
        tokens,
        scoring.key_offset,
        scoring.most_keys(tokens),
        scoring.scale * rules.LOG2_E,
        HEADS=heads,
        GROUPS=heads // key_heads,
        DIM=dim,
        BLOCK_N=KEYS[dim],
        num_warps=4,
    )
    return y, lse

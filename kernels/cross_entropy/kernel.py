"""Softmax statistics and cross-entropy gradients of a block of logits in Triton, in place.

A row of at most WHOLE bytes is read once and kept in registers, by programs that stay and fetch their next rows into
shared memory while they work on one. A longer one is read twice, the second time from L2 where it is still there, by a
program of its own. Where rows begin at multiples of 16 bytes so much is moved at a time, whatever the number of
columns: what lies between a row's last and the next multiple is read, counts for nothing, and becomes anything where
the gradient is written. Every sum has one fixed order, so bits repeat. The maths is in reference.py.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on, processors
from ..sizes import cdiv, next_power_of_2
from .reference import Pieces

LOG2_E = tl.constexpr(1.4426950408889634)

# The bytes of a row that is kept whole (a soft cap, which keeps two values a logit, takes a quarter), the values a
# thread keeps of it, and how many rows a program has in hand: this one and those on their way.
WHOLE, VALUES, STAGES = 65536, 64, 3
# Warps of a processor that works on whole rows: so many leave each thread 128 registers.
PROCESSOR_WARPS = 16
# Columns a step of a longer row and its warps: for its sums, and where its gradient follows. One program of so many
# warps fills a processor, and of so few rows at a time L2 keeps more: the gradient of 128,256 columns then takes 1.41
# times a copy on an H100, by 8,192 columns and 8 warps 1.74.
SUMS, SUMS_WARPS = 4096, 4
BLOCK, WARPS = 32768, 32
# Columns of a program where a row has no sums.
PART, PART_WARPS = 2048, 4


@triton.jit
def _row(p_logits, i_row, stride, LANES: tl.constexpr):
    """Where a row begins; the division tells Triton that it is a multiple of LANES, which is 1 where it may not be."""
    return p_logits + tl.cast(i_row, tl.int64) * (stride // LANES * LANES)


@triton.jit
def _readable(columns, LANES: tl.constexpr):
    """The end of a row's last LANES columns."""
    return tl.cdiv(columns, LANES) * LANES


@triton.jit
def _scores(p_row, o_column, readable, mask, other, cap, CAPPED: tl.constexpr):
    """The row's logits at these columns, if readable, in fp32, soft-capped; `other` outside the mask."""
    b = tl.load(p_row + o_column, mask=readable, other=0.0).to(tl.float32)
    if CAPPED:
        # tanh through exp, which the interpreter has too; exact at both ends.
        b = cap * (1.0 - 2.0 / (tl.exp(2.0 / cap * b) + 1.0))
    return tl.where(mask, b, other)


@triton.jit
def _target(p_row, i_label, columns, cap, CAPPED: tl.constexpr):
    """The label's logit, 0 where the label is none of the columns."""
    inside = (i_label >= 0) & (i_label < columns)
    return _scores(p_row, i_label, inside, inside, 0.0, cap, CAPPED)


@triton.jit
def _row_statistics(p_row, i_label, columns, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(highest, total, target, spread) of one row."""
    end = _readable(columns, LANES)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    spread = tl.full([], 0.0, tl.float32)
    for i in range(0, columns, BLOCK):
        o_column = i + tl.arange(0, BLOCK)
        mask = o_column < columns
        b = _scores(p_row, o_column, o_column < end, mask, float("-inf"), cap, CAPPED)
        higher = tl.maximum(highest, tl.max(b, 0))
        b_weight = tl.exp2(b * LOG2_E - higher * LOG2_E)
        total = total * tl.exp2((highest - higher) * LOG2_E) + tl.sum(b_weight, 0)
        spread += tl.sum(tl.where(mask, b, 0.0), 0)
        highest = higher
    return highest, total, _target(p_row, i_label, columns, cap, CAPPED), spread


@triton.jit
def _columns(columns, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(o_column, whether readable, mask) of a whole row as [BLOCK / LANES, LANES]: one test for so many to read."""
    o_group = tl.arange(0, BLOCK // LANES)[:, None]
    o_column = o_group * LANES + tl.arange(0, LANES)[None, :]
    readable = o_group < tl.cdiv(columns, LANES)
    return o_column, readable, readable if columns % LANES == 0 else o_column < columns


@triton.jit
def _label_alone(i_label, value, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The value at the label of a whole row as [BLOCK / LANES, LANES], elsewhere 0.

    As the product of a vector of groups and one of lanes, which a gradient adds in one instruction a logit where a
    comparison with the label takes three.
    """
    # 32 bits, which a label of another slice or an ignored one may not fit.
    i_label = tl.where((i_label >= 0) & (i_label < BLOCK), i_label, -1).to(tl.int32)
    b_group = (tl.arange(0, BLOCK // LANES) == i_label // LANES).to(tl.float32)
    b_lane = tl.where(tl.arange(0, LANES) == i_label % LANES, value, 0.0)
    return b_group[:, None] * b_lane[None, :]


@triton.jit
def _whole_row(p_row, i_label, o_column, readable, mask, columns, cap, CAPPED: tl.constexpr):
    """(scores, 0 outside the row, exp(scores - highest), and highest, total, target, spread) of a row read once."""
    b = _scores(p_row, o_column, readable, mask, 0.0, cap, CAPPED)
    target = _target(p_row, i_label, columns, cap, CAPPED)
    highest = tl.max(tl.max(tl.where(mask, b, float("-inf")), 1), 0)
    b_weight = tl.where(mask, tl.exp2(b * LOG2_E - highest * LOG2_E), 0.0)
    return b, b_weight, highest, tl.sum(tl.sum(b_weight, 1), 0), target, tl.sum(tl.sum(b, 1), 0)


@triton.jit
def _score_gradient(b, b_weight, b_by_target, by_total, by_spread, cap, CAPPED: tl.constexpr):
    """The gradient of the logits whose capped scores are b, and b_weight = exp(b - highest).

    `b_by_target` is 0 but for the label's logit; `by_spread` is None without label smoothing.
    """
    b_grad = b_weight * by_total + b_by_target
    if by_spread is not None:
        b_grad += by_spread
    if CAPPED:
        b_grad *= 1.0 - (b / cap) * (b / cap)
    return b_grad


@triton.jit
def _row_gradient(
    p_row,
    i_label,
    start,
    columns,
    highest,
    by_total,
    by_target,
    by_spread,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Overwrites BLOCK logits of a row from `start` on by their gradient."""
    o_column = start + tl.arange(0, BLOCK)
    readable = o_column < _readable(columns, LANES)
    b = _scores(p_row, o_column, readable, readable, 0.0, cap, CAPPED)
    b_weight = tl.exp2(b * LOG2_E - highest * LOG2_E)
    b_by_target = tl.where(o_column == i_label, by_target, 0.0)
    b_grad = _score_gradient(b, b_weight, b_by_target, by_total, by_spread, cap, CAPPED)
    tl.store(p_row + o_column, b_grad.to(p_row.dtype.element_ty), mask=readable)


@triton.jit
def _statistics(
    p_logits,
    p_labels,
    p_highest,
    p_total,
    p_target,
    p_spread,
    rows,
    columns,
    stride,
    cap,
    COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A block's statistics; COLUMNS is 0 for rows that are not read whole."""
    for i_row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        p_row = _row(p_logits, i_row, stride, LANES)
        i_label = tl.load(p_labels + i_row)
        if COLUMNS > 0:
            o_column, readable, mask = _columns(COLUMNS, BLOCK, LANES)
            _, _, highest, total, target, spread = _whole_row(
                p_row, i_label, o_column, readable, mask, COLUMNS, cap, CAPPED
            )
        else:
            highest, total, target, spread = _row_statistics(p_row, i_label, columns, cap, CAPPED, BLOCK, LANES)
        tl.store(p_highest + i_row, highest)
        tl.store(p_total + i_row, total)
        tl.store(p_target + i_row, target)
        tl.store(p_spread + i_row, spread)


@triton.jit
def _gradient(
    p_logits,
    p_labels,
    p_highest,
    p_by_total,
    p_by_target,
    p_by_spread,
    columns,
    stride,
    first,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    i_row = tl.program_id(0)
    _row_gradient(
        _row(p_logits, i_row, stride, LANES),
        tl.load(p_labels + i_row) - first,
        tl.program_id(1) * BLOCK,
        columns,
        tl.load(p_highest + i_row),
        tl.load(p_by_total + i_row),
        tl.load(p_by_target + i_row),
        tl.load(p_by_spread + i_row),
        cap,
        CAPPED,
        BLOCK,
        LANES,
    )


@triton.jit
def _loss_and_factors(i_label, columns, highest, total, target, spread, ignored, z_loss, smoothing):
    """(loss, by_total, by_target, by_spread) of one row."""
    kept = (i_label != ignored).to(tl.float32)
    lse = highest + tl.log(total)
    loss = lse - (1.0 - smoothing) * target - smoothing / columns * spread + z_loss * lse * lse
    by_total = kept * (1.0 + 2.0 * z_loss * lse) / total
    return tl.where(i_label != ignored, loss, 0.0), by_total, kept * (smoothing - 1.0), -kept * smoothing / columns


@triton.jit
def _loss_and_gradient(
    p_logits,
    p_labels,
    p_loss,
    rows,
    columns,
    stride,
    ignored,
    z_loss,
    smoothing,
    cap,
    COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A block's losses, and its gradient in its place; COLUMNS is 0 for rows that are not read whole."""
    for i_row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        p_row = _row(p_logits, i_row, stride, LANES)
        i_label = tl.load(p_labels + i_row)
        if COLUMNS > 0:
            o_column, readable, mask = _columns(COLUMNS, BLOCK, LANES)
            b, b_weight, highest, total, target, spread = _whole_row(
                p_row, i_label, o_column, readable, mask, COLUMNS, cap, CAPPED
            )
        else:
            highest, total, target, spread = _row_statistics(p_row, i_label, columns, cap, CAPPED, BLOCK, LANES)
        if not SMOOTHED:
            spread = 0.0
        loss, by_total, by_target, by_spread = _loss_and_factors(
            i_label, columns, highest, total, target, spread, ignored, z_loss, smoothing
        )
        if not SMOOTHED:
            by_spread = None
        if COLUMNS > 0:
            b_by_target = _label_alone(i_label, by_target, BLOCK, LANES)
            b_grad = _score_gradient(b, b_weight, b_by_target, by_total, by_spread, cap, CAPPED)
            tl.store(p_row + o_column, b_grad.to(p_row.dtype.element_ty), mask=readable)
        else:
            # The label's logit is read before the row is overwritten.
            tl.debug_barrier()
            for start in range(0, columns, BLOCK):
                _row_gradient(
                    p_row, i_label, start, columns, highest, by_total, by_target, by_spread, cap, CAPPED, BLOCK, LANES
                )
        tl.store(p_loss + i_row, loss)


@triton.jit
def _scale(p_x, p_factor, p_y, size, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p_x + o, mask=o < size).to(tl.float32) * tl.load(p_factor)
    tl.store(p_y + o, b.to(p_y.dtype.element_ty), mask=o < size)


def statistics(logits: Tensor, labels: Tensor, soft_cap: float, out: Pieces) -> None:
    """Writes (highest, total, target, spread) [n]; `target` is 0 where the label is none of the columns."""
    programs, options = _plan(logits, soft_cap, SUMS, SUMS_WARPS)
    with on(logits):
        _statistics[(programs,)](logits, labels, *out, *logits.shape, logits.stride(0), soft_cap, **options)


def gradient_(logits: Tensor, labels: Tensor, by: Pieces, cap: float, first: int = 0) -> None:
    """Overwrites the logits by their gradient; `by` is highest and the gradients of total, target and spread, each [n].

    The labels are counted from a column that is `first` columns before these logits. Columns beyond, up to the next 16
    bytes, are overwritten too, here and by `loss_and_gradient_`.
    """
    coefficients = [t.contiguous() for t in by]
    rows, columns = logits.shape
    block = min(PART, next_power_of_2(columns))
    with on(logits):
        _gradient[rows, cdiv(columns, block)](
            logits,
            labels,
            *coefficients,
            columns,
            logits.stride(0),
            first,
            cap,
            CAPPED=cap != 0,
            BLOCK=block,
            LANES=_lanes(logits),
            num_warps=PART_WARPS,
        )


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor * factor, computed in fp32 and rounded once, to `dtype`; tensor is contiguous, factor one fp32 number.

    torch.mul of fp32 and 16-bit tensors, or of any and a factor on the GPU, runs at half a copy's speed.
    """
    output = torch.empty_like(tensor, dtype=dtype)
    if tensor.numel():
        with on(tensor):
            programs = cdiv(tensor.numel(), PART)
            _scale[(programs,)](tensor, factor, output, tensor.numel(), BLOCK=PART, num_warps=PART_WARPS)
    return output


def loss_and_gradient_(
    logits: Tensor, labels: Tensor, ignored: int, z_loss: float, smoothing: float, cap: float, out: Tensor
) -> None:
    """Writes losses to `out` [n], 0 where the label is `ignored`, over the logits the gradient of the losses' sum."""
    programs, options = _plan(logits, cap, BLOCK, WARPS)
    numbers = (*logits.shape, logits.stride(0), ignored, z_loss, smoothing, cap)
    with on(logits):
        _loss_and_gradient[(programs,)](logits, labels, out, *numbers, SMOOTHED=smoothing != 0, **options)


def _plan(logits: Tensor, cap: float, step: int, step_warps: int) -> tuple[int, dict[str, Any]]:
    """(programs, compile-time sizes) of a pass that needs whole rows' sums; a longer row is taken `step` by `step`."""
    rows, columns = logits.shape
    block, sizes = next_power_of_2(columns), {"CAPPED": cap != 0, "LANES": _lanes(logits)}
    if block * logits.element_size() > (WHOLE // 4 if cap else WHOLE):
        return rows, sizes | {"COLUMNS": 0, "BLOCK": min(step, block), "STAGES": 1, "num_warps": step_warps}
    warps = max(1, min(PROCESSOR_WARPS, block // (32 * VALUES)))
    # As a constant, COLUMNS says of most logits that they lie inside the row, which takes no instruction then.
    sizes |= {"COLUMNS": columns, "BLOCK": max(block, sizes["LANES"]), "STAGES": STAGES, "num_warps": warps}
    return min(rows, processors(logits) * (PROCESSOR_WARPS // warps)), sizes


def _lanes(logits: Tensor) -> int:
    """The columns of 16 bytes, where every row begins at a multiple of so much, else 1."""
    lanes = 16 // logits.element_size()
    return lanes if logits.stride(0) % lanes == 0 and logits.data_ptr() % 16 == 0 else 1

"""Softmax statistics and cross-entropy gradients of a block of logits in Triton: one program a row, in place.

A row of one block is read once and kept in registers. A longer one is read twice, the second time from the L2 cache
(64 KB at 32000 columns of 16 bits). Every sum has one fixed order, so bits repeat. The maths is in reference.py.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on
from .reference import Pieces

# Columns a step of a program: 16 values a thread.
BLOCK, WARPS = 8192, 8


@triton.jit
def _scores(p_row, o_column, mask, other, cap, CAPPED: tl.constexpr):
    """The row's logits at these columns in fp32, soft-capped, `other` outside the mask."""
    b = tl.load(p_row + o_column, mask=mask, other=0.0).to(tl.float32)
    if CAPPED:
        # tanh through exp, which the interpreter has too; exact at both ends.
        b = cap * (1.0 - 2.0 / (tl.exp(2.0 / cap * b) + 1.0))
    return tl.where(mask, b, other)


@triton.jit
def _target(p_row, i_label, columns, cap, CAPPED: tl.constexpr):
    """The label's logit, 0 where the label is none of the columns."""
    inside = (i_label >= 0) & (i_label < columns)
    o_label = i_label + tl.arange(0, 1)
    return tl.sum(_scores(p_row, o_label, inside & (o_label == i_label), 0.0, cap, CAPPED), 0)


@triton.jit
def _row_statistics(p_row, i_label, columns, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """(highest, total, target, spread) of one row."""
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    spread = tl.full([], 0.0, tl.float32)
    for i in range(0, columns, BLOCK):
        o_column = i + tl.arange(0, BLOCK)
        mask = o_column < columns
        b = _scores(p_row, o_column, mask, float("-inf"), cap, CAPPED)
        higher = tl.maximum(highest, tl.max(b, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(b - higher), 0)
        spread += tl.sum(tl.where(mask, b, 0.0), 0)
        highest = higher
    return highest, total, _target(p_row, i_label, columns, cap, CAPPED), spread


@triton.jit
def _score_gradient(b, b_weight, o_column, i_label, by_total, by_target, by_spread, cap, CAPPED: tl.constexpr):
    """The gradient of the logits whose capped scores are b, and b_weight = exp(b - highest)."""
    b_grad = b_weight * by_total + by_spread + tl.where(o_column == i_label, by_target, 0.0)
    if CAPPED:
        b_grad *= 1.0 - (b / cap) * (b / cap)
    return b_grad


@triton.jit
def _row_gradient(
    p_row,
    i_label,
    columns,
    highest,
    by_total,
    by_target,
    by_spread,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for i in range(0, columns, BLOCK):
        o_column = i + tl.arange(0, BLOCK)
        mask = o_column < columns
        b = _scores(p_row, o_column, mask, 0.0, cap, CAPPED)
        b_grad = _score_gradient(b, tl.exp(b - highest), o_column, i_label, by_total, by_target, by_spread, cap, CAPPED)
        tl.store(p_row + o_column, b_grad.to(p_row.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(
    p_logits,
    p_labels,
    p_highest,
    p_total,
    p_target,
    p_spread,
    columns,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    highest, total, target, spread = _row_statistics(
        p_logits + i_row * columns, tl.load(p_labels + i_row), columns, cap, CAPPED, BLOCK
    )
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
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    _row_gradient(
        p_logits + i_row * columns,
        tl.load(p_labels + i_row),
        columns,
        tl.load(p_highest + i_row),
        tl.load(p_by_total + i_row),
        tl.load(p_by_target + i_row),
        tl.load(p_by_spread + i_row),
        cap,
        CAPPED,
        BLOCK,
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
    columns,
    ignored,
    z_loss,
    smoothing,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * columns
    i_label = tl.load(p_labels + i_row)
    if WHOLE:
        o_column = tl.arange(0, BLOCK)
        mask = o_column < columns
        b = _scores(p_row, o_column, mask, float("-inf"), cap, CAPPED)
        target = tl.sum(tl.where(o_column == i_label, b, 0.0), 0)
        highest = tl.max(b, 0)
        b_weight = tl.exp(b - highest)
        b = tl.where(mask, b, 0.0)
        spread = tl.sum(b, 0)
        loss, by_total, by_target, by_spread = _loss_and_factors(
            i_label, columns, highest, tl.sum(b_weight, 0), target, spread, ignored, z_loss, smoothing
        )
        b_grad = _score_gradient(b, b_weight, o_column, i_label, by_total, by_target, by_spread, cap, CAPPED)
        tl.store(p_row + o_column, b_grad.to(p_row.dtype.element_ty), mask=mask)
    else:
        highest, total, target, spread = _row_statistics(p_row, i_label, columns, cap, CAPPED, BLOCK)
        loss, by_total, by_target, by_spread = _loss_and_factors(
            i_label, columns, highest, total, target, spread, ignored, z_loss, smoothing
        )
        # The label's logit is read before the row is overwritten.
        tl.debug_barrier()
        _row_gradient(p_row, i_label, columns, highest, by_total, by_target, by_spread, cap, CAPPED, BLOCK)
    tl.store(p_loss + i_row, loss)


def statistics(logits: Tensor, labels: Tensor, soft_cap: float) -> Pieces:
    """(highest, total, target, spread) [n]; `target` is 0 where the label is not a column of these logits."""
    highest, total, target, spread = (_per_row(logits) for _ in range(4))
    with on(logits):
        _statistics[(logits.shape[0],)](
            logits, labels, highest, total, target, spread, logits.shape[1], soft_cap, **_options(logits, soft_cap)
        )
    return highest, total, target, spread


def gradient_(
    logits: Tensor, labels: Tensor, highest: Tensor, by_total: Tensor, by_target: Tensor, by_spread: Tensor, cap: float
) -> None:
    """Overwrites the logits by their gradient; by_total, by_target and by_spread are [n]."""
    coefficients = [t.contiguous() for t in (highest, by_total, by_target, by_spread)]
    with on(logits):
        _gradient[(logits.shape[0],)](logits, labels, *coefficients, logits.shape[1], cap, **_options(logits, cap))


def loss_and_gradient_(
    logits: Tensor, labels: Tensor, ignored: int, z_loss: float, smoothing: float, cap: float
) -> Tensor:
    """Losses [n], 0 where the label is `ignored`; overwrites the logits by the gradient of the losses' sum."""
    losses = _per_row(logits)
    with on(logits):
        options = _options(logits, cap)
        whole = options["BLOCK"] >= logits.shape[1]
        _loss_and_gradient[(logits.shape[0],)](
            logits, labels, losses, logits.shape[1], ignored, z_loss, smoothing, cap, WHOLE=whole, **options
        )
    return losses


def _options(logits: Tensor, cap: float) -> dict[str, Any]:
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    return {"CAPPED": cap != 0, "BLOCK": block, "num_warps": max(1, min(WARPS, block // 256))}


def _per_row(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)

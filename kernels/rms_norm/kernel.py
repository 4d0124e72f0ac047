"""The root-mean-square norm in Triton: whole rows in registers, read once and written once each way.

Forward, a program owns a tile of rows and leaves the reciprocal of each row's root beside y. Backward, programs stay
and fetch their next tile into shared memory while they work on one; each adds its rows' share of the scale's gradient
in registers and leaves it as one row of partial sums, which are added in one order.

Offsets are o_, loaded blocks b_, pointers p_. Arithmetic is fp32.
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

from ..dispatch import on, processors
from ..partials import sum_partials
from ..sizes import cdiv, next_power_of_2

# Of a multiprocessor, and the most that a thread can have of them.
REGISTERS, MOST_REGISTERS = 65536, 255
MOST_WARPS = 16
# Bytes of shared memory for tiles on their way, which a program can have on any GPU from Ampere on.
SHARED = 90 * 1024


@dataclass(frozen=True)
class Tile:
    """What a program works on at once: rows of about `numbers` together, or one row; powers of two.

    Attributes:
        values: numbers a thread, about.
        stages: how many tiles a program that stays has in hand, as far as shared memory goes: that one and those on
            their way, one more where it has its multiprocessor to itself.
        warps: of programs that stay, a multiprocessor, where one program has no more itself.
    """

    numbers: int
    values: int
    stages: int = 1
    warps: int = MOST_WARPS

    def constants(self, width: int, block: int) -> dict[str, Any]:
        """The compile-time sizes, where a row's first or only block is of so many dims."""
        rows = max(1, self.numbers // next_power_of_2(width))
        warps = max(1, min(MOST_WARPS, rows * block // (32 * self.values)))
        return {"WIDTH": width, "ROWS": rows, "BLOCK_D": block, "num_warps": warps}

    def staying(self, width: int, size: int) -> tuple[int, dict[str, Any]]:
        """(programs a multiprocessor, the compile-time sizes) of programs that stay, for as many of which it has room.

        A row that is a tile is cut in two blocks where that leaves fewer lanes idle: 2,560 in 2,048 + 512. A number of
        x or dy has `size` bytes.
        """
        block, rest = next_power_of_2(width), 0
        if self.numbers <= block > width:
            half = block // 2
            second = next_power_of_2(width - half)
            if second < half:
                block, rest = half, second
        constants = self.constants(width, block)
        programs = max(1, self.warps // constants["num_warps"])
        room = REGISTERS // (32 * constants["num_warps"] * programs)
        ahead = self.stages - (programs > 1)
        on_their_way = min(ahead, SHARED // (2 * size * constants["ROWS"] * (block + rest)))
        return programs, constants | {"REST": rest, "STAGES": 1 + on_their_way, "maxnreg": min(room, MOST_REGISTERS)}


FORWARD = Tile(numbers=4096, values=32)
# 16 warps take rows of 2,560 1.02 times as long, 8 warps heads of 128 1.12 times.
BACKWARD = Tile(numbers=2048, values=16, stages=3, warps=12)


@triton.jit
def _tile(first, rows, BEGIN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(start, offsets from there, which of them are inside) of BLOCK_D dims from BEGIN on, of rows from `first` on."""
    o_row = tl.arange(0, ROWS)[:, None]
    o_dim = BEGIN + tl.arange(0, BLOCK_D)[None, :]
    # Only this takes 64 bits.
    start = tl.cast(first, tl.int64) * WIDTH
    return start, o_row * WIDTH + o_dim, (o_row < rows - first) & (o_dim < WIDTH)


@triton.jit
def _load(p, start, o, inside):
    return tl.load(p + start + o, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(p, start, o, inside, b):
    tl.store(p + start + o, b.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _weight(p_scale, BEGIN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    o_dim = BEGIN + tl.arange(0, BLOCK_D)[None, :]
    return 1.0 + tl.load(p_scale + o_dim, mask=o_dim < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _forward(p_x, p_scale, p_y, p_root, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    first = tl.program_id(0) * ROWS
    start, o, inside = _tile(first, rows, 0, WIDTH, ROWS, BLOCK_D)
    b_x = _load(p_x, start, o, inside)
    b_root = tl.rsqrt(tl.sum(b_x * b_x, 1) / WIDTH + eps)
    o_row = first + tl.arange(0, ROWS)
    tl.store(p_root + o_row, b_root, mask=o_row < rows)
    _store(p_y, start, o, inside, b_x * b_root[:, None] * _weight(p_scale, 0, WIDTH, BLOCK_D))


@triton.jit
def _store_part(p_parts, b_part, BEGIN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    o_dim = BEGIN + tl.arange(0, BLOCK_D)
    tl.store(p_parts + tl.program_id(0).to(tl.int64) * WIDTH + o_dim, tl.sum(b_part, 0), mask=o_dim < WIDTH)


@triton.jit
def _backward(
    p_dy,
    p_x,
    p_scale,
    p_root,
    p_dx,
    p_parts,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row is BLOCK_D dims and, where not 0, up to REST more; `p_parts` is None where the scale wants no gradient."""
    b_weight = _weight(p_scale, 0, WIDTH, BLOCK_D)
    b_part = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if REST:
        b_weight_2 = _weight(p_scale, BLOCK_D, WIDTH, REST)
        b_part_2 = tl.zeros([ROWS, REST], tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = i * ROWS
        o_row = first + tl.arange(0, ROWS)
        b_root = tl.load(p_root + o_row, mask=o_row < rows, other=0.0)[:, None]
        start, o, inside = _tile(first, rows, 0, WIDTH, ROWS, BLOCK_D)
        b_normed = _load(p_x, start, o, inside) * b_root
        b_dy = _load(p_dy, start, o, inside)
        b_grad = b_dy * b_weight
        b_along = tl.sum(b_grad * b_normed, 1)
        b_part += b_dy * b_normed
        if REST:
            _, o_2, inside_2 = _tile(first, rows, BLOCK_D, WIDTH, ROWS, REST)
            b_normed_2 = _load(p_x, start, o_2, inside_2) * b_root
            b_dy_2 = _load(p_dy, start, o_2, inside_2)
            b_grad_2 = b_dy_2 * b_weight_2
            b_along += tl.sum(b_grad_2 * b_normed_2, 1)
            b_part_2 += b_dy_2 * b_normed_2
        b_along = b_along[:, None] / WIDTH
        _store(p_dx, start, o, inside, b_root * (b_grad - b_normed * b_along))
        if REST:
            _store(p_dx, start, o_2, inside_2, b_root * (b_grad_2 - b_normed_2 * b_along))
    if p_parts is not None:
        _store_part(p_parts, b_part, 0, WIDTH, BLOCK_D)
        if REST:
            _store_part(p_parts, b_part_2, BLOCK_D, WIDTH, REST)


def forward(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, the reciprocal of each row's root, fp32 [...]); see op.py."""
    x, scale = x.contiguous(), scale.contiguous()
    y = torch.empty_like(x)
    root = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, width = root.numel(), x.shape[-1]
    constants = FORWARD.constants(width, next_power_of_2(width))
    with on(x):
        _forward[(cdiv(rows, constants["ROWS"]),)](x, scale, y, root, rows, eps, **constants)
    return y, root


def backward(dy: Tensor, x: Tensor, scale: Tensor, root: Tensor, trained: bool) -> tuple[Tensor, Tensor]:
    """(dx, the scale's gradient, of no numbers where the scale is not `trained`)."""
    dy, x, scale = dy.contiguous(), x.contiguous(), scale.contiguous()
    dx, rows, width = torch.empty_like(x), root.numel(), x.shape[-1]
    programs, constants = BACKWARD.staying(width, max(dy.element_size(), x.element_size()))
    programs = min(cdiv(rows, constants["ROWS"]), programs * processors(x))
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device) if trained else None
    with on(x):
        _backward[(programs,)](dy, x, scale, root, dx, parts, rows, **constants)
    return dx, scale.new_empty(0) if parts is None else sum_partials(parts, scale.dtype)

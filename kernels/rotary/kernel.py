"""The rotation in Triton: x is read once and written once, forward and backward alike.

A program owns a few tokens by up to GROUP heads, which share the tokens' angles: those are loaded once for all of them.
Both halves of the rotated dims are in registers at once; the dims beyond are copied.

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

from ..dispatch import on
from ..sizes import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tile:
    """What a program owns: about `pairs` rotated pairs of dims, of at most `group` heads."""

    pairs: int
    group: int
    warps: int

    def constants(self, heads: int, dim: int, half: int) -> dict[str, Any]:
        """The compile-time sizes."""
        group, block = min(self.group, next_power_of_2(heads)), next_power_of_2(half)
        rest = dim - 2 * half
        cut = {"ROWS": max(1, self.pairs // (group * block)), "GROUP": group, "BLOCK": block}
        cut["REST"] = next_power_of_2(rest) if rest else 0
        return cut | {"HEADS": heads, "DIM": dim, "HALF": half, "num_warps": self.warps}


TILE = Tile(pairs=2048, group=16, warps=4)


@triton.jit
def _rotate(
    p_x,
    p_cos,
    p_sin,
    p_y,
    rows,
    sign,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """`rows` are the tokens of all rows of the batch; by `sign` -1 the rotation goes back."""
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    first = tl.program_id(0) // groups * ROWS
    o_row = tl.arange(0, ROWS)[:, None, None]
    o_head = (tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP))[None, :, None]
    o_pair = tl.arange(0, BLOCK)[None, None, :]
    # Only these take 64 bits.
    start = first.to(tl.int64) * (HEADS * DIM)
    p_x, p_y = p_x + start, p_y + start
    start = first.to(tl.int64) * HALF
    p_cos, p_sin = p_cos + start, p_sin + start
    known = (o_row < rows - first) & (o_pair < HALF)
    b_cos = tl.load(p_cos + o_row * HALF + o_pair, mask=known, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_row * HALF + o_pair, mask=known, other=0.0).to(tl.float32) * sign
    o_x = o_row * (HEADS * DIM) + o_head * DIM
    inside = (o_row < rows - first) & (o_head < HEADS)
    mask, o = inside & (o_pair < HALF), o_x + o_pair
    b_first = tl.load(p_x + o, mask=mask, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + o + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + o, (b_first * b_cos - b_second * b_sin).to(p_y.dtype.element_ty), mask=mask)
    tl.store(p_y + o + HALF, (b_second * b_cos + b_first * b_sin).to(p_y.dtype.element_ty), mask=mask)
    if REST:
        o_rest = 2 * HALF + tl.arange(0, REST)[None, None, :]
        mask = inside & (o_rest < DIM)
        tl.store(p_y + o_x + o_rest, tl.load(p_x + o_x + o_rest, mask=mask), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x rotated, or rotated back; see op.py."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    batch, tokens, heads, dim = x.shape
    constants = TILE.constants(heads, dim, cos.shape[2])
    programs = cdiv(batch * tokens, constants["ROWS"]) * cdiv(heads, constants["GROUP"])
    with on(x):
        _rotate[(programs,)](x, cos, sin, y, batch * tokens, -1.0 if inverse else 1.0, **constants)
    return y

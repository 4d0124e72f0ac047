"""The gate projections in Triton: x is read once for both gates, and the biases cost nothing.

Three kernels, each of persistent programs that own a block of channels and take every so many-th tile of tokens:

    _forward:   a, g = x W_a + b_a, x W_x + b_x                reads x, writes both
    _inputs:    dx = da W_a^T + dg W_x^T                       reads both gradients, writes one
    _weights:   dW = x^T da and db = sum da, or those of dg    reads x and a gradient, which neighbours share in L2

The first two keep the block's weights of both gates in shared memory while tiles of tokens stream past. `_weights`
keeps the gradient of one gate's weights in registers; each program leaves its sums and those are added in a fixed
order, so bits repeat. One pass for everything would hold both gradients, which no SM has the registers for.

A block's side is cut in powers of two, 160 in 128 + 32, those of a product's first operand at least 64, which is what
the tensor cores take. Sides whose weights fill shared memory are cut in groups, a program each.

16-bit inputs are multiplied as they are, fp32 as fp32; sums are fp32. Offsets are o_, loaded blocks b_, pointers p_,
indices i_.
"""

# The types of jitted functions and of their launches are beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on
from ..partials import sum_partials

# Channels a group where a program does not keep a whole block.
GROUP = 64
# Shared memory that whole blocks of 160 take, of Hopper's 227 KiB; GPUs with less take groups.
WHOLE_BYTES = 212 * 1024
# Programs at a time.
SMS = 132


@dataclass(frozen=True)
class Tile:
    """`rows` tokens at a time by `warps`, `stages` of them loaded or in work; `programs` to an SM.

    Blocks of up to `whole` channels are kept whole, others go in groups.
    """

    rows: int
    warps: int
    stages: int
    programs: int = 1
    whole: int = 160


FORWARD = Tile(rows=128, warps=8, stages=1)
INPUTS = Tile(rows=64, warps=4, stages=1)
WEIGHTS = Tile(rows=32, warps=8, stages=4)
# fp32 products are scalar code: small tiles, many programs. Right, but slower than the reference on a GPU.
SINGLE = Tile(rows=32, warps=4, stages=1, programs=4)
SINGLE_PIECE = 32


@triton.jit
def _place(i_program, BLOCKS: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr):
    """(block, first channel of its group, worker); the groups of a tile run side by side and share it in L2."""
    groups: tl.constexpr = (SIDE + GROUP - 1) // GROUP
    return i_program // groups % BLOCKS, i_program % groups * GROUP, i_program // (groups * BLOCKS)


@triton.jit
def _offset(i_tile, i_block, BLOCKS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """Where a block's channels of a tile begin; only this takes 64 bits."""
    return tl.cast(i_tile, tl.int64) * (ROWS * BLOCKS * SIDE) + i_block * SIDE


@triton.jit
def _tokens(
    pointer,
    i_tile,
    i_block,
    first,
    tokens,
    PIECES: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The pieces [ROWS, size] of a tile, from a block's channel `first` on; zeros beyond the tokens and the block."""
    found = ()
    pointer += _offset(i_tile, i_block, BLOCKS, SIDE, ROWS)
    left = tokens - i_tile * ROWS
    o_row = tl.arange(0, ROWS)
    for i in tl.static_range(len(PIECES)):
        o_c = first + PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = (o_row < left)[:, None] & (o_c < SIDE)[None, :]
        found += (tl.load(pointer + (o_row * (BLOCKS * SIDE))[:, None] + o_c[None, :], mask=mask, other=0.0),)
    return found


@triton.jit
def _matrix(pointer, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr):
    """Pieces of a block's weights, those of a row one after another; zeros beyond its side."""
    found = ()
    for i in tl.static_range(len(ROWS)):
        for j in tl.static_range(len(COLUMNS)):
            o_row = first_row + ROWS[i][0] + tl.arange(0, ROWS[i][1])
            o_column = first_column + COLUMNS[j][0] + tl.arange(0, COLUMNS[j][1])
            mask = (o_row < SIDE)[:, None] & (o_column < SIDE)[None, :]
            found += (tl.load(pointer + o_row[:, None] * SIDE + o_column[None, :], mask=mask, other=0.0),)
    return found


@triton.jit
def _store(pointer, b, o_c, left, BLOCKS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """Writes one piece of a tile where `_tokens` reads it."""
    o_row = tl.arange(0, ROWS)
    mask = (o_row < left)[:, None] & (o_c < SIDE)[None, :]
    tl.store(pointer + (o_row * (BLOCKS * SIDE))[:, None] + o_c[None, :], b.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _project(
    inputs,
    weights,
    p_bias,
    p_out,
    first,
    left,
    GROUPED: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One gate of a tile: every piece of its outputs from all pieces of the inputs."""
    for j in tl.static_range(len(GROUPED)):
        b = tl.full([ROWS, GROUPED[j][1]], 0.0, tl.float32)
        for i in tl.static_range(len(inputs)):
            b_weight = weights[i * len(GROUPED) + j].to(OPERAND)
            b = tl.dot(inputs[i].to(OPERAND), b_weight, b, input_precision="ieee")
        o_c = first + GROUPED[j][0] + tl.arange(0, GROUPED[j][1])
        b += tl.load(p_bias + o_c, mask=o_c < SIDE, other=0.0).to(tl.float32)[None, :]
        _store(p_out, b, o_c, left, BLOCKS, SIDE, ROWS)


@triton.jit
def _forward(
    p_x,
    p_weight_a,
    p_bias_a,
    p_weight_x,
    p_bias_x,
    p_a,
    p_g,
    tokens,
    workers,
    BLOCKS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    i_block, first, i_worker = _place(tl.program_id(0), BLOCKS, SIDE, GROUP)
    weights_a = _matrix(p_weight_a + i_block * SIDE * SIDE, 0, first, WHOLE, GROUPED, SIDE)
    weights_x = _matrix(p_weight_x + i_block * SIDE * SIDE, 0, first, WHOLE, GROUPED, SIDE)
    p_bias_a += i_block * SIDE
    p_bias_x += i_block * SIDE
    # The next tile is on its way to registers while this one, in shared memory, is multiplied.
    inputs = _tokens(p_x, i_worker, i_block, 0, tokens, WHOLE, BLOCKS, SIDE, ROWS)
    for i_tile in range(i_worker, tl.cdiv(tokens, ROWS), workers):
        following = _tokens(p_x, i_tile + workers, i_block, 0, tokens, WHOLE, BLOCKS, SIDE, ROWS)
        o = _offset(i_tile, i_block, BLOCKS, SIDE, ROWS)
        left = tokens - i_tile * ROWS
        _project(inputs, weights_a, p_bias_a, p_a + o, first, left, GROUPED, BLOCKS, SIDE, ROWS, OPERAND)
        _project(inputs, weights_x, p_bias_x, p_g + o, first, left, GROUPED, BLOCKS, SIDE, ROWS, OPERAND)
        inputs = following


@triton.jit
def _inputs(
    p_da,
    p_dg,
    p_weight_a,
    p_weight_x,
    p_dx,
    tokens,
    workers,
    BLOCKS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    i_block, first, i_worker = _place(tl.program_id(0), BLOCKS, SIDE, GROUP)
    weights_a = _matrix(p_weight_a + i_block * SIDE * SIDE, first, 0, GROUPED, WHOLE, SIDE)
    weights_x = _matrix(p_weight_x + i_block * SIDE * SIDE, first, 0, GROUPED, WHOLE, SIDE)
    das = _tokens(p_da, i_worker, i_block, 0, tokens, WHOLE, BLOCKS, SIDE, ROWS)
    dgs = _tokens(p_dg, i_worker, i_block, 0, tokens, WHOLE, BLOCKS, SIDE, ROWS)
    for i_tile in range(i_worker, tl.cdiv(tokens, ROWS), workers):
        following_das = _tokens(p_da, i_tile + workers, i_block, 0, tokens, WHOLE, BLOCKS, SIDE, ROWS)
        following_dgs = _tokens(p_dg, i_tile + workers, i_block, 0, tokens, WHOLE, BLOCKS, SIDE, ROWS)
        o = _offset(i_tile, i_block, BLOCKS, SIDE, ROWS)
        left = tokens - i_tile * ROWS
        for j in tl.static_range(len(GROUPED)):
            b_dx = tl.full([ROWS, GROUPED[j][1]], 0.0, tl.float32)
            for i in tl.static_range(len(WHOLE)):
                b_a, b_g = weights_a[j * len(WHOLE) + i].to(OPERAND), weights_x[j * len(WHOLE) + i].to(OPERAND)
                b_dx = tl.dot(das[i].to(OPERAND), tl.trans(b_a), b_dx, input_precision="ieee")
                b_dx = tl.dot(dgs[i].to(OPERAND), tl.trans(b_g), b_dx, input_precision="ieee")
            o_c = first + GROUPED[j][0] + tl.arange(0, GROUPED[j][1])
            _store(p_dx + o, b_dx, o_c, left, BLOCKS, SIDE, ROWS)
        das, dgs = following_das, following_dgs


@triton.jit
def _weights(
    p_x,
    p_da,
    p_dg,
    p_dweight,
    p_dbias,
    tokens,
    workers,
    BLOCKS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The sums of each worker: dW [worker, gate, block, input, output] and db [worker, gate, D]."""
    i_gate = tl.program_id(0) % 2
    i_block, first, i_worker = _place(tl.program_id(0) // 2, BLOCKS, SIDE, GROUP)
    p_dy = p_da if i_gate == 0 else p_dg
    sums = ()
    for i in tl.static_range(len(GROUPED)):
        for j in tl.static_range(len(WHOLE)):
            sums += (tl.full([GROUPED[i][1], WHOLE[j][1]], 0.0, tl.float32),)
    biases = ()
    for j in tl.static_range(len(WHOLE)):
        biases += (tl.full([ROWS, WHOLE[j][1]], 0.0, tl.float32),)
    for i_tile in range(i_worker, tl.cdiv(tokens, ROWS), workers):
        xs = _tokens(p_x, i_tile, i_block, first, tokens, GROUPED, BLOCKS, SIDE, ROWS)
        dys = _tokens(p_dy, i_tile, i_block, 0, tokens, WHOLE, BLOCKS, SIDE, ROWS)
        sums = _add_products(sums, xs, dys, OPERAND)
        biases = _add(biases, dys)
    part = i_worker.to(tl.int64) * (2 * BLOCKS) + i_gate * BLOCKS + i_block
    _store_sums(p_dweight + part * (SIDE * SIDE), sums, first, GROUPED, WHOLE, SIDE)
    if first == 0:
        for j in tl.static_range(len(WHOLE)):
            o_c = WHOLE[j][0] + tl.arange(0, WHOLE[j][1])
            tl.store(p_dbias + part * SIDE + o_c, tl.sum(biases[j], 0), mask=o_c < SIDE)


@triton.jit
def _add_products(sums, xs, dys, OPERAND: tl.constexpr):
    """Every piece of the sums with x^T dy of a tile added."""
    found = ()
    for i in tl.static_range(len(xs)):
        for j in tl.static_range(len(dys)):
            b_x, b_dy = tl.trans(xs[i].to(OPERAND)), dys[j].to(OPERAND)
            found += (tl.dot(b_x, b_dy, sums[i * len(dys) + j], input_precision="ieee"),)
    return found


@triton.jit
def _add(sums, blocks):
    found = ()
    for j in tl.static_range(len(blocks)):
        found += (sums[j] + blocks[j].to(tl.float32),)
    return found


@triton.jit
def _store_sums(pointer, sums, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr):
    """Writes a block's weights where `_matrix` reads them."""
    for i in tl.static_range(len(ROWS)):
        for j in tl.static_range(len(COLUMNS)):
            o_row = first + ROWS[i][0] + tl.arange(0, ROWS[i][1])
            o_column = COLUMNS[j][0] + tl.arange(0, COLUMNS[j][1])
            mask = (o_row < SIDE)[:, None] & (o_column < SIDE)[None, :]
            tl.store(pointer + o_row[:, None] * SIDE + o_column[None, :], sums[i * len(COLUMNS) + j], mask=mask)


@functools.cache
def pieces(side: int, least: int, most: int) -> tuple[tuple[int, int], ...]:
    """(begin, size) of powers of two from `least` to `most` that cover `side`, beyond it only by their last."""
    found, begin = [], 0
    while begin < side:
        left = side - begin
        size = max(least, min(most, 1 << (left.bit_length() - 1)))
        found.append((begin, size))
        begin += size
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    """The launch of a kernel: what its programs own, and the compile-time sizes it takes."""

    blocks: int
    side: int
    group: int
    tile: Tile

    @property
    def groups(self) -> int:
        """Groups a block."""
        return -(-self.side // self.group)

    def workers(self, tokens: int, gates: int = 1) -> int:
        """Programs that share the tiles of a group of channels, as many as fill the GPU."""
        most = self.tile.programs * SMS // (self.blocks * self.groups * gates)
        return max(1, min(most, -(-tokens // self.tile.rows)))

    def grid(self, workers: int, gates: int = 1) -> tuple[int]:
        """The number of programs."""
        return (workers * self.blocks * self.groups * gates,)

    def constants(self, operand: Any, least: int = 32) -> dict[str, Any]:
        """Sizes and launch options; the pieces of a group have `least` channels or more."""
        most = SINGLE_PIECE if self.tile is SINGLE else 128
        return {
            "BLOCKS": self.blocks,
            "SIDE": self.side,
            "GROUP": self.group,
            "WHOLE": pieces(self.side, 32, most),
            "GROUPED": pieces(self.group, min(least, most), most),
            "ROWS": self.tile.rows,
            "OPERAND": operand,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }


def plan(weight: Tensor, tile: Tile) -> Plan:
    """The launch for these weights by `tile`, or in fp32 by its own."""
    blocks, side, _ = weight.shape
    if weight.dtype == torch.float32:
        return Plan(blocks, side, min(side, SINGLE_PIECE), SINGLE)
    roomy = not weight.is_cuda or _shared_memory(weight.device) > WHOLE_BYTES
    whole = tile.whole if roomy else GROUP
    return Plan(blocks, side, side if side <= whole else GROUP, tile)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def operand(x: Tensor) -> Any:
    """What is multiplied; the interpreter would multiply the bits of bf16."""
    if x.dtype == torch.bfloat16:
        return tl.bfloat16 if x.is_cuda else tl.float32
    return tl.float16 if x.dtype == torch.float16 else tl.float32


def forward(x: Tensor, weight_a: Tensor, bias_a: Tensor, weight_x: Tensor, bias_x: Tensor) -> tuple[Tensor, Tensor]:
    """(gate_a, gate_x) [B, T, D]; see op.py."""
    x, weight_a, bias_a, weight_x, bias_x = (t.contiguous() for t in (x, weight_a, bias_a, weight_x, bias_x))
    gate_a, gate_x = torch.empty_like(x), torch.empty_like(x)
    tokens, cut = x.numel() // x.shape[-1], plan(weight_a, FORWARD)
    workers = cut.workers(tokens)
    with on(x):
        _forward[cut.grid(workers)](
            x, weight_a, bias_a, weight_x, bias_x, gate_a, gate_x, tokens, workers, **cut.constants(operand(x))
        )
    return gate_a, gate_x


def backward(
    dgate_a: Tensor, dgate_x: Tensor, x: Tensor, weight_a: Tensor, weight_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [B, T, D], dweight [2, N, S, S], dbias [2, D]), gate a's first."""
    dgate_a, dgate_x, x, weight_a, weight_x = (t.contiguous() for t in (dgate_a, dgate_x, x, weight_a, weight_x))
    return input_gradient(dgate_a, dgate_x, weight_a, weight_x), *weight_gradients(dgate_a, dgate_x, x, weight_a)


def input_gradient(dgate_a: Tensor, dgate_x: Tensor, weight_a: Tensor, weight_x: Tensor) -> Tensor:
    """dx; all contiguous."""
    dx = torch.empty_like(dgate_a)
    tokens, cut = dx.numel() // dx.shape[-1], plan(weight_a, INPUTS)
    workers = cut.workers(tokens)
    with on(dx):
        _inputs[cut.grid(workers)](
            dgate_a, dgate_x, weight_a, weight_x, dx, tokens, workers, **cut.constants(operand(dx))
        )
    return dx


def weight_gradients(dgate_a: Tensor, dgate_x: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dweight, dbias) of both gates; all contiguous."""
    tokens, cut = x.numel() // x.shape[-1], plan(weight, WEIGHTS)
    workers = cut.workers(tokens, 2)
    dweight = torch.empty(workers, 2, *weight.shape, dtype=torch.float32, device=x.device)
    dbias = torch.empty(workers, 2, x.shape[-1], dtype=torch.float32, device=x.device)
    with on(x):
        _weights[cut.grid(workers, 2)](
            x, dgate_a, dgate_x, dweight, dbias, tokens, workers, **cut.constants(operand(x), 64)
        )
    # Of parts so wide torch.sum is as fast.
    return dweight.sum(0).to(weight.dtype), sum_partials(dbias, weight.dtype)

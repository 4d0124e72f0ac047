"""What context parallelism adds to a scan: the passes that summarize a piece, and their mirror in the backward pass.

`python -m benchmarks.kernels_context --tune` times those of the RG-LRU under other cuts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longscan.kernels import (
    linear_attention,
    linear_attention_summarize,
    rg_lru,
    rg_lru_summarize,
    taylor_attention,
    taylor_attention_summarize,
)
from longscan.kernels.linear_scan.chain import Tile
from longscan.kernels.rg_lru import kernel as gated

from .gpu_timing import Work, time_or_error

# A piece of a row of 32,768 tokens on 2 ranks.
TOKENS, WIDTH, HEADS = 16384, 2560, 16
# rows, steps, block, warps, registers
TILES = [
    (16, 16, 32, 8, 128),
    (16, 16, 32, 8, None),
    (16, 8, 32, 8, 64),
    (16, 32, 32, 8, 128),
    (8, 32, 64, 8, 128),
    (8, 16, 64, 8, None),
    (32, 8, 32, 8, 128),
]


def works() -> Iterator[Work]:
    """Of each op the summary, and its adjoint as it runs in the backward pass."""
    x, gate_a, gate_x = (_draw(1, TOKENS, WIDTH) for _ in range(3))
    gates = [x, gate_a, gate_x, torch.full((WIDTH,), -4.0, device="cuda")]
    yield from _both("rg_lru", f"(1, {TOKENS}, {WIDTH}) bf16", rg_lru_summarize, rg_lru, gates, gates, 3, 2)
    q, k, v = (_draw(1, TOKENS, HEADS, width) for width in (16, 16, 64))
    where = f"(B, H, T) = (1, {HEADS}, {TOKENS})"
    size = f"{where} K 16 V 64 bf16"
    yield from _both("taylor_attention", size, taylor_attention_summarize, taylor_attention, [k, v], [q, k, v], 0, 0)
    q, k, v = (_draw(1, TOKENS, HEADS, 64).abs() for _ in range(3))
    grouped = {"group": 64}

    def summarize(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention_summarize(*inputs, **grouped)

    def op(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
        return linear_attention(*inputs, **grouped, **options)

    yield from _both("linear_attention", f"{where} K 64 V 64 groups of 64 bf16", summarize, op, [k, v], [q, k, v], 0, 0)


def _both(
    name: str, size: str, summarize: Callable, op: Callable, read: list[Tensor], inputs: list[Tensor], *passes: int
) -> Iterator[Work]:
    """Floors are of so many tensors as large as the first input, each way; 0 for all that is read."""
    forward, backward = passes
    floor = forward * read[0].nbytes or sum(t.nbytes for t in read)
    yield Work(f"{name} summary {size}", read, lambda *a: summarize(*a)[0], floor, floor)
    adjoint, y = adjoint_of(op, inputs)
    floor = backward * y.nbytes or inputs[0].nbytes + 2 * y.nbytes
    yield Work(f"{name} summary's adjoint {size}", [torch.randn_like(y)], adjoint, floor, floor)


def adjoint_of(op: Callable, inputs: list[Tensor]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(what the op's backward pass computes before it asks what comes from the right, the op's y)."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, _ = op(*leaves, from_right=lambda gradient: gradient)
    node = y.grad_fn
    needed = [t if t is None else t.detach() for t in node.saved_tensors]
    return lambda dy: node.adjoint(dy, *needed), y.detach()


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def candidates() -> None:
    """Prints the time of each cut of the RG-LRU's two passes, and of the others' as they are."""
    for work in works():
        for tile in TILES if work.name.startswith("rg_lru") else [None]:
            if tile:
                gated.SUMMARY = (Tile(*tile),) * 2
            run = time_or_error(lambda work=work: work.call(*work.inputs))
            print(f"{work.name} {tile or ''}: {run}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    if parser.parse_args().tune:
        candidates()

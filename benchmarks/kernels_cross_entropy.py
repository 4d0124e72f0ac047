"""Works of linear cross entropy, with torch.compile and, where installed, Liger's fused op; `--tune` times chunks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from longscan.kernels.cross_entropy import chunks, kernel, linear_cross_entropy, loss_from_pieces, vocabulary_pieces

from .gpu_timing import Work, milliseconds

SHAPES = ((16384, 2560, 32000),)


def inputs_of(rows: int, width: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    """([hidden, weight], labels) with logits of unit variance."""
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    return [hidden.requires_grad_(), weight.requires_grad_()], labels


def in_pieces(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The vocabulary-slice path, over one slice that is the whole."""
    pieces = vocabulary_pieces(hidden, weight, labels, implementation="triton")
    return loss_from_pieces(pieces, labels, weight.shape[0]).sum()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of losses as one writes it."""
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")


def works() -> Iterable[Work]:
    """Ours, its slice path and the peers of each shape. Forward alone takes the slice path."""
    for rows, width, vocabulary in SHAPES:
        inputs, labels = inputs_of(rows, width, vocabulary)
        moved = sum(t.nbytes for t in inputs)
        make = partial(
            Work,
            f"linear_cross_entropy {rows} x {width} x {vocabulary} bf16",
            inputs,
            forward_bytes=moved,
            both_bytes=3 * moved,
            forward_flops=2 * rows * width * vocabulary,
            both_flops=6 * rows * width * vocabulary,
        )
        yield make(partial(linear_cross_entropy, labels=labels, implementation="triton"))
        yield make(partial(in_pieces, labels=labels), impl="longscan, vocabulary slice")
        yield make(partial(torch.compile(plain), labels=labels), impl="torch.compile")
        if importlib.util.find_spec("liger_kernel"):
            yield make(partial(_liger(), labels=labels), impl="Liger fused")


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def candidates() -> None:
    """Prints the time forward and backward by chunk rows, the softmax alone by block and warps, and each product."""
    inputs, labels = inputs_of(*SHAPES[0])
    hidden, weight = (t.detach() for t in inputs)

    def both() -> None:
        torch.autograd.grad(linear_cross_entropy(*inputs, labels, implementation="triton"), inputs)

    standing = chunks.chunk_rows
    for rows in (1024, 1920, 2048, 4096, 16384):
        chunks.chunk_rows = lambda _, rows=rows: rows
        print(f"linear_cross_entropy, chunks of {rows}: {milliseconds(both, 5, 2):.3f} ms", flush=True)
    chunks.chunk_rows = standing
    logits = torch.empty(1920, weight.shape[0], device="cuda", dtype=torch.bfloat16)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    dhidden = torch.empty(1920, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    part = hidden[:1920]
    products = {
        "logits": lambda: torch.mm(part, weight.t(), out=logits),
        "dhidden": lambda: torch.mm(logits, weight, out=dhidden),
        "dweight": lambda: chunks._accumulate(dweight, logits, part, first=False),
        "dweight, first": lambda: chunks._accumulate(dweight, logits, part, first=True),
    }
    for name, run in products.items():
        print(f"product of 1920 rows, {name}: {milliseconds(run, 10, 2):.3f} ms", flush=True)
    for block, warps in ((4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)):
        kernel.BLOCK, kernel.WARPS = block, warps
        run = partial(kernel.loss_and_gradient_, logits, labels[:1920], -100, 0.0, 0.0, 0.0)
        print(f"softmax of 1920 rows, block {block}, {warps} warps: {milliseconds(run, 10, 2):.3f} ms", flush=True)


def main() -> None:
    """`--tune` prints the candidates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.parse_args()
    candidates()


if __name__ == "__main__":
    main()

"""Works of linear cross entropy, with torch.compile and, where installed, Liger's fused op; `--tune` times the
parts of a chunk and sizes of chunks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from longscan.kernels.cross_entropy import chunks, kernel, linear_cross_entropy, loss_from_pieces, vocabulary_pieces

from .gpu_timing import Work, milliseconds, time_or_error

# The table's; GPT-2's vocabulary, whose rows are of no whole number of 16 bytes; Llama 3's.
SHAPES = ((16384, 2560, 32000), (16384, 2560, 50257), (8192, 4096, 128256))
# Rows of the table's shape, otherwise.
LENGTHS = (2048, 4096, 65536, 131072)
# The H100's processors.
SMS = 132


def inputs_of(rows: int, width: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    """([hidden, weight], labels) with logits of unit variance."""
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    return [hidden.requires_grad_(), weight.requires_grad_()], labels


def _pieces(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The vocabulary-slice path, over one slice that is the whole."""
    pieces = vocabulary_pieces(hidden, weight, labels, implementation="triton")
    return loss_from_pieces(pieces, labels, weight.shape[0]).sum()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of losses as one writes it."""
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")


def works() -> Iterable[Work]:
    """Ours, its slice path and the peers of each shape. Forward alone takes the slice path."""
    for rows, width, vocabulary in (*SHAPES, *((rows, *SHAPES[0][1:]) for rows in LENGTHS)):
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
        yield make(partial(_pieces, labels=labels), impl="longscan, vocabulary slice")
        yield make(partial(torch.compile(plain), labels=labels), impl="torch.compile")
        if importlib.util.find_spec("liger_kernel"):
            yield make(partial(_liger(), labels=labels), impl="Liger fused")


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def candidates() -> None:
    """Prints the times of the softmax passes by their cuts, of a chunk's parts, and of the whole by its chunks."""
    inputs, labels = inputs_of(*SHAPES[0])
    hidden, weight = (t.detach() for t in inputs)
    for vocabulary in VOCABULARIES:
        _print_softmax(vocabulary, labels[: 3328 * 32000 // vocabulary])
    count, width = hidden.shape
    for name, whole in (("rows whole", kernel.WHOLE), ("rows by parts", 0)):
        with _set(kernel, "WHOLE", whole):
            _print(f"sum, {name}", partial(_both, linear_cross_entropy, inputs, labels), 7)
            _print(f"slice, {name}", partial(_both, _pieces, inputs, labels), 7)
            _print(f"slice, forward, {name}", lambda: chunks.pieces(kernel, hidden, weight, labels, 0.0))
    for rows in (3328, 4096):
        _print_parts(hidden, weight, labels, rows)
    for rows in (chunks.chunk_rows(count, width, SMS), 4096, 4608, count):
        with _set(chunks, "chunk_rows", lambda *_, rows=rows: rows):
            _print(f"sum, chunks of {rows} rows", partial(_both, linear_cross_entropy, inputs, labels), 7)
    for columns in (chunks.chunk_columns(count, *weight.shape, SMS), 10752, 6400):
        with _set(chunks, "chunk_columns", lambda *_, columns=columns: columns):
            _print(f"slice, chunks of {columns} columns", partial(_both, _pieces, inputs, labels), 7)


def _print(name: str, run: Callable[[], object], repeat: int = 10, flops: int = 0) -> None:
    time = milliseconds(run, repeat, 2)
    print(f"{name}: {time:.3f} ms" + (f", {flops / time / 1e9:.0f} TFLOP/s" if flops else ""), flush=True)


@contextlib.contextmanager
def _set(module: ModuleType, name: str, value: object) -> Iterator[None]:
    standing = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, standing)


def _both(call: Callable[..., Tensor], inputs: list[Tensor], labels: Tensor) -> None:
    torch.autograd.grad(call(*inputs, labels), inputs)


# The label that is ignored, no z-loss, no smoothing, no soft cap.
PLAIN = (-100, 0.0, 0.0, 0.0)


def _print_parts(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> None:
    """The products and the softmax of one chunk, and of a larger one the product for dhidden in two parts."""
    hidden, labels, flops = hidden[:rows], labels[:rows], 2 * rows * weight.numel()
    logits = torch.empty(rows, weight.shape[0], device="cuda", dtype=torch.bfloat16)
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    losses = torch.empty(rows, device="cuda")

    _print(f"{rows} rows, logits", lambda: torch.mm(hidden, weight.t(), out=logits), flops=flops)
    _print(f"{rows} rows, softmax", lambda: kernel.loss_and_gradient_(logits, labels, *PLAIN, losses))
    _print(f"{rows} rows, dhidden", lambda: torch.mm(logits, weight, out=dhidden), flops=flops)
    for first in (True, False):
        run = partial(chunks._accumulate, dweight, logits.t(), hidden, first)
        _print(f"{rows} rows, dweight {'=' if first else '+='}", run, flops=flops)
    for some in (3328, rows - 3328) if rows > 3328 else ():
        run = partial(torch.mm, logits[:some], weight, out=dhidden[:some])
        _print(f"{rows} rows, dhidden of {some}", run, flops=flops * some // rows)
    _print("dweight to bf16", lambda: dweight.to(torch.bfloat16))


# Bytes of rows kept whole, values a thread, rows in hand, warps of a processor; then columns and warps where not, for
# sums as for gradients.
SOFTMAX = [
    (65536, 64, 3, 16, 32768, 32),
    (65536, 32, 3, 32, 8192, 8),
    (65536, 64, 2, 16, 8192, 16),
    (65536, 64, 4, 16, 16384, 16),
    (65536, 32, 2, 32, 16384, 32),
    (65536, 64, 1, 16, 4096, 4),
    (0, 64, 3, 16, 4096, 8),
]
VOCABULARIES = (32000, 50257, 128256, 256000)


def _print_softmax(vocabulary: int, labels: Tensor) -> None:
    columns = chunks.aligned(vocabulary, 2)
    logits = torch.randn(labels.shape[0], columns, device="cuda", dtype=torch.bfloat16)[:, :vocabulary]
    labels = labels % vocabulary
    losses, *by = torch.rand(5, labels.shape[0], device="cuda")
    names = ("WHOLE", "VALUES", "STAGES", "PROCESSOR_WARPS", "BLOCK", "WARPS", "SUMS", "SUMS_WARPS")
    for sizes in SOFTMAX:
        with contextlib.ExitStack() as standing:
            for name, size in zip(names, (*sizes, *sizes[-2:]), strict=True):
                standing.enter_context(_set(kernel, name, size))
            label = ", ".join([f"{vocabulary} columns", *(f"{n} {s}" for n, s in zip(names, sizes, strict=False))])
            time = time_or_error(lambda: kernel.loss_and_gradient_(logits, labels, *PLAIN, losses))
            print(f"loss and gradient, {label}: {time}", flush=True)
            time = time_or_error(lambda: kernel.statistics(logits, labels, 0.0, by))
            print(f"statistics, {label}: {time}", flush=True)
    for part, warps in ((2048, 4), (1024, 4), (4096, 8), (8192, 8)):
        with _set(kernel, "PART", part), _set(kernel, "PART_WARPS", warps):
            time = time_or_error(lambda: kernel.gradient_(logits, labels, by, 0.0))
            print(f"gradient, {part} columns, {warps} warps: {time}", flush=True)


def main() -> None:
    """`--tune` prints the candidates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.parse_args()
    candidates()


if __name__ == "__main__":
    main()

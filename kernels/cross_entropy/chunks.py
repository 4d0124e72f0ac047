"""The chunk loops of cross entropy: matrix products around the softmax of reference.py or kernel.py.

One chunk of logits exists at a time, in the dtype of the hidden states, and becomes its own gradient in place. A
gradient to which every chunk adds is summed in fp32 (fp64 for fp64), in the order of the chunks: the weight's where a
chunk is a block of rows, that of the hidden states where it is a block of the vocabulary. 16-bit logits of few rows
take little more memory than such a sum: they may be one chunk, and no sum is needed.

Rows of logits begin at multiples of 16 bytes. A vocabulary that is no whole number of those gets columns more: those of
a copy of the weight with rows of zeros, whose logits' gradients are 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import processors
from ..sizes import cdiv
from .reference import Pieces, compute_dtype

# The least rows or columns of one of several chunks, below which the sum over chunks costs more than the products, and
# the most rows, above which memory buys nothing more.
FEWEST, MOST_ROWS = 1024, 5120
# The outputs that one processor of a GPU makes at a time in cuBLAS's fastest product.
TILE, TILE_WIDTH = 128, 256
# Such a vocabulary is rounded up to a multiple of this. By 50,257 columns cuBLAS multiplies at an eighth of its rate,
# and the softmax passes move two bytes at a time.
ALIGNED = 16


def at_once(rows: int, width: int) -> bool:
    """Whether 16-bit logits of all rows take at most 1/8 of themselves and an fp32 gradient of the weight.

    One chunk needs no such sum.
    """
    return rows - rows // 8 <= 2 * width


def chunk_rows(rows: int, width: int, processors: int) -> int:
    """Rows a chunk. Its logits take 1/8 of all, and the room of the 16-bit gradient of the weight, not made yet.

    A copy of the weight comes on top.
    """
    return _filling(rows, min(MOST_ROWS, rows // 8 + width), width, processors)


def chunk_columns(rows: int, columns: int, width: int, processors: int) -> int:
    """Columns a chunk, of a vocabulary above `rows`.

    Its logits take 1/8 of all, and the room of an fp32 gradient of the weight less that of the hidden states' sum.
    """
    return _filling(columns, columns // 8 + 2 * columns * width // rows - width, width, processors)


@functools.cache
def _filling(size: int, most: int, width: int, processors: int) -> int:
    """The part of `size` a chunk takes: at most `most`, and of the upper half of that what wastes least of a GPU.

    The chunk's product with `width` columns has few tiles, and its last round may leave processors idle: 1920 rows of
    width 2560 make 150 tiles, which take 132 processors two rounds; 3328 rows make 260, and take two as well.
    """
    most = max(FEWEST, most)
    if size <= most:
        return size

    def filled(tiles: int) -> float:
        tiles *= -(-width // TILE_WIDTH)
        return tiles / (-(-tiles // processors) * processors)

    tiles = most // TILE
    return TILE * max(range(tiles // 2 + 1, tiles + 1), key=lambda count: (filled(count), count))


class Differentiate(Protocol):
    """`loss_and_gradient_` of reference.py or kernel.py with its options."""

    def __call__(self, logits: Tensor, labels: Tensor, *, out: Tensor) -> None:
        """Writes losses to `out` [n], over the logits [n, V] the gradient of the losses' sum."""


# What is kept for the gradient of the weight: that itself, a sum over chunks; the gradient of the logits, which are one
# chunk then; or nothing, since it is frozen.
Keep = Literal["gradient", "logits", "nothing"]


def loss_and_gradients(
    differentiate: Differentiate, hidden: Tensor, weight: Tensor, labels: Tensor, keep: Keep
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], gradient of hidden, what is kept) of the sum of the losses: three matrix products, else two.

    Logits that are kept make the weight's gradient once the scale of the loss is known, with which few hidden states
    are multiplied sooner than a large table.
    """
    losses = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))

    def differentiate_(logits: Tensor, rows: slice) -> None:
        differentiate(logits, labels[rows], out=losses[rows])

    return losses, *_gradients_by_rows(differentiate_, hidden, weight, keep)


def weight_gradient(dlogits: Tensor, hidden: Tensor, vocabulary: int) -> Tensor:
    """The gradient of the weight [V, D], of which a vocabulary that is rounded up has rows more in memory."""
    dweight = hidden.new_empty(dlogits.shape[1], hidden.shape[1])
    return torch.mm(dlogits.t(), hidden, out=dweight)[:vocabulary]


def pieces(softmax: ModuleType, hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> Pieces:
    """(highest, total, target, spread) [N] over the rows of `weight`, with labels counted from its first."""
    highest, total, target, spread = (hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden)) for _ in range(4))
    for rows, _, within, _ in _row_chunks(hidden, _aligned(weight), weight.shape[0]):
        softmax.statistics(within, labels[rows], cap, (highest[rows], total[rows], target[rows], spread[rows]))
    return highest, total, target, spread


def pieces_gradients(
    softmax: ModuleType, hidden: Tensor, weight: Tensor, labels: Tensor, by: Pieces, cap: float, frozen: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, that of weight, empty if `frozen`) from logits computed anew; a sum over chunks in fp32.

    `by` is every row's highest and the gradients of total, target and spread. With the highest known, chunks may be of
    rows or of columns: whichever leaves the smaller sum to be read and written once a chunk.
    """
    vocabulary = weight.shape[0]

    def differentiate_(logits: Tensor, rows: slice) -> None:
        highest, by_total, by_target, by_spread = (each[rows] for each in by)
        softmax.gradient_(logits, labels[rows], (highest, by_total, by_target, by_spread), cap)

    if frozen:
        return _gradients_by_rows(differentiate_, hidden, weight, "nothing")
    if hidden.element_size() == 2 and at_once(*hidden.shape):
        dhidden, dlogits = _gradients_by_rows(differentiate_, hidden, weight, "logits")
        return dhidden, weight_gradient(dlogits, hidden, vocabulary)
    if hidden.shape[0] >= vocabulary:
        return _gradients_by_rows(differentiate_, hidden, weight, "gradient")
    weight = _aligned(weight)
    dhidden, dweight = _sum_like(hidden), torch.empty_like(weight)
    for columns, logits, within, beyond in _column_chunks(hidden, weight, vocabulary):
        softmax.gradient_(within, labels, by, cap, columns.start)
        beyond.zero_()
        torch.mm(logits.t(), hidden, out=dweight[columns])
        _accumulate(dhidden, logits, weight[columns], first=columns.start == 0)
    return dhidden, dweight[:vocabulary]


def _gradients_by_rows(
    differentiate_: Callable[[Tensor, slice], None], hidden: Tensor, weight: Tensor, keep: Keep
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, what is kept), with a function that makes of some rows' logits their gradient in place.

    Logits that are kept have the columns of a weight that is rounded up.
    """
    vocabulary, weight = weight.shape[0], _aligned(weight)
    dhidden, kept = torch.empty_like(hidden), hidden.new_empty(0)
    dweight = _sum_like(weight) if keep == "gradient" else None
    for rows, logits, within, beyond in _row_chunks(hidden, weight, vocabulary, once=keep == "logits"):
        differentiate_(within, rows)
        beyond.zero_()
        torch.mm(logits, weight, out=dhidden[rows])
        if dweight is not None:
            _accumulate(dweight, logits.t(), hidden[rows], first=rows.start == 0)
        elif keep == "logits":
            kept = logits
    return dhidden, kept if dweight is None else dweight[:vocabulary]


def aligned(vocabulary: int, element: int) -> int:
    """The columns of a row of logits of `element` bytes each."""
    return vocabulary if vocabulary * element % 16 == 0 else cdiv(vocabulary, ALIGNED) * ALIGNED


def _aligned(weight: Tensor) -> Tensor:
    missing = aligned(weight.shape[0], weight.element_size()) - weight.shape[0]
    return F.pad(weight, [0, 0, 0, missing]) if missing else weight


Chunk = tuple[slice, Tensor, Tensor, Tensor]


def _row_chunks(hidden: Tensor, weight: Tensor, vocabulary: int, once: bool = False) -> Iterator[Chunk]:
    """(rows, their logits, those within the vocabulary, those beyond) in order, all in one buffer."""
    count, width = hidden.shape
    step = count if once else min(count, chunk_rows(count, width, processors(hidden)))
    buffer = hidden.new_empty(step * weight.shape[0])
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        logits = _logits(hidden[rows], weight, buffer)
        yield rows, logits, logits[:, :vocabulary], logits[:, vocabulary:]


def _column_chunks(hidden: Tensor, weight: Tensor, vocabulary: int) -> Iterator[Chunk]:
    """(columns, their logits, those within the vocabulary, those beyond: of the last chunk) in order, in one buffer."""
    step = min(vocabulary, chunk_columns(hidden.shape[0], vocabulary, weight.shape[1], processors(hidden)))
    buffer = hidden.new_empty(hidden.shape[0] * (step + weight.shape[0] - vocabulary))
    for start in range(0, vocabulary, step):
        stop = start + step
        columns = slice(start, stop if stop < vocabulary else weight.shape[0])
        logits = _logits(hidden, weight[columns], buffer)
        yield columns, logits, logits[:, : vocabulary - start], logits[:, vocabulary - start :]


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    rows, columns = hidden.shape[0], weight.shape[0]
    return torch.mm(hidden, weight.t(), out=buffer[: rows * columns].view(rows, columns))


def _sum_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, dtype=compute_dtype(tensor))


def _accumulate(into: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """into += left right, or = for the first chunk; on a GPU 16-bit factors meet an fp32 sum in cuBLAS."""
    beta = 0 if first else 1
    if left.is_cuda and left.dtype != into.dtype:
        torch.ops.aten.addmm.dtype_out(into, left, right, into.dtype, beta=beta, out=into)
    else:
        torch.addmm(into, left.to(into.dtype), right.to(into.dtype), beta=beta, out=into)

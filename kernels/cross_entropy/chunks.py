"""The chunk loops of cross entropy: matrix products around the softmax of reference.py or kernel.py.

One chunk of logits exists at a time, in the dtype of the hidden states, and becomes its own gradient in place. The
gradient of the weight is summed in fp32 (fp64 for fp64), in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from .reference import Pieces, compute_dtype

# A chunk's rows: below 1/8 of all, so that its logits are; each chunk reads and writes the fp32 gradient of the weight
# once, which below about 1024 rows costs more than its products, and beyond 4096 costs nothing to speak of.
FEWEST_ROWS, MOST_ROWS, STEP = 1024, 4096, 128


def chunk_rows(rows: int) -> int:
    """Rows a chunk."""
    return max(FEWEST_ROWS, min(MOST_ROWS, (rows // 8 - 1) // STEP * STEP))


def loss_and_gradients(
    softmax: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignored: int,
    z_loss: float,
    smoothing: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], gradient of hidden, gradient of weight in fp32) of the sum of the losses: three matrix products."""
    losses = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    dhidden, dweight = torch.empty_like(hidden), _weight_gradient(weight)
    for rows, logits in _chunks(hidden, weight):
        losses[rows] = softmax.loss_and_gradient_(logits, labels[rows], ignored, z_loss, smoothing, cap)
        torch.mm(logits, weight, out=dhidden[rows])
        _accumulate(dweight, logits, hidden[rows], first=rows.start == 0)
    return losses, dhidden, dweight


def pieces(softmax: ModuleType, hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> Pieces:
    """(highest, total, target, spread) [N] over the rows of `weight`, with labels counted from its first."""
    outputs = hidden.new_empty(4, hidden.shape[0], dtype=compute_dtype(hidden))
    for rows, logits in _chunks(hidden, weight):
        for output, piece in zip(outputs, softmax.statistics(logits, labels[rows], cap), strict=True):
            output[rows] = piece
    highest, total, target, spread = (output.clone() for output in outputs)
    return highest, total, target, spread


def pieces_gradients(
    softmax: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    highest: Tensor,
    by_total: Tensor,
    by_target: Tensor,
    by_spread: Tensor,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight in fp32), from logits computed anew."""
    dhidden, dweight = torch.empty_like(hidden), _weight_gradient(weight)
    for rows, logits in _chunks(hidden, weight):
        by = (t[rows] for t in (highest, by_total, by_target, by_spread))
        softmax.gradient_(logits, labels[rows], *by, cap)
        torch.mm(logits, weight, out=dhidden[rows])
        _accumulate(dweight, logits, hidden[rows], first=rows.start == 0)
    return dhidden, dweight


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [n, V]) in order, all in one buffer."""
    count = hidden.shape[0]
    step = min(count, chunk_rows(count))
    buffer = hidden.new_empty(step, weight.shape[0])
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        logits = buffer[: rows.stop - start]
        torch.mm(hidden[rows], weight.t(), out=logits)
        yield rows, logits


def _weight_gradient(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=compute_dtype(weight))


def _accumulate(dweight: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
    """dweight += dlogits^T hidden, or = for the first chunk; on a GPU 16-bit factors meet the fp32 sum in cuBLAS."""
    beta = 0 if first else 1
    if dlogits.is_cuda and dlogits.dtype != dweight.dtype:
        run = torch.ops.aten.addmm.dtype_out
        run(dweight, dlogits.t(), hidden, dweight.dtype, beta=beta, out=dweight)
    else:
        factors = dlogits.t().to(dweight.dtype), hidden.to(dweight.dtype)
        torch.addmm(dweight, *factors, beta=beta, out=dweight)

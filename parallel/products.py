"""Products with divided weights and what tensor ranks exchange around them, on its way while products are computed.

With `divided` tokens a rank holds T / size of each row's: what column linears read is gathered, what row linears give
is summed and scattered; without, each rank holds all, and sums. Rows travel one by one, each as soon as it is there:
exposed are the gather of half of the first row at two ranks, and the sum of the last. In the backward pass the sums
hide behind the weights' gradients, of which nothing travels. Many short rows pay for one exchange each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# A weight [N, D] and a bias [N] or None.
Matrix = tuple[Tensor, Tensor | None]


def project(x: Tensor, matrices: Sequence[Matrix], group: dist.ProcessGroup, divided: bool) -> tuple[Tensor, ...]:
    """`x W^T + b` [B, T, N] for each matrix; the gradient of x is summed over the ranks.

    Args:
        x: [B, T, D], the same on every rank; [B, T / size, D] where tokens are divided. Or [B, D], for [B, N].
        matrices: this rank's.
        group: the tensor ranks.
        divided: whether a rank holds some of the tokens.
    """
    if x.ndim == 2:
        return tuple(y[0] for y in project(x[None], matrices, group, divided))
    weights, biases = zip(*matrices, strict=True)
    return _Project.apply(x, group, divided, *weights, *biases)


def sum_products(h: Tensor, weight: Tensor, group: dist.ProcessGroup, divided: bool) -> Tensor:
    """The sum over the ranks of `h W^T` [B, T, D]; [B, T / size, D] of it where tokens are divided.

    Args:
        h: [B, T, N], this rank's channels of every token; or [B, N], for [B, D].
        weight: [D, N], this rank's.
        group, divided: as in `project`.
    """
    if h.ndim == 2:
        return sum_products(h[None], weight, group, divided)[0]
    return _SumProducts.apply(h, weight, group, divided)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, divided: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        whole, arriving = _arriving(x, group, divided)
        outputs = [x.new_empty(*whole.shape[:2], len(weight)) for weight in weights]
        for tokens, part in arriving:
            for weight, bias, y in zip(weights, biases, outputs, strict=True):
                _multiply(part, weight.t(), bias, y.flatten(0, 1)[tokens])
        trained = any(ctx.needs_input_grad[3 : 3 + len(weights)])
        ctx.save_for_backward(whole if trained else None, *weights)
        ctx.group, ctx.divided = group, divided
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        leaving = _of_inputs(dys, weights, ctx.group, ctx.divided) if ctx.needs_input_grad[0] else None
        needed = ctx.needs_input_grad[3 : 3 + len(dys)], ctx.needs_input_grad[3 + len(dys) :]
        of_weights = [_of_weight(dy, whole) if need else None for dy, need in zip(dys, needed[0], strict=True)]
        of_biases = [dy.sum((0, 1)) if need else None for dy, need in zip(dys, needed[1], strict=True)]
        return leaving.sums() if leaving else None, None, None, *of_weights, *of_biases


class _SumProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, group: dist.ProcessGroup, divided: bool) -> Tensor:
        leaving = _Leaving(h, len(weight), group, divided)
        for row, part in leaving.rows():
            torch.mm(h[row], weight.t(), out=part)
            leaving.send(row, part)
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.divided = group, divided
        return leaving.sums()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        whole, arriving = _arriving(grads[0], ctx.group, ctx.divided)
        dh = whole.new_empty(*whole.shape[:2], weight.shape[1])
        for tokens, part in arriving:
            torch.mm(part, weight, out=dh.flatten(0, 1)[tokens])
        return dh, _of_weight(whole, h) if ctx.needs_input_grad[1] else None, None, None


def _of_inputs(dys: Sequence[Tensor], weights: Sequence[Tensor], group: dist.ProcessGroup, divided: bool) -> _Leaving:
    """The gradient of what all the weights multiply, on its way."""
    leaving = _Leaving(dys[0], weights[0].shape[1], group, divided)
    for row, part in leaving.rows():
        torch.mm(dys[0][row], weights[0], out=part)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            part.addmm_(dy[row], weight)
        leaving.send(row, part)
    return leaving


def _of_weight(dy: Tensor, x: Tensor) -> Tensor:
    return dy.flatten(0, 1).t() @ x.flatten(0, 1)


def _multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def _arriving(x: Tensor, group: dist.ProcessGroup, divided: bool) -> tuple[Tensor, Iterable[tuple[slice, Tensor]]]:
    """(all tokens [B, T, D], which of them, rows laid end to end, hold what, as they arrive)."""
    if not divided:
        return x, [(slice(None), x.flatten(0, 1))]
    x = x.contiguous()
    rows, tokens, width = x.shape
    whole = x.new_empty(rows, group.size() * tokens, width)
    works = [
        dist.all_gather_into_tensor(there, here, group=group, async_op=True)
        for there, here in zip(whole, x, strict=True)
    ]
    return whole, _arrive(x, whole, group.rank(), works)


def _arrive(x: Tensor, whole: Tensor, rank: int, works: list[Any]) -> Iterator[tuple[slice, Tensor]]:
    """This rank's tokens of the first row, which need not arrive; the others of it; then row by row."""
    tokens, span, flat = x.shape[1], whole.shape[1], whole.flatten(0, 1)
    begin, end = rank * tokens, (rank + 1) * tokens
    yield slice(begin, end), x[0]
    for row, work in enumerate(works):
        work.wait()
        for part in [slice(0, begin), slice(end, span)] if row == 0 else [slice(row * span, (row + 1) * span)]:
            if part.start < part.stop:
                yield part, flat[part]


class _Leaving:
    """Sums over the ranks of parts [B, T, D], which leave row by row.

    Args:
        like: [B, T, ...], of the parts' dtype and device.
        width: D.
        group, divided: as in `project`.
    """

    def __init__(self, like: Tensor, width: int, group: dist.ProcessGroup, divided: bool) -> None:
        rows, self.tokens = like.shape[:2]
        self.group, self.divided = group, divided
        self.totals = like.new_empty(rows, self.tokens // group.size() if divided else self.tokens, width)
        self.works: list[Any] = []

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Each row and where its part [T, D] is to be written."""
        for row, total in enumerate(self.totals):
            yield row, total.new_empty(self.tokens, total.shape[1]) if self.divided else total

    def send(self, row: int, part: Tensor) -> None:
        """Begins to sum the row."""
        if self.divided:
            work = dist.reduce_scatter_tensor(self.totals[row], part, group=self.group, async_op=True)
        else:
            work = dist.all_reduce(part, group=self.group, async_op=True)
        self.works.append(work)

    def sums(self) -> Tensor:
        """All sums: [B, T, D], or this rank's [B, T / size, D]."""
        for work in self.works:
            work.wait()
        return self.totals

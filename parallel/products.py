"""Products with divided weights and what tensor ranks exchange around them, on its way while products are computed.

With `divided` tokens a rank holds T / size of each row's: what column linears read is gathered, what row linears give
is summed and scattered; without, each rank holds all, and sums. Rows travel one by one, each as soon as it is there:
exposed are the gather of half of the first row at two ranks, and the sum of the last. In the backward pass the sums
hide behind the weights' gradients, of which nothing travels. Many short rows pay for one exchange each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# A weight [N, D] and a bias [N] or None.
Matrix = tuple[Tensor, Tensor | None]
# Writes a product's rows of these numbers into a tensor [rows, D].
Fill = Callable[[slice, Tensor], None]


class Exchange:
    """How tensor ranks exchange rows: by collectives of their group. A call returns at once what waits for its result.

    Every rank asks for the same in turn.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def all_gather(self, whole: Tensor, x: Tensor) -> Callable[[], object]:
        """Fills `whole` [size * T, D] with each rank's x [T, D]; both are contiguous."""
        return _begun(dist.all_gather_into_tensor(whole, x, group=self.group, async_op=True))

    def reduce_scatter(self, total: Tensor, fill: Fill, last: bool) -> Callable[[], object]:
        """Fills `total` [T, D] with this rank's tokens of the sum of what `fill` writes on each rank, [size * T, D].

        Args:
            total: of the dtype and device of all.
            fill: writes what belongs to these tokens.
            last: nothing is computed before the result is waited for.
        """
        parts = total.new_empty(self.size * len(total), total.shape[1])
        fill(slice(0, len(parts)), parts)
        return _begun(dist.reduce_scatter_tensor(total, parts, group=self.group, async_op=True))

    def all_reduce(self, x: Tensor) -> Callable[[], object]:
        """Sums x over the ranks in place."""
        return _begun(dist.all_reduce(x, group=self.group, async_op=True))


def _begun(work: dist.Work | None) -> Callable[[], object]:
    assert work is not None, "this rank is not in the group"
    return work.wait


def project(x: Tensor, matrices: Sequence[Matrix], exchange: Exchange, divided: bool) -> tuple[Tensor, ...]:
    """`x W^T + b` [B, T, N] for each matrix; the gradient of x is summed over the ranks.

    Args:
        x: [B, T, D], the same on every rank; [B, T / size, D] where tokens are divided. Or [B, D], for [B, N].
        matrices: this rank's.
        exchange: with the tensor ranks.
        divided: whether a rank holds some of the tokens.
    """
    if x.ndim == 2:
        return tuple(y[0] for y in project(x[None], matrices, exchange, divided))
    weights, biases = zip(*matrices, strict=True)
    return _Project.apply(x, exchange, divided, *weights, *biases)


def sum_products(h: Tensor, weight: Tensor, exchange: Exchange, divided: bool) -> Tensor:
    """The sum over the ranks of `h W^T` [B, T, D]; [B, T / size, D] of it where tokens are divided.

    Args:
        h: [B, T, N], this rank's channels of every token; or [B, N], for [B, D].
        weight: [D, N], this rank's.
        exchange, divided: as in `project`.
    """
    if h.ndim == 2:
        return sum_products(h[None], weight, exchange, divided)[0]
    return _SumProducts.apply(h, weight, exchange, divided)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, divided: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        whole, arriving = _arriving(x, exchange, divided)
        outputs = [x.new_empty(*whole.shape[:2], len(weight)) for weight in weights]
        for tokens, part in arriving:
            for weight, bias, y in zip(weights, biases, outputs, strict=True):
                _multiply(part, weight.t(), bias, y.flatten(0, 1)[tokens])
        trained = any(ctx.needs_input_grad[3 : 3 + len(weights)])
        ctx.save_for_backward(whole if trained else None, *weights)
        ctx.exchange, ctx.divided = exchange, divided
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        sums = _of_inputs(dys, weights, ctx.exchange, ctx.divided) if ctx.needs_input_grad[0] else None
        needed = ctx.needs_input_grad[3 : 3 + len(dys)], ctx.needs_input_grad[3 + len(dys) :]
        of_weights = [_of_weight(dy, whole) if need else None for dy, need in zip(dys, needed[0], strict=True)]
        of_biases = [dy.sum((0, 1)) if need else None for dy, need in zip(dys, needed[1], strict=True)]
        return sums and sums(), None, None, *of_weights, *of_biases


class _SumProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, exchange: Exchange, divided: bool) -> Tensor:
        flat = h.flatten(0, 1)  # Once, for it may be a copy.

        def multiply(tokens: slice, part: Tensor) -> None:
            torch.mm(flat[tokens], weight.t(), out=part)

        sums = _leaving(h, len(weight), exchange, divided, multiply)
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, weight)
        ctx.exchange, ctx.divided = exchange, divided
        return sums()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        whole, arriving = _arriving(grads[0], ctx.exchange, ctx.divided)
        dh = whole.new_empty(*whole.shape[:2], weight.shape[1])
        for tokens, part in arriving:
            torch.mm(part, weight, out=dh.flatten(0, 1)[tokens])
        return dh, _of_weight(whole, h) if ctx.needs_input_grad[1] else None, None, None


def _of_inputs(
    dys: Sequence[Tensor], weights: Sequence[Tensor], exchange: Exchange, divided: bool
) -> Callable[[], Tensor]:
    """The gradient of what all the weights multiply, on its way."""

    first, *rest = (dy.flatten(0, 1) for dy in dys)

    def multiply(tokens: slice, part: Tensor) -> None:
        torch.mm(first[tokens], weights[0], out=part)
        for dy, weight in zip(rest, weights[1:], strict=True):
            part.addmm_(dy[tokens], weight)

    return _leaving(dys[0], weights[0].shape[1], exchange, divided, multiply, last=False)


def _of_weight(dy: Tensor, x: Tensor) -> Tensor:
    return dy.flatten(0, 1).t() @ x.flatten(0, 1)


def _multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def _arriving(x: Tensor, exchange: Exchange, divided: bool) -> tuple[Tensor, Iterable[tuple[slice, Tensor]]]:
    """(all tokens [B, T, D], which of them, rows laid end to end, hold what, as they arrive)."""
    if not divided:
        return x, [(slice(None), x.flatten(0, 1))]
    x = x.contiguous()
    rows, tokens, width = x.shape
    whole = x.new_empty(rows, exchange.size * tokens, width)
    waits = [exchange.all_gather(there, here) for there, here in zip(whole, x, strict=True)]
    return whole, _arrive(x, whole, exchange.rank, waits)


def _arrive(x: Tensor, whole: Tensor, rank: int, waits: list[Callable[[], object]]) -> Iterator[tuple[slice, Tensor]]:
    """This rank's tokens of the first row, which need not arrive; the others of it; then row by row."""
    tokens, span, flat = x.shape[1], whole.shape[1], whole.flatten(0, 1)
    begin, end = rank * tokens, (rank + 1) * tokens
    yield slice(begin, end), x[0]
    for row, wait in enumerate(waits):
        wait()
        for part in [slice(0, begin), slice(end, span)] if row == 0 else [slice(row * span, (row + 1) * span)]:
            if part.start < part.stop:
                yield part, flat[part]


def _leaving(
    like: Tensor, width: int, exchange: Exchange, divided: bool, multiply: Fill, last: bool = True
) -> Callable[[], Tensor]:
    """Sums over the ranks of what `multiply` writes, on their way row by row.

    Called, what it returns waits for all, [B, T, D] or [B, T / size, D].

    Args:
        like: [B, T, ...], of the dtype and device of the sums.
        width: D.
        exchange, divided: as in `project`.
        multiply: of tokens, rows laid end to end.
        last: nothing is computed before the sums are asked for.
    """
    rows, span = like.shape[:2]
    totals = like.new_empty(rows, span // exchange.size if divided else span, width)
    waits = []
    for row, total in enumerate(totals):
        if divided:
            fill = partial(_within, multiply, row * span)
            waits.append(exchange.reduce_scatter(total, fill, last and row == rows - 1))
        else:
            multiply(slice(row * span, (row + 1) * span), total)
            waits.append(exchange.all_reduce(total))

    def sums() -> Tensor:
        for wait in waits:
            wait()
        return totals

    return sums


def _within(multiply: Fill, begin: int, tokens: slice, part: Tensor) -> None:
    multiply(slice(begin + tokens.start, begin + tokens.stop), part)

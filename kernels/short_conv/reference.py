"""The short causal convolution in PyTorch: S shifted multiply-adds, no unfolded copy of the input.

A tap reaches s tokens back and is dropped for tokens whose position in their document is below s. Taps go in the
order s = 0, 1, ..., so the gradient rows that a tap must not see are zeroed once and stay so for the taps after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu")


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    positions: Tensor | None,
    activation: str | None,
) -> Tensor:
    """y [B, T, D] in x's dtype; see op.py."""
    y = _preactivation(x, weight, bias, tail, positions)
    if activation == "silu":
        y = torch.nn.functional.silu(y, inplace=True)
    elif activation == "gelu":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    return y.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    positions: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dtail); dtail is [B, S - 1, D] of zeros where no tap reaches it."""
    batch, tokens, width = x.shape
    taps = weight.shape[1]
    dtype = _compute_dtype(x, weight)
    if activation is None:
        grad = dy.to(dtype, copy=True)
    else:
        before = _preactivation(x, weight, bias, tail, positions)
        grad = _through_activation(dy.to(dtype), before, activation)
    values, columns = x.to(dtype), _columns(weight, x.shape[2], dtype)
    dx = grad * columns[-1]
    dtail = dx.new_zeros(batch, taps - 1, width)
    dcolumns = torch.empty_like(columns)
    dcolumns[-1] = _contract(grad, values)
    dbias = grad.sum((0, 1))
    for s in range(1, taps):
        if positions is not None:
            grad[(positions == s - 1).nonzero(as_tuple=True)] = 0
        inner, column = min(s, tokens), columns[-1 - s]
        dx[:, : tokens - inner].addcmul_(grad[:, inner:], column)
        dcolumns[-1 - s] = _contract(grad[:, inner:], values[:, : tokens - inner])
        # The first tokens of the piece reach into the tail: token t sees entry t - s + S - 1 of it.
        entries = slice(taps - 1 - s, taps - 1 - s + inner)
        dtail[:, entries].addcmul_(grad[:, :inner], column)
        if tail is not None:
            dcolumns[-1 - s] += _contract(grad[:, :inner], tail[:, entries].to(dtype))
    dweight = dcolumns.view(taps, weight.shape[0], -1).sum(2).t()
    return dx.to(x.dtype), dweight.to(weight.dtype).contiguous(), dbias, dtail


def _preactivation(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, positions: Tensor | None
) -> Tensor:
    dtype = _compute_dtype(x, weight)
    tokens, taps = x.shape[1], weight.shape[1]
    values, columns = x.to(dtype), _columns(weight, x.shape[2], dtype)
    y = values * columns[-1]
    if bias is not None:
        y += bias.to(dtype)
    for s in range(1, taps):
        inner, column = min(s, tokens), columns[-1 - s]
        if positions is None:
            y[:, inner:].addcmul_(values[:, : tokens - inner], column)
        else:
            reached = values[:, : tokens - inner] * column
            reached[(positions[:, inner:] < s).nonzero(as_tuple=True)] = 0
            y[:, inner:] += reached
        if tail is not None:
            reached = tail[:, taps - 1 - s : taps - 1 - s + inner].to(dtype) * column
            if positions is not None:
                reached[(positions[:, :inner] < s).nonzero(as_tuple=True)] = 0
            y[:, :inner] += reached
    return y


def _columns(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[S, D]: the filter of every channel, those of a head repeated."""
    return weight.to(dtype).t().repeat_interleave(width // weight.shape[0], 1)


def _through_activation(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """The gradient at `before`, the activation's input."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, before)
    return torch.ops.aten.gelu_backward(grad, before, approximate="tanh")


def _contract(grad: Tensor, values: Tensor) -> Tensor:
    """[D]: the sum of grad * values over rows and tokens."""
    return (grad * values).sum((0, 1))


def _compute_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32

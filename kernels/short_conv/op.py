"""short_conv as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

Each pass is one step (opaque.py) to torch.compile and to activation checkpointing. Saved for the backward
pass: the inputs; the pre-activation is recomputed.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..checks import check_segments, check_tensor
from ..dispatch import resolve
from ..opaque import opaque
from ..segments import Segments
from . import reference


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    segments: Segments | None = None,
    *,
    activation: str | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, new_tail) of a causal depthwise convolution over S taps, differentiable in every input.

        y_t = activation(bias + sum_{s=0}^{S-1} weight[:, S-1-s] x_{t-s}),   taps across a document start dropped

    The temporal convolution of Griffin (arXiv 2402.19427, section 2.4) and of Based; sums are in fp32.

    Args:
        x: [B, T, D].
        weight: [D, S]; weight[:, -1] multiplies the current token. Or [H, S] with H a divisor of D: the D / H channels
            of a head share a filter.
        bias: [D], or None.
        tail: [B, S - 1, D], the inputs left of the piece, oldest first; None for zeros.
        segments: documents of the piece; None for one run of tokens that continues.
        activation: None, "silu" or "gelu" (its tanh form).
        implementation: "auto", "reference" or "triton".

    Returns:
        y: [B, T, D] in x's dtype.
        new_tail: [B, S - 1, D], the tail for the piece that follows; of at least S - 1 tokens a view of x.
    """
    _check(x, weight, bias, tail, segments, activation)
    positions = None if segments is None else segments.positions
    y = _forward(x, weight, bias, tail, positions, activation, implementation)
    return y, _tail_after(x, tail, weight.shape[1] - 1)


def _tail_after(x: Tensor, tail: Tensor | None, entries: int) -> Tensor:
    batch, tokens, width = x.shape
    if tokens >= entries:
        return x[:, tokens - entries :]
    earlier = x.new_zeros(batch, entries, width) if tail is None else tail.to(x.dtype)
    return torch.cat([earlier[:, tokens:], x], dim=1)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    segments: Segments | None,
    activation: str | None,
) -> None:
    check_tensor("x", x, (None, None, None))
    check_tensor("weight", weight, (None, None), x)
    if x.shape[2] % weight.shape[0]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [{x.shape[2]} or a divisor of it, any] for x of "
            f"{x.shape[2]} channels"
        )
    if bias is not None:
        check_tensor("bias", bias, (x.shape[2],), x)
    if tail is not None:
        check_tensor("tail", tail, (x.shape[0], weight.shape[1] - 1, x.shape[2]), x)
    check_segments(segments, x)
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation={activation!r}, expected None or one of {', '.join(reference.ACTIVATIONS)}")


def _module(implementation: str, x: Tensor, weight: Tensor) -> ModuleType:
    """reference.py or kernel.py, which hold the same functions."""
    dtype = max(x.dtype, weight.dtype, key=lambda d: d.itemsize)
    if resolve(implementation, "short_conv", x.device, dtype) == "reference":
        return reference
    from . import kernel

    return kernel


@opaque("short_conv")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    positions: Tensor | None,
    activation: str | None,
    implementation: str,
) -> Tensor:
    return _module(implementation, x, weight).forward(x, weight, bias, tail, positions, activation)


@opaque("short_conv_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    positions: Tensor | None,
    activation: str | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = _module(implementation, x, weight).backward
    dx, dweight, dbias, dtail = backward(dy, x, weight, bias, tail, positions, activation)
    return dx, dweight, dbias if bias is None else dbias.to(bias.dtype), dtail if tail is None else dtail.to(tail.dtype)


@_forward.register_fake
def _(x, weight, bias, tail, positions, activation, implementation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(dy, x, weight, bias, tail, positions, activation, implementation):
    (batch, _, width), taps = x.shape, weight.shape[1]
    wide = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        x.new_empty(width, dtype=wide if bias is None else bias.dtype),
        x.new_empty((batch, taps - 1, width), dtype=wide if tail is None else tail.dtype),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.activation, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy: Tensor):
    x, weight, bias, tail, positions = ctx.saved_tensors
    dx, dweight, dbias, dtail = _backward(dy, x, weight, bias, tail, positions, ctx.activation, ctx.implementation)
    return dx, dweight, None if bias is None else dbias, None if tail is None else dtail, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)

"""gate_projections as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

The kernel's passes are steps (opaque.py) to torch.compile and to activation checkpointing; the reference is
plain PyTorch. Saved for the backward pass: x and the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from ..dispatch import CannotRun, resolve
from ..opaque import opaque
from . import reference

# Channels a block of the kernel: the sums of a wider block's weight gradients fill the registers.
MAX_SIDE = 256


def gate_projections(
    x: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_x: Tensor,
    bias_x: Tensor,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(gate_a, gate_x), two block-diagonal projections of the same input, differentiable in everything.

        gate_a[.., n] = x[.., n] @ weight_a[n] + bias_a[n];   gate_x alike,   n the blocks of S = D / N channels

    The pre-activations of the RG-LRU's gates, arXiv 2402.19427, section 2.4, with the blocks of RecurrentGemma.

    Args:
        x: [B, T, D].
        weight_a, weight_x: [N, S, S] of [block, input, output], N a divisor of D. The kernel takes S up to 256, best
            multiples of 8; "auto" leaves wider blocks, and fp32, to the reference.
        bias_a, bias_x: [D].
        implementation: "auto", "reference" or "triton".

    Returns:
        gate_a, gate_x: [B, T, D] in x's dtype, which is that of weights and biases too.
    """
    _check(x, weight_a, bias_a, weight_x, bias_x)
    if _implementation(implementation, x, weight_a.shape[1]) == "reference":
        return reference.forward(x, weight_a, bias_a, weight_x, bias_x)
    return _forward(x, weight_a, bias_a, weight_x, bias_x)


def _check(x: Tensor, weight_a: Tensor, bias_a: Tensor, weight_x: Tensor, bias_x: Tensor) -> None:
    check_tensor("x", x, (None, None, None))
    check_tensor("weight_a", weight_a, (None, None, None), x)
    width, blocks = x.shape[2], weight_a.shape[0]
    if width % blocks:
        raise ValueError(f"weight_a has {blocks} blocks, expected a divisor of the {width} channels of x")
    shapes = {"weight_a": (blocks, width // blocks, width // blocks), "bias_a": (width,)}
    shapes |= {"weight_x": shapes["weight_a"], "bias_x": shapes["bias_a"]}
    for (name, shape), tensor in zip(shapes.items(), (weight_a, bias_a, weight_x, bias_x), strict=True):
        check_tensor(name, tensor, shape, x)
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, expected {x.dtype} as x")


def _implementation(asked: str, x: Tensor, side: int) -> str:
    """The choice; "auto" leaves fp32, which arithmetic bounds, and wider blocks to cuBLAS."""
    if asked == "auto" and (x.dtype == torch.float32 or side > MAX_SIDE):
        asked = "reference"
    chosen = resolve(asked, "gate_projections", x.device, x.dtype)
    if chosen == "triton" and side > MAX_SIDE:
        raise CannotRun(
            f"gate_projections: implementation='triton' cannot run: its kernel takes blocks of up to {MAX_SIDE} "
            f"channels, and these have {side}"
        )
    return chosen


@opaque("gate_projections")
def _forward(x: Tensor, weight_a: Tensor, bias_a: Tensor, weight_x: Tensor, bias_x: Tensor) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.forward(x, weight_a, bias_a, weight_x, bias_x)


@opaque("gate_projections_backward")
def _backward(
    dgate_a: Tensor, dgate_x: Tensor, x: Tensor, weight_a: Tensor, weight_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.backward(dgate_a, dgate_x, x, weight_a, weight_x)


@_forward.register_fake
def _(x, weight_a, bias_a, weight_x, bias_x):
    gate = torch.empty_like(x, memory_format=torch.contiguous_format)
    return gate, torch.empty_like(gate)


@_backward.register_fake
def _(dgate_a, dgate_x, x, weight_a, weight_x):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight_a.new_empty(2, *weight_a.shape), x.new_empty(2, x.shape[2])


def _save(ctx, inputs, output):
    x, weight_a, _, weight_x, _ = inputs
    ctx.save_for_backward(x, weight_a, weight_x)


def _gradients(ctx, *gradients: Tensor | None):
    saved = ctx.saved_tensors
    dgate_a, dgate_x = (torch.zeros_like(saved[0]) if g is None else g for g in gradients)
    dx, dweight, dbias = _backward(dgate_a, dgate_x, *saved)
    return dx, dweight[0], dbias[0], dweight[1], dbias[1]


_forward.register_autograd(_gradients, setup_context=_save)

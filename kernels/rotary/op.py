"""rotary as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

The kernel's pass is one step (opaque.py) to torch.compile and to activation checkpointing, and its own gradient:
a rotation's adjoint is the rotation back. The reference is plain PyTorch. Saved for the backward pass: the table alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from ..dispatch import resolve
from ..opaque import opaque
from . import reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, implementation: str = "auto") -> Tensor:
    """x with the first 2 R dims of every head rotated, the others as they are, differentiable in x.

        y_i = x_i cos_i - x_{R+i} sin_i;   y_{R+i} = x_{R+i} cos_i + x_i sin_i,   i < R

    Rotary positions (RoPE, arXiv 2104.09864) in the halves' pairing of GPT-NeoX and Llama. Neither x nor the gradient
    that comes in is written to.

    Args:
        x: [B, T, H, K].
        cos, sin: [B, T, R] with 2 R <= K, of each token's angles; fp32 for any x but fp64. They get no gradient.
        implementation: "auto", "reference" or "triton".

    Returns:
        y: [B, T, H, K] in x's dtype, computed in fp32 (fp64 where an input is fp64).
    """
    check_tensor("x", x, (None, None, None, None))
    check_tensor("cos", cos, (*x.shape[:2], None), x)
    check_tensor("sin", sin, tuple(cos.shape), x)
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin is {sin.dtype}, expected {cos.dtype} as cos")
    if 2 * cos.shape[2] > x.shape[3]:
        raise ValueError(f"cos has {cos.shape[2]} angles a token, expected at most {x.shape[3] // 2}: half a head of x")
    cos, sin = cos.detach(), sin.detach()
    if resolve(implementation, "rotary", x.device, torch.promote_types(x.dtype, cos.dtype)) == "reference":
        return reference.forward(x, cos, sin)
    return _rotate(x, cos, sin, False)


@opaque("rotary")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    from . import kernel

    return kernel.rotate(x, cos, sin, inverse)


@_rotate.register_fake
def _(x, cos, sin, inverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, dy: Tensor):
    return _rotate(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotate.register_autograd(_gradients, setup_context=_save)

"""rms_norm as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

Each pass of the kernel is one step (opaque.py) to torch.compile and to activation checkpointing; the reference is plain
PyTorch. Saved for the backward pass: x, scale and one fp32 number a row, the reciprocal of its root.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from ..dispatch import CannotRun, resolve
from ..opaque import opaque
from . import reference

# A multiprocessor's registers hold so long a row, and its share of the scale's gradient; widths that are no multiple of
# a power of two spill some.
MOST_WIDTH = 12288


def rms_norm(x: Tensor, scale: Tensor, eps: float, *, implementation: str = "auto") -> Tensor:
    """x with every row brought to unit mean square and scaled, differentiable in x and scale.

        y = x / sqrt(mean(x^2) + eps) * (1 + scale)

    The norm of arXiv 1910.07467, its scale stored around zero as Gemma's (arXiv 2403.08295) is. Neither x nor the
    gradient that comes in is written to.

    Args:
        x: [..., D]; "auto" leaves D above 12,288 to the reference.
        scale: [D], of any floating dtype.
        eps: what is added to the mean square.
        implementation: "auto", "reference" or "triton".

    Returns:
        y: [..., D] in x's dtype, computed in fp32 (fp64 where an input is fp64).
    """
    check_tensor("x", x, (*x.shape[:-1], None))
    check_tensor("scale", scale, tuple(x.shape[-1:]), x)
    if _implementation(implementation, x, scale) == "reference":
        return reference.forward(x, scale, eps)
    # What is saved is what the kernel reads, so that a strided x is copied once.
    return _forward(x.contiguous(), scale, float(eps))[0]


def _implementation(asked: str, x: Tensor, scale: Tensor) -> str:
    width, dtype = x.shape[-1], torch.promote_types(x.dtype, scale.dtype)
    chosen = resolve(asked, "rms_norm", x.device, dtype)
    if chosen == "reference" or width <= MOST_WIDTH:
        return chosen
    if asked == "auto":
        return "reference"
    reason = f"its kernel takes rows of up to {MOST_WIDTH}, and these have {width}"
    raise CannotRun(f"rms_norm: implementation='triton' cannot run: {reason}")


@opaque("rms_norm")
def _forward(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.forward(x, scale, eps)


@opaque("rms_norm_backward")
def _backward(dy: Tensor, x: Tensor, scale: Tensor, root: Tensor, trained: bool) -> tuple[Tensor, Tensor]:
    """(dx, dscale); dscale is of no numbers where the scale is not trained."""
    from . import kernel

    return kernel.backward(dy, x, scale, root, trained)


@_forward.register_fake
def _(x, scale, eps):
    root = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), root


@_backward.register_fake
def _(dy, x, scale, root, trained):
    dscale = scale.new_empty(scale.shape if trained else 0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dscale


def _save(ctx, inputs, output):
    x, scale, _ = inputs
    ctx.save_for_backward(x, scale, output[1])


def _gradients(ctx, dy: Tensor, _):
    trained = ctx.needs_input_grad[1]
    dx, dscale = _backward(dy, *ctx.saved_tensors, trained)
    return dx, dscale if trained else None, None


_forward.register_autograd(_gradients, setup_context=_save)

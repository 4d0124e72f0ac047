"""linear_scan as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

Each pass is one step (opaque.py) to torch.compile and to activation checkpointing. Saved for the backward
pass: the inputs and h.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ..checks import check_segments, check_tensor, resets_of
from ..dispatch import resolve
from ..from_right import FromRight, with_right
from ..opaque import opaque
from ..segments import Segments
from . import reference


def linear_scan(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    *,
    from_right: FromRight | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(h, final_state) of the diagonal linear scan, differentiable in every input.

        h_t = exp(log_a_t) * h_{t-1} + x_t,   h_{-1} = initial_state;   h_t = x_t at a document's first token

    This is the recurrence under Griffin's RG-LRU (arXiv 2402.19427, section 2.4) and under every diagonal gated
    linear RNN. The gradients are the adjoint scan from right to left:
    dx_t = dh_t + a_{t+1} dx_{t+1}, dlog_a_t = a_t h_{t-1} dx_t.

    Args:
        x: [B, T, D].
        log_a: [B, T, D], natural log of the decays, <= 0.
        initial_state: [B, D], None for zero. Enters rows whose first document continues.
        segments: documents of the piece; None for one run of tokens that continues.
        from_right: for a piece that goes on elsewhere: given the gradient that the outputs of this piece alone give
            initial_state, it says the gradient of final_state, which is then detached. Called once a backward pass.
        implementation: "auto", "reference" or "triton".

    Returns:
        h: [B, T, D] in x's dtype.
        final_state: [B, D], fp32 (fp64 where an input is fp64).
    """
    _check(x, log_a, segments)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, (x.shape[0], x.shape[2]), x)
        initial_state = initial_state.to(reference.state_dtype(x, log_a))
    resets = resets_of(segments)
    h, final_state = _forward(x, log_a, initial_state, resets, implementation)
    if from_right is None:
        return h, final_state
    return with_right(h, final_state, from_right, partial(_adjoint, implementation), log_a, resets)


def linear_scan_summarize(
    x: Tensor, log_a: Tensor, segments: Segments | None = None, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(state, transition): what the piece does to a state that enters it, differentiable in every input.

        final_state == transition * initial_state + state

    The seam of context parallelism. Its backward recomputes h rather than keeping it.

    Args:
        x, log_a, segments, implementation: as in `linear_scan`.

    Returns:
        state: [B, D], the final state from a zero initial state, in fp32 (fp64 where an input is fp64).
        transition: [B, D], the product of the factors; exactly 0 where the piece holds a document start.
    """
    _check(x, log_a, segments)
    return _summarize(x, log_a, resets_of(segments), implementation)


def _check(x: Tensor, log_a: Tensor, segments: Segments | None) -> None:
    check_tensor("x", x, (None, None, None))
    check_tensor("log_a", log_a, tuple(x.shape), x)
    check_segments(segments, x)


def _module(implementation: str, *inputs: Tensor) -> ModuleType:
    """reference.py or kernel.py, which hold the same functions."""
    dtype = max((t.dtype for t in inputs), key=lambda d: d.itemsize)
    if resolve(implementation, "linear_scan", inputs[0].device, dtype) == "reference":
        return reference
    from . import kernel

    return kernel


def _adjoint(implementation: str, dh: Tensor, log_a: Tensor, resets: Tensor | None) -> Tensor:
    return _module(implementation, dh, log_a).adjoint(dh, log_a, resets)


@opaque("linear_scan")
def _forward(
    x: Tensor, log_a: Tensor, initial: Tensor | None, resets: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    return _module(implementation, x, log_a).forward(x, log_a, initial, resets)


@opaque("linear_scan_backward")
def _backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    extra: Tensor | None,
    log_a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _module(implementation, h, log_a).backward(dh, dfinal, extra, log_a, h, initial, resets)


@opaque("linear_scan_summarize")
def _summarize(x: Tensor, log_a: Tensor, resets: Tensor | None, implementation: str) -> tuple[Tensor, Tensor]:
    return _module(implementation, x, log_a).summarize(x, log_a, resets)


@_forward.register_fake
def _(x, log_a, initial, resets, implementation):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _state_like(x, log_a)


@_backward.register_fake
def _(dh, dfinal, extra, log_a, h, initial, resets, implementation):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(h, memory_format=contiguous),
        torch.empty_like(log_a, memory_format=contiguous),
        _state_like(h, log_a),
    )


@_summarize.register_fake
def _(x, log_a, resets, implementation):
    return _state_like(x, log_a), _state_like(x, log_a)


def _state_like(x: Tensor, log_a: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]), dtype=reference.state_dtype(x, log_a))


def _save_forward(ctx, inputs, output):
    _, log_a, initial, resets, ctx.implementation = inputs
    ctx.save_for_backward(log_a, output[0], initial, resets)


def _forward_gradients(ctx, dh: Tensor | None, dfinal: Tensor | None):
    log_a, h, initial, resets = ctx.saved_tensors
    dx, dlog_a, dinitial = _backward(dh, dfinal, None, log_a, h, initial, resets, ctx.implementation)
    return dx, dlog_a, None if initial is None else dinitial, None, None


def _save_summary(ctx, inputs, output):
    x, log_a, resets, ctx.implementation = inputs
    ctx.save_for_backward(x, log_a, resets, output[1])


def _summary_gradients(ctx, dstate: Tensor | None, dtransition: Tensor | None):
    x, log_a, resets, transition = ctx.saved_tensors
    h, _ = _forward(x, log_a, None, resets, ctx.implementation)
    extra = None if dtransition is None else dtransition * transition
    dx, dlog_a, _ = _backward(None, dstate, extra, log_a, h, None, resets, ctx.implementation)
    return dx, dlog_a, None, None


_forward.register_autograd(_forward_gradients, setup_context=_save_forward)
_summarize.register_autograd(_summary_gradients, setup_context=_save_summary)

"""rg_lru as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

Each pass is one step (opaque.py) to torch.compile and to activation checkpointing. Saved for the backward
pass: the inputs and h; the gates are recomputed.
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


def rg_lru(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    a_param: Tensor,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    *,
    from_right: FromRight | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(h, final_state) of the real-gated linear recurrent unit, differentiable in every input.

        r_t = sigmoid(gate_a_t),   i_t = sigmoid(gate_x_t)
        log_a_t = -8 r_t softplus(a_param)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t,   h_{-1} = initial_state
        h_t = i_t x_t at a document's first token

    Griffin, arXiv 2402.19427, section 2.4; the first-token rule and the derivative of the square root, bounded by
    1000, are those of the released RecurrentGemma.

    Args:
        x: [B, T, D].
        gate_a, gate_x: [B, T, D], pre-activations of the recurrence and input gates, biases added.
        a_param: [D]; the decay at an open gate is exp(-8 softplus(a_param)).
        initial_state: [B, D], None for zero. Enters rows whose first document continues.
        segments: documents of the piece; None for one run of tokens that continues.
        from_right: for a piece that goes on elsewhere: given the gradient that the outputs of this piece alone give
            initial_state, it says the gradient of final_state, which is then detached. Called once a backward pass.
        implementation: "auto", "reference" or "triton".

    Returns:
        h: [B, T, D] in x's dtype.
        final_state: [B, D], fp32 (fp64 where an input is fp64).
    """
    _check(x, gate_a, gate_x, a_param, segments)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, (x.shape[0], x.shape[2]), x)
        initial_state = initial_state.to(reference.state_dtype(x, gate_a, gate_x))
    resets = resets_of(segments)
    h, final_state = _forward(x, gate_a, gate_x, a_param, initial_state, resets, implementation)
    if from_right is None:
        return h, final_state
    return with_right(h, final_state, from_right, partial(_adjoint, implementation), gate_a, a_param, resets)


def rg_lru_summarize(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    a_param: Tensor,
    segments: Segments | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(state, transition): what the piece does to a state that enters it, differentiable in every input.

        final_state == transition * initial_state + state

    The seam of context parallelism. Its backward recomputes h rather than keeping it.

    Args:
        x, gate_a, gate_x, a_param, segments, implementation: as in `rg_lru`.

    Returns:
        state: [B, D], the final state from a zero initial state, in fp32 (fp64 where an input is fp64).
        transition: [B, D], the product of the factors; exactly 0 where the piece holds a document start.
    """
    _check(x, gate_a, gate_x, a_param, segments)
    return _summarize(x, gate_a, gate_x, a_param, resets_of(segments), implementation)


def _check(x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, segments: Segments | None) -> None:
    check_tensor("x", x, (None, None, None))
    check_tensor("gate_a", gate_a, tuple(x.shape), x)
    check_tensor("gate_x", gate_x, tuple(x.shape), x)
    check_tensor("a_param", a_param, (x.shape[2],), x)
    check_segments(segments, x)


def _module(implementation: str, *inputs: Tensor) -> ModuleType:
    """reference.py or kernel.py, which hold the same functions."""
    dtype = max((t.dtype for t in inputs), key=lambda d: d.itemsize)
    if resolve(implementation, "rg_lru", inputs[0].device, dtype) == "reference":
        return reference
    from . import kernel

    return kernel


def _adjoint(implementation: str, dh: Tensor, gate_a: Tensor, a_param: Tensor, resets: Tensor | None) -> Tensor:
    return _module(implementation, dh, gate_a).adjoint(dh, gate_a, a_param, resets)


@opaque("rg_lru")
def _forward(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    a_param: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return _module(implementation, x, gate_a, gate_x).forward(x, gate_a, gate_x, a_param, initial, resets)


@opaque("rg_lru_backward")
def _backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    extra: Tensor | None,
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    a_param: Tensor,
    h: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = _module(implementation, x, gate_a, gate_x).backward
    return run(dh, dfinal, extra, x, gate_a, gate_x, a_param, h, initial, resets)


@opaque("rg_lru_summarize")
def _summarize(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, a_param: Tensor, resets: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    return _module(implementation, x, gate_a, gate_x).summarize(x, gate_a, gate_x, a_param, resets)


@_forward.register_fake
def _(x, gate_a, gate_x, a_param, initial, resets, implementation):
    return _like(x), _state_like(x, gate_a, gate_x)


@_backward.register_fake
def _(dh, dfinal, extra, x, gate_a, gate_x, a_param, h, initial, resets, implementation):
    return _like(x), _like(gate_a), _like(gate_x), _like(a_param), _state_like(x, gate_a, gate_x)


@_summarize.register_fake
def _(x, gate_a, gate_x, a_param, resets, implementation):
    return _state_like(x, gate_a, gate_x), _state_like(x, gate_a, gate_x)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _state_like(x: Tensor, *gates: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]), dtype=reference.state_dtype(x, *gates))


def _save_forward(ctx, inputs, output):
    x, gate_a, gate_x, a_param, initial, resets, ctx.implementation = inputs
    ctx.save_for_backward(x, gate_a, gate_x, a_param, output[0], initial, resets)


def _forward_gradients(ctx, dh: Tensor | None, dfinal: Tensor | None):
    *inputs, h, initial, resets = ctx.saved_tensors
    *gradients, dinitial = _backward(dh, dfinal, None, *inputs, h, initial, resets, ctx.implementation)
    return *gradients, None if initial is None else dinitial, None, None


def _save_summary(ctx, inputs, output):
    x, gate_a, gate_x, a_param, resets, ctx.implementation = inputs
    ctx.save_for_backward(x, gate_a, gate_x, a_param, resets, output[1])


def _summary_gradients(ctx, dstate: Tensor | None, dtransition: Tensor | None):
    *inputs, resets, transition = ctx.saved_tensors
    h, _ = _forward(*inputs, None, resets, ctx.implementation)
    extra = None if dtransition is None else dtransition * transition
    *gradients, _ = _backward(None, dstate, extra, *inputs, h, None, resets, ctx.implementation)
    return *gradients, None, None


_forward.register_autograd(_forward_gradients, setup_context=_save_forward)
_summarize.register_autograd(_summary_gradients, setup_context=_save_summary)

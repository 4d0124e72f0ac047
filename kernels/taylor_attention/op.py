"""taylor_attention as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

The kernel's passes are steps (opaque.py) to torch.compile and to activation checkpointing; the reference is
plain PyTorch. Saved for the kernel's backward pass: the inputs, y and the inverse of the normaliser.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..checks import check_segments, check_tensor, documents_of
from ..dispatch import resolve
from ..from_right import FromRight, with_right
from ..opaque import opaque
from ..segments import Segments
from . import reference


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    *,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    from_right: FromRight | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, final_state) of linear attention with Based's feature map, differentiable in every input.

        w_ij = 1 + s + s^2 / 2,  s = scale q_i . k_j;   y_i = sum_{j <= i} w_ij v_j / (sum_{j <= i} w_ij + eps)

    over the document of i, by a state of packed monomials: w_ij = query_features(q_i) . key_features(k_j), arXiv
    2402.18668, section 4. As 1 + s + s^2 / 2 >= 1/2, the divisor is positive. The gradients recompute weights and
    states; a second state runs from right to left.

    Args:
        q: [B, T, H, K], K 8 to 32 for the kernel.
        k: [B, T, H, K].
        v: [B, T, H, V], V up to 128 for the kernel.
        initial_state: [B, H, F, V + 1] as `final_state`, None for zero. Enters rows whose first document continues.
        segments: documents of the piece; None for one run of tokens that continues.
        scale: factor of the scores, > 0; None for 1 / sqrt(K).
        normalize: whether y is divided.
        eps: added to the divisor.
        from_right: for a piece that goes on elsewhere: given the gradient that the outputs of this piece alone give
            initial_state, it says the gradient of final_state, which is then detached. Called once a backward pass.
        implementation: "auto", "reference" or "triton".

    Returns:
        y: [B, T, H, V] in v's dtype.
        final_state: [B, H, F, V + 1], fp32 (fp64 where an input is fp64), F = 1 + K + K (K + 1) / 2: the sums of
            [1, k_i, k_i k_j for i <= j by rows] times [v, 1]. The last column is the normaliser's; it does not
            depend on the scale.
    """
    _check(k, v, segments)
    check_tensor("q", q, tuple(k.shape), k)
    scale = _scale(scale, q)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, _state_shape(k, v), k)
        initial_state = initial_state.to(_state_dtype(q, k, v))
    ids = documents_of(segments)
    forward, adjoint = reference.forward, reference.adjoint
    if _resolve(implementation, q, k, v) == "triton":
        forward, adjoint = _forward, _adjoint
    y, final_state, inverse = forward(q, k, v, initial_state, ids, scale, normalize, eps)
    if from_right is None:
        return y, final_state
    return with_right(y, final_state, from_right, partial(adjoint, scale), q, y, inverse, ids)


def taylor_attention_summarize(
    k: Tensor, v: Tensor, segments: Segments | None = None, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(state, transition): what the piece does to a state that enters it, differentiable in k and v.

        final_state == transition * initial_state + state

    Args:
        k, v, segments, implementation: as in `taylor_attention`.

    Returns:
        state: [B, H, F, V + 1], the final state from a zero initial state, in fp32 (fp64 where an input is fp64).
        transition: [B, 1, 1, 1], 0 where the piece holds a document start, else 1.
    """
    _check(k, v, segments)
    ids = documents_of(segments)
    module = reference.summarize if _resolve(implementation, k, v) == "reference" else _summarize
    state = module(k, v, ids)
    transition = state.new_ones(k.shape[0]) if ids is None else (ids[:, -1] == 0).to(state.dtype)
    return state, transition[:, None, None, None]


def taylor_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y [B, H, V], state) of one token, given the state of those before it: zeros at a document's first.

    The kernel is for decoding and has no gradients: where one could be asked for, "auto" is the reference.

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        state: [B, H, F, V + 1], as `taylor_attention` returns it, fp32 for the kernel; not written to.
        scale, normalize, eps, implementation: as in `taylor_attention`.
    """
    check_tensor("k", k, (None, None, None))
    check_tensor("q", q, tuple(k.shape), k)
    check_tensor("v", v, (*k.shape[:2], None), k)
    check_tensor("state", state, _state_shape(k[:, None], v[:, None]), k)
    inputs = (q, k, v, state)
    if implementation == "auto" and torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        implementation = "reference"
    module = reference.step if _resolve_step(implementation, *inputs) == "reference" else _step
    return module(*inputs, _scale(scale, q), normalize, eps)


def _check(k: Tensor, v: Tensor, segments: Segments | None) -> None:
    check_tensor("k", k, (None, None, None, None))
    check_tensor("v", v, (*k.shape[:3], None), k)
    check_segments(segments, k)


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is not None and scale <= 0:
        raise ValueError(f"scale={scale}, expected > 0, or None for 1 / sqrt(K)")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _resolve(implementation: str, *inputs: Tensor) -> str:
    k, v = inputs[-2:]
    dtype = _widest(*inputs)
    chosen = resolve(implementation, "taylor_attention", k.device, dtype)
    if chosen == "triton":
        if any(t.dtype != dtype for t in inputs):
            raise TypeError(f"the inputs are {', '.join(str(t.dtype) for t in inputs)}; the kernel takes one dtype")
        _check_dims(k, v)
    return chosen


def _resolve_step(implementation: str, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> str:
    chosen = resolve(implementation, "taylor_attention", k.device, _widest(q, k, v, state))
    if chosen == "triton":
        if state.dtype != torch.float32:
            raise TypeError(f"state is {state.dtype}; the kernel takes torch.float32")
        _check_dims(k, v)
    return chosen


def _widest(*inputs: Tensor) -> torch.dtype:
    dtype = inputs[0].dtype
    for t in inputs:
        dtype = t.dtype if t.dtype.itemsize > dtype.itemsize else dtype
    return dtype


def _check_dims(k: Tensor, v: Tensor) -> None:
    if not 8 <= k.shape[-1] <= 32 or v.shape[-1] > 128:
        raise ValueError(f"K={k.shape[-1]}, V={v.shape[-1]}: the kernel takes K 8 to 32 and V up to 128")


def _adjoint(scale: float, dy: Tensor, q: Tensor, y: Tensor, inverse: Tensor, ids: Tensor | None) -> Tensor:
    from . import kernel

    return kernel.adjoint(scale, dy, q, y, inverse, ids)


def _state_shape(k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return k.shape[0], k.shape[2], reference.features(k.shape[3]), v.shape[3] + 1


def _state_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


@opaque("taylor_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    ids: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.forward(q, k, v, initial, ids, scale, normalize, eps)


@opaque("taylor_attention_backward")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    ids: Tensor | None,
    y: Tensor,
    inverse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.backward(dy, dfinal, q, k, v, initial, ids, y, inverse, scale)


@opaque("taylor_attention_summarize")
def _summarize(k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
    from . import kernel

    return kernel.summarize(k, v, ids)


@opaque("taylor_attention_summarize_backward")
def _summarize_backward(dstate: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.summarize_backward(dstate, k, v, ids)


@opaque("taylor_attention_step")
def _step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.step(q, k, v, state, scale, normalize, eps)


@_forward.register_fake
def _(q, k, v, initial, ids, scale, normalize, eps):
    batch, tokens, heads, _ = q.shape
    inverse = q.new_empty((batch, heads, tokens) if normalize else (0,), dtype=torch.float32)
    return v.new_empty(v.shape), q.new_empty(_state_shape(k, v), dtype=torch.float32), inverse


@_backward.register_fake
def _(dy, dfinal, q, k, v, initial, ids, y, inverse, scale):
    return *(t.new_empty(t.shape) for t in (q, k, v)), k.new_empty(_state_shape(k, v), dtype=torch.float32)


@_summarize.register_fake
def _(k, v, ids):
    return k.new_empty(_state_shape(k, v), dtype=torch.float32)


@_summarize_backward.register_fake
def _(dstate, k, v, ids):
    return k.new_empty(k.shape), v.new_empty(v.shape)


@_step.register_fake
def _(q, k, v, state, scale, normalize, eps):
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _save_forward(ctx, inputs, output):
    q, k, v, initial, ids, ctx.scale, _, _ = inputs
    y, _, inverse = output
    ctx.save_for_backward(q, k, v, initial, ids, y, inverse)


def _forward_gradients(ctx, dy: Tensor | None, dfinal: Tensor | None, _):
    *_, y, _ = saved = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    *inputs, dinitial = _backward(dy, dfinal, *saved, ctx.scale)
    return *inputs, None if saved[3] is None else dinitial, None, None, None, None


def _save_summary(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _summary_gradients(ctx, dstate: Tensor):
    return *_summarize_backward(dstate, *ctx.saved_tensors), None


_forward.register_autograd(_forward_gradients, setup_context=_save_forward)
_summarize.register_autograd(_summary_gradients, setup_context=_save_summary)

"""linear_attention as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

The kernel's passes are steps (opaque.py) to torch.compile and to activation checkpointing; the reference is
plain PyTorch. Saved for the kernel's backward pass: the inputs, y, the inverse of the normaliser and the states at a
few cuts of the row, as many as fill the GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_segments, check_tensor, documents_of, resets_of
from ..dispatch import resolve
from ..from_right import FromRight, with_right
from ..opaque import opaque
from ..segments import Segments
from . import reference


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None = None,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    *,
    group: int | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-6,
    from_right: FromRight | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, final_state) of linear attention, differentiable in every input; feature maps are applied by the caller.

        w_ij = scale q_i . k_j exp(sum_{j < t <= i} log_a_t);   y_i = sum_j w_ij v_j / (sum_j w_ij + eps)

    over the keys j <= i of the document of i, arXiv 2006.16236. With a `group` only over completed groups:

        floor(p_j / group) < floor(p_i / group),   p counted from the document's first token,

    the global branch of the linearized LLM, arXiv 2406.07368. The open group is the local branch's: `attention` over
    Segments whose documents are the groups. A model adds the two. Where the divisor's sum is 0, as in a document's
    first group, y is 0 and nothing flows back.

    Args:
        q: [B, T, H, K]. Heads H / Hkv at a time share a head of keys, which are not copied.
        k: [B, T, Hkv, K].
        v: [B, T, Hkv, V], K and V up to 256 for the kernel.
        log_a: [B, T, Hkv] decays, finite and <= 0, None for 0. Those at document starts have no effect. With a group
            only for the reference.
        initial_state: as `final_state`, None for zero. Enters rows whose first document continues.
        segments: documents of the piece; None for one run of tokens that continues, its first token at a group's start.
        group: tokens a group; None for ordinary causal attention. A piece may begin and end anywhere in a group.
        scale: factor of the weights.
        normalize: whether y is divided, which wants features whose products are not negative.
        eps: added to the divisor.
        from_right: for a piece that goes on elsewhere: given the gradient that the outputs of this piece alone give
            initial_state, it says the gradient of final_state, which is then detached. Called once a backward pass.
        implementation: "auto", "reference" or "triton".

    Returns:
        y: [B, T, H, V] in v's dtype.
        final_state: fp32 (fp64 where an input is fp64), the decayed sums of k_j times [v_j, 1] over the last token's
            document; [v_j] where `normalize` is false. W = V + 1 or V.
            [B, Hkv, K, W], or with a group [B, Hkv, 2, K, W]: the sum over all keys and that over the open group. Their
            difference is what the open group's queries read. It is exactly 0 where no group is completed; otherwise it
            carries a rounding of the larger, which only decays of many nats within a group could bring out.
    """
    _check(k, v, log_a, segments, group)
    if q.dim() != 4 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has shape {list(q.shape)}, expected [B, T, H, K] with H a multiple of {k.shape[2]}")
    check_tensor("q", q, (*k.shape[:2], q.shape[2], k.shape[3]), k)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, _state_shape(k, v, group, normalize), k)
        initial_state = initial_state.to(_state_dtype(q, k, v))
        initial_state = initial_state[:, :, None] if group is None else initial_state
    decay, ids = _decay(log_a, segments, q, k, v), (documents_of(segments), _groups(segments, k, group))
    forward, adjoint = reference.forward, reference.adjoint
    if _resolve(implementation, log_a, group, q, k, v) == "triton":
        forward, adjoint = partial(_forward, group or 0), partial(_adjoint, group or 0)
    y, final, inverse, *_ = forward(q, k, v, decay, initial_state, *ids, float(scale), normalize, eps)
    if from_right is not None:
        slotless = group is None
        answer = (lambda dinitial: from_right(dinitial[:, :, 0])[:, :, None]) if slotless else from_right
        y, final = with_right(y, final, answer, partial(adjoint, float(scale)), q, k, y, inverse, decay, *ids)
    return y, final[:, :, 0] if group is None else final


def linear_attention_summarize(
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None = None,
    segments: Segments | None = None,
    *,
    group: int | None = None,
    normalize: bool = True,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(state, transition): what the piece does to a state that enters it, differentiable in k, v and log_a.

        final_state == transition * initial_state + state

    Args:
        k, v, log_a, segments, group, normalize, implementation: as in `linear_attention`.

    Returns:
        state: the final state from a zero initial state.
        transition: [B, Hkv, 1, 1], the product of the decays, exactly 0 where the piece holds a document start; with a
            group [B, Hkv, 2, 1, 1], the second exactly 0 where the piece begins a group.
    """
    _check(k, v, log_a, segments, group)
    documents, groups = documents_of(segments), _groups(segments, k, group)
    decay = _decay(log_a, segments, k, v)
    summarize = reference.summarize
    if _resolve(implementation, log_a, group, k, v) == "triton":
        summarize = partial(_summarize, group or 0)
    state = summarize(k, v, decay, documents, groups, normalize)
    kept = torch.ones_like(k[:, 0, 0, 0], dtype=torch.bool) if documents is None else documents[:, -1] == 0
    slots = [kept] if groups is None else [kept, kept & (groups[:, -1] == 0)]
    transition = torch.stack(slots, -1)[:, None].to(state.dtype).expand(-1, k.shape[2], -1)
    if decay is not None:
        transition = transition * decay.sum(-1).exp()[..., None]
    transition = transition[..., None, None]
    return (state[:, :, 0], transition[:, :, 0]) if group is None else (state, transition)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None,
    state: Tensor,
    position: Tensor | None = None,
    *,
    group: int | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(y [B, H, V], state) of one token, given the state of those before it: zeros at a document's first.

    Args:
        q: [B, H, K].
        k: [B, Hkv, K].
        v: [B, Hkv, V].
        log_a: [B, Hkv] or None.
        state: as `linear_attention` returns it; not written to.
        position: integers [B], each token's position in its document; read only with a group.
        group, scale, normalize, eps: as in `linear_attention`.
    """
    check_tensor("k", k, (None, None, None))
    check_tensor("v", v, (*k.shape[:2], None), k)
    if q.dim() != 3 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has shape {list(q.shape)}, expected [B, H, K] with H a multiple of {k.shape[1]}")
    check_tensor("q", q, (k.shape[0], q.shape[1], k.shape[2]), k)
    check_tensor("state", state, _state_shape(k[:, None], v[:, None], group, normalize), k)
    if log_a is not None:
        check_tensor("log_a", log_a, tuple(k.shape[:2]), k)
    if group is None:
        y, state = reference.step(q, k, v, log_a, state[:, :, None], None, scale, normalize, eps)
        return y, state[:, :, 0]
    if position is None or tuple(position.shape) != tuple(k.shape[:1]):
        shape = None if position is None else list(position.shape)
        raise ValueError(f"position has shape {shape}, expected [{k.shape[0]}] with group={group}")
    return reference.step(q, k, v, log_a, state, position % group == 0, scale, normalize, eps)


def _check(k: Tensor, v: Tensor, log_a: Tensor | None, segments: Segments | None, group: int | None) -> None:
    check_tensor("k", k, (None, None, None, None))
    check_tensor("v", v, (*k.shape[:3], None), k)
    if log_a is not None:
        check_tensor("log_a", log_a, tuple(k.shape[:3]), k)
    check_segments(segments, k)
    if group is not None and group < 1:
        raise ValueError(f"group={group}, expected >= 1, or None for ordinary causal attention")


def _resolve(implementation: str, log_a: Tensor | None, group: int | None, *inputs: Tensor) -> str:
    k, v = inputs[-2:]
    dtype = inputs[0].dtype
    for t in inputs:
        dtype = t.dtype if t.dtype.itemsize > dtype.itemsize else dtype
    chosen = resolve(implementation, "linear_attention", k.device, dtype)
    if chosen == "triton":
        if any(t.dtype != dtype for t in inputs):
            raise TypeError(f"the inputs are {', '.join(str(t.dtype) for t in inputs)}; the kernel takes one dtype")
        if k.shape[3] > 256 or v.shape[3] > 256:
            raise ValueError(f"K={k.shape[3]}, V={v.shape[3]}: the kernel takes up to 256 of each")
        if log_a is not None and group is not None:
            raise ValueError(f"log_a with group={group}: the kernel takes one of them, implementation='reference' both")
    return chosen


def _groups(segments: Segments | None, k: Tensor, group: int | None) -> Tensor | None:
    """int32 [B, T], each token's group counted over the row's documents; 0 for one begun before the piece."""
    if group is None:
        return None
    if segments is None:
        positions = torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])
    else:
        positions = segments.positions
    return (positions % group == 0).cumsum(1, dtype=torch.int32)


def _decay(log_a: Tensor | None, segments: Segments | None, *inputs: Tensor) -> Tensor | None:
    """[B, Hkv, T] in the dtype of the state, 0 at document starts."""
    if log_a is None:
        return None
    decay = log_a.transpose(1, 2).to(_state_dtype(*inputs))
    resets = resets_of(segments)
    return decay.contiguous() if resets is None else decay.masked_fill(resets[:, None], 0).contiguous()


def _adjoint(*inputs: Any) -> Tensor:
    from . import kernel

    return kernel.adjoint(*inputs)


def _state_shape(k: Tensor, v: Tensor, group: int | None, normalize: bool) -> tuple[int, ...]:
    slots = () if group is None else (2,)
    return k.shape[0], k.shape[2], *slots, k.shape[3], v.shape[3] + normalize


def _state_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


@opaque("linear_attention")
def _forward(
    group: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.forward(group, q, k, v, decay, initial, documents, groups, scale, normalize, eps)


@opaque("linear_attention_backward")
def _backward(
    group: int,
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    y: Tensor,
    inverse: Tensor,
    entering: Tensor,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.backward(group, dy, dfinal, q, k, v, decay, documents, groups, y, inverse, entering, scale, normalize)


@opaque("linear_attention_summarize")
def _summarize(
    group: int,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    normalize: bool,
) -> Tensor:
    from . import kernel

    return kernel.summarize(group, k, v, decay, documents, groups, normalize)


@opaque("linear_attention_summarize_backward")
def _summarize_backward(
    group: int,
    dstate: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    documents: Tensor | None,
    groups: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.summarize_backward(group, dstate, k, v, decay, documents, groups, normalize)


def _slotted_shape(k: Tensor, v: Tensor, groups: Tensor | None, normalize: bool) -> tuple[int, ...]:
    return k.shape[0], k.shape[2], 1 if groups is None else 2, k.shape[3], v.shape[3] + normalize


@_forward.register_fake
def _(group, q, k, v, decay, initial, documents, groups, scale, normalize, eps):
    from . import kernel

    batch, tokens, heads, _ = q.shape
    shape = _slotted_shape(k, v, groups, normalize)
    final = k.new_empty(shape, dtype=torch.float32)
    inverse = q.new_empty((batch, heads, tokens) if normalize else (0,), dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), final, inverse, kernel.room(q, v, initial, shape)


@_backward.register_fake
def _(group, dy, dfinal, q, k, v, decay, documents, groups, y, inverse, entering, scale, normalize):
    ddecay = q.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    dinitial = q.new_empty(_slotted_shape(k, v, groups, normalize), dtype=torch.float32)
    return *(t.new_empty(t.shape) for t in (q, k, v)), ddecay, dinitial


@_summarize.register_fake
def _(group, k, v, decay, documents, groups, normalize):
    return k.new_empty(_slotted_shape(k, v, groups, normalize), dtype=torch.float32)


@_summarize_backward.register_fake
def _(group, dstate, k, v, decay, documents, groups, normalize):
    return k.new_empty(k.shape), v.new_empty(v.shape), k.new_empty(0) if decay is None else decay.new_empty(decay.shape)


def _save_forward(ctx, inputs, output):
    ctx.group, q, k, v, decay, initial, documents, groups, ctx.scale, ctx.normalize, _ = inputs
    y, _, inverse, entering = output
    ctx.enters = initial is not None
    ctx.save_for_backward(q, k, v, decay, documents, groups, y, inverse, entering)


def _forward_gradients(ctx, dy: Tensor | None, dfinal: Tensor | None, *_):
    *_, decay, _, _, y, _, _ = saved = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    *inputs, ddecay, dinitial = _backward(ctx.group, dy, dfinal, *saved, ctx.scale, ctx.normalize)
    states = (None if decay is None else ddecay, dinitial if ctx.enters else None)
    return None, *inputs, *states, *[None] * 5


def _save_summary(ctx, inputs, output):
    ctx.group, *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _summary_gradients(ctx, dstate: Tensor):
    saved = ctx.saved_tensors
    dk, dv, ddecay = _summarize_backward(ctx.group, dstate, *saved, ctx.normalize)
    return None, dk, dv, None if saved[2] is None else ddecay, None, None, None


_forward.register_autograd(_forward_gradients, setup_context=_save_forward)
_summarize.register_autograd(_summary_gradients, setup_context=_save_summary)

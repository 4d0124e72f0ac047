"""linear_cross_entropy as a differentiable op: checks, dispatch, autograd. The maths is in reference.py and kernel.py.

A summed loss computes its gradients in the forward pass, chunk by chunk, and the backward pass scales them: three
matrix products. Of few rows in bf16, that of the weight is left to the backward pass. The pieces of a vocabulary
slice, and a loss per row, keep only four numbers a row and compute the logits anew in the backward pass: four. A frozen
weight saves a product, and its gradient's memory. Each pass is one step (opaque.py) to torch.compile.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from ..checks import check_tensor
from ..dispatch import resolve
from ..opaque import opaque
from . import chunks, reference
from .reference import Pieces


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "sum",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """The loss of `hidden @ weight.T` against the labels, in fp32, differentiable in hidden and weight.

        l = soft_cap tanh(logits / soft_cap),   lse = log sum_j exp(l_j)
        loss = lse - (1 - label_smoothing) l_label - label_smoothing mean_j(l_j) + z_loss lse^2

    Logits are rounded to the dtype of hidden, as a linear layer's are. One chunk of them exists at a time: an eighth of
    all, and as much as a gradient of the weight takes. In bf16 all exist until the backward pass where that is no more
    than an eighth of them and a gradient of the weight in fp32, unless the weight is frozen. A row whose label is
    `ignore_index` has loss 0 and passes no gradient.

    Args:
        hidden: [N, D].
        weight: [V, D] in hidden's dtype.
        labels: int64 or int32 [N], each in [0, V) or `ignore_index`.
        ignore_index: the label of rows that do not count; negative.
        reduction: "sum" for a scalar, its gradients mostly computed in the forward pass; "none" for [N].
        z_loss: weight of lse^2.
        label_smoothing: share of the target spread over all V tokens.
        soft_cap: bound of the logits; 0 for none.
        implementation: "auto", "reference" or "triton".
    """
    _check(hidden, weight, labels, soft_cap)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction={reduction!r}, expected 'sum' or 'none'")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}, expected at least 0 and less than 1")
    if ignore_index >= 0:
        raise ValueError(f"ignore_index={ignore_index}, expected a negative number, which no token has")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(labels, weight.shape[0], ignore_index)
    if reduction == "none" or not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        pieces = vocabulary_pieces(hidden, weight, labels, soft_cap=soft_cap, implementation=implementation)
        losses = loss_from_pieces(
            pieces,
            labels,
            weight.shape[0],
            ignore_index=ignore_index,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )
        return losses if reduction == "none" else losses.sum()
    options = (ignore_index, z_loss, label_smoothing, soft_cap, _keep(hidden, weight))
    losses, _, _ = _forward(hidden, weight, labels, *options, implementation)
    return losses


def vocabulary_pieces(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_start: int = 0,
    soft_cap: float = 0.0,
    implementation: str = "auto",
) -> Pieces:
    """(highest, total, target, spread), each [N]: what the softmax of a slice of the vocabulary adds to the loss.

        highest = max_j l_j,   total = sum_j exp(l_j - highest),   target = l_label or 0,   spread = sum_j l_j

    Of several slices, target and spread add up; with M the largest highest, so do total exp(highest - M): tensor
    parallelism reduces them and hands (M, total, target, spread) to `loss_from_pieces`. Differentiable in hidden and
    weight through total, target and spread; `highest` is a shift and passes none. The backward pass computes the
    logits anew.

    Args:
        hidden: [N, D].
        weight: [V, D], the slice's rows of the whole weight, in hidden's dtype.
        labels: [N], over the whole vocabulary; other slices' labels, and negative ones, have target 0 here.
        vocab_start: the slice's first token.
        soft_cap: as in `linear_cross_entropy`.
        implementation: "auto", "reference" or "triton".
    """
    _check(hidden, weight, labels, soft_cap)
    # A label left of the slice becomes negative, whatever it was.
    highest, total, target, spread = _pieces(hidden, weight, labels - vocab_start, soft_cap, implementation)
    return highest, total, target, spread


def loss_from_pieces(
    pieces: Pieces,
    labels: Tensor,
    vocabulary: int,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Losses [N] of the pieces of a whole vocabulary of that many tokens; arguments as in `linear_cross_entropy`."""
    return reference.loss(pieces, labels, vocabulary, ignore_index, z_loss, label_smoothing)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, soft_cap: float) -> None:
    check_tensor("hidden", hidden, (None, None))
    check_tensor("weight", weight, (None, hidden.shape[1]), hidden)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}, expected one dtype")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels is {labels.dtype}, expected torch.int64 or torch.int32")
    if labels.shape != hidden.shape[:1] or labels.device != hidden.device:
        raise ValueError(
            f"labels has shape {list(labels.shape)} on {labels.device}, expected [{hidden.shape[0]}] on {hidden.device}"
        )
    if soft_cap < 0:
        raise ValueError(f"soft_cap={soft_cap}, expected a bound above 0, or 0 for none")


def _check_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = labels[((labels < 0) & (labels != ignore_index)) | (labels >= vocabulary)]
    if wrong.numel():
        raise ValueError(f"labels holds {int(wrong[0])}, expected [0, {vocabulary}) or ignore_index={ignore_index}")


def _keep(hidden: Tensor, weight: Tensor) -> chunks.Keep:
    if not weight.requires_grad:
        return "nothing"
    # Hidden states times a small scale leave the range of fp16. Compiled code may be for any number of rows.
    once = hidden.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and chunks.at_once(*hidden.shape)
    return "logits" if once else "gradient"


def _module(implementation: str, hidden: Tensor) -> ModuleType:
    """reference.py or kernel.py, which hold the same functions."""
    if resolve(implementation, "cross_entropy", hidden.device, hidden.dtype) == "reference":
        return reference
    from . import kernel

    return kernel


@opaque("linear_cross_entropy")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignored: int,
    z_loss: float,
    smoothing: float,
    cap: float,
    keep: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses, gradient of hidden, what chunks.Keep says for that of the weight)."""
    options = {"ignored": ignored, "z_loss": z_loss, "smoothing": smoothing, "cap": cap}
    differentiate = partial(_module(implementation, hidden).loss_and_gradient_, **options)
    inputs = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    losses, dhidden, kept = chunks.loss_and_gradients(differentiate, *inputs, cast("chunks.Keep", keep))
    return losses.sum(), dhidden, kept


@opaque("scaled")
def _scaled(tensor: Tensor, factor: Tensor, like: Tensor, implementation: str) -> Tensor:
    """tensor * factor in the dtype of `like`, in one pass."""
    return _module(implementation, like).scaled(tensor.contiguous(), factor, like.dtype)


@opaque("linear_cross_entropy_weight_gradient")
def _weight_gradient(dlogits: Tensor, hidden: Tensor, vocabulary: int) -> Tensor:
    """The gradient of the weight by that of the logits; either factor may carry the scale of the loss."""
    return chunks.weight_gradient(dlogits, hidden, vocabulary)


@opaque("vocabulary_pieces")
def _pieces(
    hidden: Tensor, weight: Tensor, labels: Tensor, cap: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    softmax = _module(implementation, hidden)
    return chunks.pieces(softmax, hidden.contiguous(), weight.contiguous(), labels.contiguous(), cap)


@opaque("vocabulary_pieces_backward")
def _pieces_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    highest: Tensor,
    by_total: Tensor,
    by_target: Tensor,
    by_spread: Tensor,
    cap: float,
    frozen: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, that of weight or, with `frozen`, nothing)."""
    dhidden, dweight = chunks.pieces_gradients(
        _module(implementation, hidden),
        hidden.contiguous(),
        weight.contiguous(),
        labels.contiguous(),
        (highest, by_total, by_target, by_spread),
        cap,
        frozen,
    )
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype)


@_forward.register_fake
def _(hidden, weight, labels, ignored, z_loss, smoothing, cap, keep, implementation):
    wide = reference.compute_dtype(hidden)
    if keep == "gradient":
        kept = weight.new_empty(weight.shape, dtype=wide)
    elif keep == "logits":
        kept = hidden.new_empty(hidden.shape[0], chunks.aligned(weight.shape[0], weight.element_size()))
    else:
        kept = hidden.new_empty(0)
    return hidden.new_empty((), dtype=wide), _like(hidden), kept


@_scaled.register_fake
def _(tensor, factor, like, implementation):
    return torch.empty_like(tensor, dtype=like.dtype)


@_weight_gradient.register_fake
def _(dlogits, hidden, vocabulary):
    return hidden.new_empty(vocabulary, hidden.shape[1])


@_pieces.register_fake
def _(hidden, weight, labels, cap, implementation):
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=reference.compute_dtype(hidden)) for _ in range(4))


@_pieces_backward.register_fake
def _(hidden, weight, labels, highest, by_total, by_target, by_spread, cap, frozen, implementation):
    return _like(hidden), weight.new_empty(0) if frozen else _like(weight)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    hidden, weight, *_, ctx.keep, ctx.implementation = inputs
    needed = (t if needs else None for t, needs in zip(output[1:], ctx.needs_input_grad, strict=False))
    ctx.save_for_backward(hidden, weight, *needed)


def _gradients(ctx, dloss: Tensor, *_):
    hidden, weight, dhidden, kept = ctx.saved_tensors
    dweight = None
    if kept is not None and ctx.keep == "logits":
        dweight = _weight_gradient(kept, _scaled(hidden, dloss, hidden, ctx.implementation), weight.shape[0])
    elif kept is not None:
        dweight = _scaled(kept, dloss, weight, ctx.implementation)
    if dhidden is not None:
        dhidden = _scaled(dhidden, dloss, hidden, ctx.implementation)
    return dhidden, dweight, *[None] * 7


def _save_pieces(ctx, inputs, output):
    hidden, weight, labels, ctx.cap, ctx.implementation = inputs
    ctx.save_for_backward(hidden, weight, labels, output[0])


def _pieces_gradients(ctx, _, *gradients: Tensor | None):
    *_, highest = saved = ctx.saved_tensors
    by = (torch.zeros_like(highest) if g is None else g for g in gradients)
    frozen = not ctx.needs_input_grad[1]
    dhidden, dweight = _pieces_backward(*saved, *by, ctx.cap, frozen, ctx.implementation)
    return dhidden, None if frozen else dweight, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
_pieces.register_autograd(_pieces_gradients, setup_context=_save_pieces)

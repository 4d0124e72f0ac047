"""Softmax statistics and cross-entropy gradients of a block of logits, in PyTorch; kernel.py holds the same functions.

The logits arrive in the dtype of the hidden states; everything is computed in fp32 (fp64 for fp64 logits). With
l = cap tanh(logit / cap), or the logit where cap is 0:

    highest = max_j l_j,   total = sum_j exp(l_j - highest),   target = l_label,   spread = sum_j l_j
    lse = highest + log(total)
    loss = lse - (1 - e) target - e / V spread + z lse^2

    dl_j = by_total exp(l_j - highest) + by_target [j = label] + by_spread
    dlogit_j = dl_j (1 - (l_j / cap)^2)

where by_x is the loss's derivative with respect to x while `highest` is held: lse does not depend on which shift its
two parts were taken at. Label smoothing e: arXiv 1512.00567, section 7; z-loss: arXiv 2204.02311, section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pieces = tuple[Tensor, Tensor, Tensor, Tensor]


def statistics(logits: Tensor, labels: Tensor, soft_cap: float, out: Pieces) -> None:
    """Writes (highest, total, target, spread) [n]; `target` is 0 where the label is none of the columns."""
    for into, piece in zip(out, _statistics(_capped(logits, soft_cap), labels)[0], strict=True):
        into.copy_(piece)


def gradient_(logits: Tensor, labels: Tensor, by: Pieces, cap: float, first: int = 0) -> None:
    """Overwrites the logits by their gradient; `by` is highest and the gradients of total, target and spread, each [n].

    The labels are counted from a column that is `first` columns before these logits.
    """
    scores = _capped(logits, cap)
    highest, by_total, by_target, by_spread = by
    _write_gradient(logits, scores, _weights(scores, highest), labels - first, by_total, by_target, by_spread, cap)


def loss_and_gradient_(
    logits: Tensor, labels: Tensor, ignored: int, z_loss: float, smoothing: float, cap: float, out: Tensor
) -> None:
    """Writes losses to `out` [n], 0 where the label is `ignored`, over the logits the gradient of the losses' sum."""
    scores = _capped(logits, cap)
    pieces, weights = _statistics(scores, labels)
    highest, total = pieces[:2]
    kept = (labels != ignored).to(total.dtype)
    by_total = kept * (1 + 2 * z_loss * (highest + total.log())) / total
    by_spread = -kept * smoothing / logits.shape[1] if smoothing else None
    _write_gradient(logits, scores, weights, labels, by_total, kept * (smoothing - 1), by_spread, cap)
    out.copy_(loss(pieces, labels, logits.shape[1], ignored, z_loss, smoothing))


def loss(pieces: Pieces, labels: Tensor, vocabulary: int, ignored: int, z_loss: float, smoothing: float) -> Tensor:
    """Losses [n] of the pieces of a whole vocabulary, 0 where the label is `ignored`."""
    highest, total, target, spread = pieces
    lse = highest + total.log()
    losses = lse - (1 - smoothing) * target - smoothing / vocabulary * spread + z_loss * lse.square()
    return losses.where(labels != ignored, 0)


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor * factor, computed in the factor's dtype and rounded once, to `dtype`; factor has no dimensions."""
    return torch.mul(tensor.to(factor.dtype), factor, out=torch.empty_like(tensor, dtype=dtype))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _capped(logits: Tensor, cap: float) -> Tensor:
    wide = logits.to(compute_dtype(logits))
    return cap * torch.tanh(wide / cap) if cap else wide


def _weights(scores: Tensor, highest: Tensor) -> Tensor:
    return (scores - highest[:, None]).exp_()


def _statistics(scores: Tensor, labels: Tensor) -> tuple[Pieces, Tensor]:
    """(pieces, exp(scores - highest))."""
    highest = scores.amax(1)
    weights = _weights(scores, highest)
    inside = (labels >= 0) & (labels < scores.shape[1])
    target = scores.gather(1, labels.where(inside, 0)[:, None]).squeeze(1).where(inside, 0)
    return (highest, weights.sum(1), target, scores.sum(1)), weights


def _write_gradient(
    logits: Tensor,
    scores: Tensor,
    weights: Tensor,
    labels: Tensor,
    by_total: Tensor,
    by_target: Tensor,
    by_spread: Tensor | None,
    cap: float,
) -> None:
    """Overwrites `logits` by the gradient, and `weights` on the way; None for a spread that counts for nothing."""
    grad = weights.mul_(by_total[:, None])
    if by_spread is not None:
        grad += by_spread[:, None]
    inside = (labels >= 0) & (labels < logits.shape[1])
    grad.scatter_add_(1, labels.where(inside, 0)[:, None], by_target.where(inside, 0)[:, None].to(grad.dtype))
    if cap:
        grad *= 1 - (scores / cap) ** 2
    logits.copy_(grad)

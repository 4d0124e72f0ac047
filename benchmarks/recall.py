"""Where a model loses: on held-out tokens that a copy from the context would give, or on the others.

A token is repeated where it followed the same token before, earlier in its document and row: who finds that place can
copy. Zoology (arXiv 2312.04927) and Based (2402.18668) measure associative recall so, but leave out pairs that are
frequent in training; here all count, so a repeated token may also be known without a look at the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.data import HeldoutRows
from longscan.data.batch import IGNORED_LABEL, Batch
from longscan.kernels import Segments
from longscan.models import LanguageModel

# How far back a repeated token counts as near: a group of linearized attention.
NEAR = 64
# What `kinds_of` numbers.
KINDS = ("new", "repeated, near", "repeated, far")
# Tokens of one forward pass (at least one row).
TOKENS_AT_ONCE = 8192


@torch.no_grad()
def losses_by_kind(model: LanguageModel, rows: HeldoutRows, count: int) -> dict[str, tuple[float, float]]:
    """By kind, the share of all tokens and their mean loss in nats (0 without tokens), over the first `count` rows."""
    device = next(model.parameters()).device
    tokens, nats = (torch.zeros(len(KINDS), dtype=torch.float64, device=device) for _ in range(2))
    numbers = torch.arange(min(count, len(rows)))
    for some in numbers.split(max(1, TOKENS_AT_ONCE // rows.seq_len)):
        kinds, losses = _scored(model, rows.read(some.tolist()), device)
        tokens += kinds.bincount(minlength=len(KINDS))
        nats += kinds.bincount(losses.double(), minlength=len(KINDS))
    shares, means = tokens / tokens.sum(), nats / tokens.clamp(min=1)
    return dict(zip(KINDS, zip(shares.tolist(), means.tolist(), strict=True), strict=True))


def _scored(model: LanguageModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The kind and the loss, fp32, of each label [N] of the batch that counts."""
    inputs, labels, doc_start = (tensor.to(device) for tensor in (batch.inputs, batch.labels, batch.doc_start))
    segments = Segments(batch.cu_seqlens.to(device), batch.continues.to(device), doc_start)
    hidden = model.hidden(inputs, segments)
    losses = model.cross_entropy(hidden, labels, ignore_index=IGNORED_LABEL, reduction="none")
    counts = labels.flatten() != IGNORED_LABEL
    kinds = kinds_of(tokens_back(inputs, labels, doc_start.view_as(inputs)))
    return kinds.flatten()[counts], losses[counts]


def kinds_of(back: Tensor) -> Tensor:
    """The place in KINDS, int64, of tokens repeated from so far `back`."""
    return (back > 0).long() + (back > NEAR).long()


def tokens_back(inputs: Tensor, labels: Tensor, doc_start: Tensor) -> Tensor:
    """How many tokens back each label last followed the same input in its document, int64 [B, T]; 0 where never.

    Args:
        inputs, labels: int64 [B, T], as in a Batch.
        doc_start: [B, T], where each token's document begins in its row.
    """
    # In stable order each pair stands right of the same pair's last place.
    pairs, places = (inputs << 32).add(labels).sort(dim=1, stable=True)
    since = places.diff(dim=1) * (pairs.diff(dim=1) == 0)
    back = torch.zeros_like(places).scatter(1, places[:, 1:], since)
    index = torch.arange(inputs.shape[1], device=inputs.device)
    return back * (index - back >= doc_start)

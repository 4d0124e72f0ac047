"""The summed cross entropy of a language model, in chunks of tokens.

The one function here is where a fused linear and cross entropy will go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..data.batch import IGNORED_LABEL, Batch
from ..kernels.segments import Segments

if TYPE_CHECKING:
    from ..models import LanguageModel

# 64 Mi fp32 logits are 256 MiB. Below it the logits are kept for the backward pass; above it each chunk's are made
# again, which costs the head's matrix product once more.
CHUNK_LOGITS = 2**26


def summed_loss(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int) -> Tensor:
    """Returns the sum over the labels of -log p(label), fp32; 0 where every label is IGNORED_LABEL.

    Args:
        hidden: [B, T, D].
        labels: [B, T].
        head: maps [N, D] to logits [N, V].
        vocab_size: V.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    tokens = max(1, CHUNK_LOGITS // vocab_size)
    if hidden.shape[0] <= tokens:
        return _chunk_loss(hidden, labels, head)
    losses = [
        checkpoint(_chunk_loss, part, target, head, use_reentrant=False)
        for part, target in zip(hidden.split(tokens), labels.split(tokens), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")


class LossModule(nn.Module):
    """The model with its loss: batch in, summed loss out. What the optimizer's wrappers call."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Returns the summed loss of `batch`, a scalar."""
        segments = Segments(batch.cu_seqlens, batch.continues, batch.doc_start)
        hidden = self.model.hidden(batch.inputs, segments)
        return summed_loss(hidden, batch.labels, self.model.head, self.model.config.vocab_size)

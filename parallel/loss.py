"""The summed cross entropy of a language model: batch in, scalar out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batch import IGNORED_LABEL, Batch
from ..kernels.segments import Segments
from .context import ContextParallelContext

if TYPE_CHECKING:
    from ..models import LanguageModel


class LossModule(nn.Module):
    """The model with its loss: batch in, summed loss out. What the optimizer's wrappers call.

    Args:
        model: gives hidden states, and the cross entropy of its head without whole logits.
        context: the ranks that hold the other pieces of the same rows; None where this one holds them whole.
        z_loss: weight of the squared logarithm of the softmax's denominator, added to each label's loss.
    """

    def __init__(self, model: LanguageModel, context: dist.ProcessGroup | None = None, z_loss: float = 0.0):
        super().__init__()
        self.model, self.context, self.z_loss = model, context, z_loss
        self._compiled = any(module._compiled_call_impl is not None for module in model.modules())

    def forward(
        self, batch: Batch, layers: range | None = None, x: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the summed loss of `batch`, a scalar; 0 where every label is IGNORED_LABEL.

        Args:
            batch: this rank's piece of the rows.
            layers: the blocks to go through; all of them unless given. Short of the last, hidden states [B, T, D] come
                back, and beside them the part of the loss that is made there, where a model makes it so.
            x: the hidden states that those blocks read; made from the tokens unless given.
        """
        if self._compiled:  # for any number of documents
            torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
        segments = Segments(batch.cu_seqlens, batch.continues, batch.doc_start)
        group = self.context
        pieces = [ContextParallelContext(segments, group) for _ in self.model.blocks] if group else None
        if layers is None:
            return self._loss(self.model.hidden(batch.inputs, segments, pieces), batch)
        x = self.model.embed(batch.inputs, segments.positions) if x is None else x
        x, hidden = self.model.chunk(layers, x, segments, pieces)
        if hidden is None:
            return x
        loss = self._loss(hidden, batch)
        return loss if layers.stop == self.model.config.layers else (x, loss)

    def _loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.model.cross_entropy(hidden, batch.labels, ignore_index=IGNORED_LABEL, z_loss=self.z_loss)

"""Context parallelism: a row's tokens split over ranks in contiguous pieces, and what a mixer learns of the others.

Mixers do not know of it: they ask their SequenceContext. Positions, documents and windows are those of the whole row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch import Batch
from ..kernels.segments import Segments
from ..models.sequence import Entry, Halo, Halos, Summarize
from .collectives import StateExchange, left_halos
from .groups import fold_levels


def piece_of(batch: Batch, rank: int, size: int) -> Batch:
    """Returns tokens `rank * T / size` to `(rank + 1) * T / size` of every row, documents seen from there."""
    tokens = batch.inputs.shape[1]
    assert tokens % size == 0, f"rows of {tokens} tokens cannot be cut into {size} pieces"
    # On the left of a row nothing is held, so a halo's zeros must lie outside every document.
    assert not bool(batch.continues.any()), "a row that goes on with an earlier row's document"
    begin, end = rank * tokens // size, (rank + 1) * tokens // size
    segments = Segments(batch.cu_seqlens, batch.continues, batch.doc_start).split(begin, end)
    tensors = {
        "inputs": batch.inputs[:, begin:end].contiguous(),
        "labels": batch.labels[:, begin:end].contiguous(),
        **{name: getattr(segments, name) for name in ("cu_seqlens", "continues", "doc_start")},
    }
    if batch.inputs.is_pinned():
        # Copied from other memory they would keep the host waiting for all that the GPU still has to do.
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return replace(batch, **tensors)


class ContextParallelContext:
    """The SequenceContext of one mixer's training pass over this rank's piece; keeps no carry.

    Args:
        segments: the documents of the piece.
        group: the ranks of the row, in the order of their pieces.
    """

    def __init__(self, segments: Segments, group: dist.ProcessGroup) -> None:
        self.segments = segments
        self.group = group

    def left_halo(self, name: str, x: Tensor, n: int | None, alone: bool = False) -> tuple[Tensor, Halo]:
        """x and the n entries left of it, from the ranks on the left; zeros, outside every document, left of the row.

        With n None as many as the last rank has on its left: a halo of one length keeps the ranks' graphs alike.
        """
        (x,), halos = self.left_halos({name: x}, n, alone)
        return x, lambda: halos()[0]

    def left_halos(self, entries: dict[str, Tensor], n: int | None, alone: bool = False) -> tuple[list[Tensor], Halos]:
        """The same for several, as one message a rank."""
        xs = list(entries.values())
        if n is None:
            n = (self.group.size() - 1) * xs[0].shape[1]
        return left_halos(xs, n, self.group, alone) if n else (xs, lambda: [x[:, :0] for x in xs])

    def initial_state(self, name: str, summarize: Summarize) -> Entry:
        """The state after the pieces on the left, zero on the first rank; from the right comes its gradient."""
        with torch.no_grad():
            exchange = StateExchange(*summarize(), *fold_levels(self.group))
        return Entry(exchange.entering, exchange.from_right)

    def leave(self, name: str, state: Tensor) -> None:
        """Nothing: each rank on the right folds the summaries itself."""

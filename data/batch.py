"""The batch: what data hands to training, and all that training knows of data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """B packed rows of T tokens.

    Attributes:
        inputs: int64 [B, T].
        labels: int64 [B, T], the token each position predicts; IGNORED_LABEL where nothing is predicted (padding,
            and every label of a dummy row).
        cu_seqlens: int32 [N + 1], continues: bool [B], doc_start: int32 [B * T]: the documents of the rows, as
            `kernels.Segments` defines them. Padding at the end of a row is a segment of its own.
        rows: (stage, row) of each row in the data plan, (-1, row) for rows of a held-out split; an empty tuple for
            dummy rows.
        text_bytes: how many bytes of source text the labels stand for (the bits-per-byte denominator).
    """

    inputs: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    continues: Tensor
    doc_start: Tensor
    rows: tuple[tuple[int, int] | tuple[()], ...]
    text_bytes: float

    @property
    def valid_tokens(self) -> int:
        """How many labels count towards the loss."""
        return int((self.labels != IGNORED_LABEL).sum())

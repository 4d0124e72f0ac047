"""Where documents begin inside a piece of B rows of T tokens.

A piece is a whole row, a chunk of one, or the part of one that a context rank holds. Whatever the piece, the same
three facts decide what a scan, a convolution or an attention may see; no op looks at token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _kept(compute: Callable[[Segments], Tensor]) -> property:
    """A property computed once and kept; torch.compile, which cannot trace that, computes it in its graph."""

    def get(self: Segments) -> Tensor:
        if torch.compiler.is_compiling():
            return compute(self)
        if compute.__name__ not in self.__dict__:
            self.__dict__[compute.__name__] = compute(self)
        return self.__dict__[compute.__name__]

    return property(get, doc=compute.__doc__)


@dataclass(frozen=True)
class Segments:
    """Documents of a piece of `batch` rows of `tokens` tokens.

    Attributes:
        cu_seqlens: int32 [N + 1], 0 = first < ... < last = B * T, over the rows laid end to end. Every row begins a
            segment, so every multiple of T is listed.
        continues: bool [B], true where the row's first segment goes on with a document begun before this piece.
        doc_start: int32 [B * T], each token's document start as a position in its own row: 0 is the row's first
            token of this piece, negative where the document began before it.
    """

    cu_seqlens: Tensor
    continues: Tensor
    doc_start: Tensor

    @property
    def batch(self) -> int:
        """Rows, B."""
        return self.continues.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens a row, T."""
        return self.doc_start.shape[0] // self.batch

    @_kept
    def resets(self) -> Tensor:
        """bool [B, T], true at a document's first token: where state, convolution and RG-LRU start afresh."""
        return self.positions == 0

    @_kept
    def documents(self) -> Tensor:
        """int32 [B, T], each token's document counted from the row's first; 0 for one begun before the piece."""
        return self.resets.cumsum(1, dtype=torch.int32)

    @_kept
    def positions(self) -> Tensor:
        """int64 [B, T], each token's position in its document, counted from 0."""
        index = torch.arange(self.tokens, device=self.doc_start.device)
        return index[None, :] - self.doc_start.view(self.batch, self.tokens).long()

    @staticmethod
    def whole(batch: int, tokens: int, device: torch.device | str = "cpu") -> Segments:
        """One new document a row."""
        return Segments.from_lengths([[tokens]] * batch, device=device)

    @staticmethod
    def from_lengths(
        lengths: list[list[int]], earlier: list[int] | None = None, device: torch.device | str = "cpu"
    ) -> Segments:
        """Builds segments from the lengths of each row's pieces of documents.

        Args:
            lengths: for each row the lengths, each >= 1, of its segments in order; every row sums to the same T.
            earlier: for each row how many tokens of its first document lie before this piece; 0 begins a new one.
        """
        earlier = earlier or [0] * len(lengths)
        totals = {sum(row) for row in lengths}
        assert len(totals) == 1, f"rows of different length: {sorted(totals)}"
        bounds, doc_start = [0], []
        for row, before in zip(lengths, earlier, strict=True):
            begin = 0
            for index, length in enumerate(row):
                assert length >= 1, f"an empty segment in {row}"
                doc_start += [begin - (before if index == 0 else 0)] * length
                begin += length
                bounds.append(bounds[-1] + length)
        return Segments(
            torch.tensor(bounds, dtype=torch.int32, device=device),
            torch.tensor([before > 0 for before in earlier], device=device),
            torch.tensor(doc_start, dtype=torch.int32, device=device),
        )

    def split(self, begin: int, end: int) -> Segments:
        """The segments of tokens `begin` to `end` (exclusive) of every row, as the piece that starts at `begin`."""
        assert 0 <= begin < end <= self.tokens, f"split [{begin}, {end}) of {self.tokens} tokens"
        resets = self.resets[:, begin:end].clone()
        continues = ~resets[:, 0]
        resets[:, 0] = True
        bounds = resets.reshape(-1).nonzero().view(-1).to(torch.int32)
        total = torch.tensor([resets.numel()], dtype=torch.int32, device=bounds.device)
        doc_start = self.doc_start.view(self.batch, -1)[:, begin:end] - begin
        return Segments(torch.cat([bounds, total]), continues, doc_start.reshape(-1).contiguous())

    def to(self, device: torch.device | str) -> Segments:
        """The same segments on `device`, copied without waiting where the memory is pinned."""
        return Segments(*(t.to(device, non_blocking=True) for t in (self.cu_seqlens, self.continues, self.doc_start)))

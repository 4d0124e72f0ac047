"""How the stream of a corpus becomes full rows of `seq_len` positions.

Every packing takes the positions of the stream in order and puts each of them into exactly one row, so a row count is
closed form and no position is padding. They differ in which documents a row's end cuts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .streams import ROWS, CorpusStream, Pieces, Remaining, permutation

GROUP = 256
GROUPS_KEPT = 2
# The rows of a block are trained in a permuted order: at most this many rows, and about this many positions.
BLOCK_ROWS, BLOCK_POSITIONS = 4096, 2**25


class ConcatRows:
    """Row after row of the stream, in an order that is permuted inside blocks of rows.

    Neighbouring rows are parts of the same long document, so that without the permutation a book would fill whole
    batches. Inside a block an epoch ends before the next begins. A stage that ends inside a block leaves the block's
    other rows to the next stage.
    """

    def __init__(self, stream: CorpusStream, source: Remaining, seq_len: int, stage: int):
        self.stream, self.source, self.seq_len, self.stage = stream, source, seq_len, stage
        self.block = min(BLOCK_ROWS, max(GROUP, BLOCK_POSITIONS // seq_len))
        self._order = lru_cache(GROUPS_KEPT)(self._permute)

    def row(self, k: int) -> Pieces:
        """The pieces of row k."""
        return self.in_order(int(self._order(k // self.block)[k % self.block]))

    def in_order(self, k: int) -> Pieces:
        """The pieces of the k-th row of the stream: positions k * seq_len to (k + 1) * seq_len of what is left."""
        return self.stream.resolve(*self.source.intervals(k * self.seq_len, (k + 1) * self.seq_len))

    def after(self, rows: int) -> Remaining:
        """What is left of the stream after `rows` rows."""
        blocks, used = divmod(rows, self.block)
        if not used:
            return self.source.after(rows * self.seq_len)
        unused = np.sort(self._order(blocks)[used:]) * self.seq_len
        parts = [self.source.intervals(begin, begin + self.seq_len) for begin in unused.tolist()]
        rest = self.source.after((blocks + 1) * self.block * self.seq_len)
        begins, ends = (np.concatenate(column) for column in zip(*parts, (rest.begins, rest.ends), strict=True))
        return Remaining.of(begins, ends, rest.tail)

    def _permute(self, block: int) -> np.ndarray:
        """The rows of the stream that the block holds, in the order in which they are trained."""
        order = permutation(self.block, self.stream.seed or 0, ROWS, self.stream.corpus, self.stage, block)
        rows = block * self.block + order
        epochs = self.source.at(rows * self.seq_len) // self.stream.total
        return rows[np.argsort(epochs, kind="stable")]


class BestFitRows:
    """Each group of 256 rows holds the next positions of the stream, dealt to rows by best-fit decreasing.

    The rows of a group are permuted, since best-fit leaves the long documents in the first ones. A stage that ends
    inside a group leaves the pieces of the group's other rows to the next stage.
    """

    def __init__(self, stream: CorpusStream, source: Remaining, seq_len: int, stage: int):
        self.stream, self.source, self.seq_len, self.stage = stream, source, seq_len, stage
        self._group = lru_cache(GROUPS_KEPT)(self._pack)

    def row(self, k: int) -> Pieces:
        """The pieces of row k, in stream order."""
        pieces, bounds = self._group(k // GROUP)
        return pieces.take(slice(bounds[k % GROUP], bounds[k % GROUP + 1]))

    def after(self, rows: int) -> Remaining:
        """What is left of the stream after `rows` rows."""
        groups, used = divmod(rows, GROUP)
        if not used:
            return self.source.after(groups * GROUP * self.seq_len)
        pieces, bounds = self._group(groups)
        unused = pieces.take(slice(bounds[used], None))
        order = np.argsort(unused.position)
        begins = unused.position[order]
        rest = self.source.after((groups + 1) * GROUP * self.seq_len)
        ends = begins + unused.length[order]
        return Remaining.of(np.append(begins, rest.begins), np.append(ends, rest.ends), rest.tail)

    def _pack(self, group: int) -> tuple[Pieces, list[int]]:
        """The pieces of a group, row after row, and where each row's begin."""
        size = GROUP * self.seq_len
        pieces = self.stream.resolve(*self.source.intervals(group * size, (group + 1) * size))
        index, begin, length, bins = best_fit(pieces.length, GROUP, self.seq_len)
        parts = pieces.cut(index, begin, length)
        place = np.empty(GROUP, np.int64)
        place[permutation(GROUP, self.stream.seed or 0, ROWS, self.stream.corpus, self.stage, group)] = np.arange(GROUP)
        rows = place[bins]
        order = np.lexsort((parts.position, rows))
        return parts.take(order), np.searchsorted(rows[order], np.arange(GROUP + 1)).tolist()


PACKINGS = {"concat": ConcatRows, "best_fit": BestFitRows}


def best_fit(lengths: np.ndarray, bins: int, capacity: int) -> tuple[np.ndarray, ...]:
    """Deals pieces that sum to bins * capacity to bins so that each is full, cutting few: (index, begin, length, bin).

    Part i covers `length[i]` positions of piece `index[i]` from its `begin[i]`-th on. Pieces longer than a bin are
    cut at multiples of the capacity. The parts are placed best-fit decreasing (the fullest bin they fit in, then the
    lowest number); those that fit nowhere whole fill, from the largest on, the largest gaps that are left.
    """
    assert int(lengths.sum()) == bins * capacity, f"{int(lengths.sum())} positions for {bins} bins of {capacity}"
    chunks = -(-lengths // capacity)
    index = np.repeat(np.arange(len(lengths)), chunks)
    begin = (np.arange(len(index)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * capacity
    length = np.minimum(lengths[index] - begin, capacity)
    order = np.argsort(-length, kind="stable")
    gaps = [capacity * bins + number for number in range(bins)]
    placed, unplaced = np.empty(len(order), np.int64), []
    for part, size in zip(order.tolist(), length[order].tolist(), strict=True):
        at = bisect_left(gaps, size * bins)
        if at == len(gaps):
            unplaced.append(part)
            continue
        gap = gaps.pop(at)
        placed[part] = gap % bins
        if gap // bins > size:
            insort(gaps, gap - size * bins)
    whole = np.ones(len(index), bool)
    whole[unplaced] = False
    split = np.array(_split(unplaced, length, gaps, bins), np.int64).reshape(-1, 4)
    source = split[:, 0]
    return (
        np.concatenate([index[whole], index[source]]),
        np.concatenate([begin[whole], begin[source] + split[:, 1]]),
        np.concatenate([length[whole], split[:, 2]]),
        np.concatenate([placed[whole], split[:, 3]]),
    )


def _split(parts: list[int], length: np.ndarray, gaps: list[int], bins: int) -> list[tuple[int, int, int, int]]:
    """Cuts parts over the gaps (size * bins + bin, ascending) that remain: (part, begin, length, bin)."""
    cuts = []
    for part in parts:
        begin, left = 0, int(length[part])
        while left:
            gap = gaps.pop(min(bisect_left(gaps, left * bins), len(gaps) - 1))
            size, number = divmod(gap, bins)
            taken = min(left, size)
            cuts.append((part, begin, taken, number))
            if size > taken:
                insort(gaps, gap - taken * bins)
            begin, left = begin + taken, left - taken
    return cuts


@dataclass(frozen=True)
class PackingReport:
    """What a packing does to documents, counted over the rows of one or more whole groups.

    Attributes:
        packing: its name.
        positions: how many positions the rows have, and how many of their labels count: all, in every packing.
        documents: how many documents have a part in the rows.
        longer: how many of them are longer than a row, which no packing can keep whole.
        cut: how many of them are in more than one piece, or partly outside the rows.
        headless: how many positions lie in a piece that does not begin at its document's start.
    """

    packing: str
    positions: int
    useful: int
    documents: int
    longer: int
    cut: int
    headless: int

    @property
    def efficiency(self) -> float:
        """Useful labels a position."""
        return self.useful / self.positions

    def __str__(self) -> str:
        return (
            f"{self.packing}: {self.efficiency:.1%} of positions are useful; {self.cut / self.documents:.1%} of "
            f"documents are cut ({self.longer / self.documents:.1%} are longer than a row); "
            f"{self.headless / self.positions:.1%} of positions have lost the start of their document"
        )

    def __add__(self, other: PackingReport) -> PackingReport:
        assert self.packing == other.packing
        sums = (getattr(self, name) + getattr(other, name) for name in list(self.__dataclass_fields__)[1:])
        return PackingReport(self.packing, *sums)

    @staticmethod
    def of(packing: str, rows: list[Pieces], seq_len: int) -> PackingReport:
        """Counts over the given rows of one corpus."""
        pieces = Pieces.join(rows[0].corpus, rows)
        head = np.stack([pieces.shard, pieces.document, pieces.position - pieces.start], 1)
        _, first = np.unique(head, axis=0, return_index=True)
        whole = pieces.length == pieces.total
        positions = int(pieces.length.sum())
        return PackingReport(
            packing=packing,
            positions=positions,
            useful=positions,
            documents=len(first),
            longer=int((pieces.total[first] > seq_len).sum()),
            cut=len(first) - int(whole.sum()),
            headless=int(pieces.length[pieces.start > 0].sum()),
        )


def compare_packings(stream: CorpusStream, source: Remaining, seq_len: int, stage: int = 0) -> list[PackingReport]:
    """What each packing would do to the first group of rows."""
    rows = {
        "concat": map(ConcatRows(stream, source, seq_len, stage).in_order, range(GROUP)),
        "best_fit": map(BestFitRows(stream, source, seq_len, stage).row, range(GROUP)),
    }
    return [PackingReport.of(name, list(found), seq_len) for name, found in rows.items()]

"""The documents of one corpus in training order: an endless stream of positions, found from the index alone.

A document of n tokens contributes 1 + n positions: its begin-of-document token, then its tokens. In each epoch the
shards are permuted, `shuffle_window` of them at a time form a window, and the documents of a window are permuted.
In memory are only a prefix sum over shards and the document tables of the last windows asked for (12 bytes a
document). Permutations come from integer arithmetic written here, so no library can change them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .cache import SplitFiles

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SHARDS, DOCUMENTS, ROWS = 1, 2, 3
WINDOWS_KEPT = 2


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(count: int, *words: int) -> np.ndarray:
    """The order of `count` things that the words (a seed, a purpose, an epoch, ...) decide: int64 [count].

    The stable argsort of splitmix64 keys, of which the lowest bits, as many as the largest index has, do not count:
    they hold the index while one plain sort, three times as fast as an argsort, orders both.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix((state ^ np.uint64(word)) + GOLDEN)
    keys = _mix(state + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    index = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    keys &= ~index
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & index).astype(np.int64)


class Piece(NamedTuple):
    """Part of a document: `length` positions from `start`, where position 0 is the begin-of-document token."""

    corpus: int
    shard: int
    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents of one corpus as arrays of one entry a piece; iterating gives `Piece`s.

    Attributes:
        corpus: index of the corpus.
        position: where in the corpus's stream the piece begins.
        shard, document: which document; the shard counts as in the manifest, the document in its shard.
        start, length: the positions of the document that the piece covers.
        total: the positions of the whole document.
    """

    corpus: int
    position: np.ndarray
    shard: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    total: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    def __iter__(self) -> Iterator[Piece]:
        columns = (self.shard, self.document, self.start, self.length)
        return (Piece(self.corpus, *row) for row in zip(*(column.tolist() for column in columns), strict=True))

    def take(self, index: np.ndarray | slice) -> Pieces:
        """The pieces that `index` selects, in its order."""
        return Pieces(self.corpus, *(column[index] for column in self._columns()))

    def cut(self, index: np.ndarray, begin: np.ndarray, length: np.ndarray) -> Pieces:
        """For each i, `length[i]` positions of piece `index[i]`, from its `begin[i]`-th on."""
        whole = self.take(index)
        return Pieces(
            self.corpus, whole.position + begin, whole.shard, whole.document, whole.start + begin, length, whole.total
        )

    @staticmethod
    def join(corpus: int, parts: list[Pieces]) -> Pieces:
        """The pieces of all parts, in order."""
        if not parts:
            return Pieces(corpus, *(np.zeros(0, np.int64) for _ in range(6)))
        return Pieces(
            corpus, *(np.concatenate(columns) for columns in zip(*(p._columns() for p in parts), strict=True))
        )

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.position, self.shard, self.document, self.start, self.length, self.total


@dataclass(frozen=True)
class Remaining:
    """What is left of a corpus's stream: some intervals of positions, then everything from `tail` on.

    Intervals ascend, do not touch one another nor the tail. Positions of what is left are counted from 0.
    """

    begins: np.ndarray
    ends: np.ndarray
    tail: int

    @staticmethod
    def all() -> Remaining:
        """The whole stream."""
        return Remaining(np.zeros(0, np.int64), np.zeros(0, np.int64), 0)

    @staticmethod
    def of(begins: np.ndarray, ends: np.ndarray, tail: int) -> Remaining:
        """Builds it from ascending intervals that may touch."""
        begins, ends = _merge(np.append(begins, tail), np.append(ends, np.iinfo(np.int64).max))
        return Remaining(begins[:-1], ends[:-1], int(begins[-1]))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each interval begins in what is left; the last entry is where the tail does."""
        return np.concatenate([[0], np.cumsum(self.ends - self.begins)])

    def intervals(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The intervals (begins, ends) of the stream that positions `begin` to `end` of what is left cover."""
        offsets = self.offsets
        low, high = np.searchsorted(offsets[1:], begin, "right"), np.searchsorted(offsets[:-1], end, "left")
        shift = self.begins[low:high] - offsets[:-1][low:high]
        begins = np.maximum(offsets[:-1][low:high], begin) + shift
        ends = np.minimum(offsets[1:][low:high], end) + shift
        if end > max(begin, offsets[-1]):
            shift = self.tail - offsets[-1]
            begins, ends = np.append(begins, max(begin, offsets[-1]) + shift), np.append(ends, end + shift)
        return begins, ends

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The positions of the stream at which positions of what is left lie."""
        part = np.searchsorted(self.offsets[1:], positions, "right")
        return np.append(self.begins, self.tail)[part] + positions - self.offsets[part]

    def after(self, position: int) -> Remaining:
        """What is left from `position` on."""
        last = int(self.offsets[-1])
        begins, ends = self.intervals(position, max(position, last))
        return Remaining(begins, ends, self.tail + max(0, position - last))


def _merge(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins ascending intervals where one ends at the next one's begin."""
    first = np.append(True, begins[1:] != ends[:-1])
    return begins[first], ends[np.append(first[1:], True)]


class _Window(NamedTuple):
    """The i-th document covers positions bounds[i] to bounds[i + 1] and is number order[i] of its shards' documents.

    Shard shards[j] holds numbers first[j] to first[j + 1].
    """

    begin: int
    end: int
    bounds: np.ndarray
    order: np.ndarray
    shards: np.ndarray
    first: np.ndarray


class CorpusStream:
    """The endless stream of one split: `resolve` tells which documents lie at some intervals of positions.

    Args:
        files: the split.
        corpus: its index in the plan.
        seed: decides the order; None keeps the order in which the documents were prepared.
        shuffle_window: how many shards are shuffled together.
    """

    def __init__(self, files: SplitFiles, corpus: int = 0, seed: int | None = None, shuffle_window: int = 1):
        self.files, self.corpus, self.seed, self.shuffle_window = files, corpus, seed, shuffle_window
        self._positions = np.array([shard.documents + shard.tokens for shard in files.shards], np.int64)
        self.total = int(self._positions.sum())
        self._epoch = lru_cache(WINDOWS_KEPT)(self._load_epoch)
        self._window = lru_cache(WINDOWS_KEPT)(self._load_window)

    def resolve(self, begins: np.ndarray, ends: np.ndarray) -> Pieces:
        """The pieces at ascending intervals of positions, in order. Costs the windows that the intervals meet."""
        parts, at = [], int(begins[0]) if len(begins) else 0
        while len(begins):
            window = self._window(*self._locate(at))
            high = int(np.searchsorted(begins, window.end, "left"))
            parts.append(
                self._cut(window, np.maximum(begins[:high], window.begin), np.minimum(ends[:high], window.end))
            )
            first = high - 1 if ends[high - 1] > window.end else high
            begins, ends = begins[first:], ends[first:]
            at = max(window.end, int(begins[0])) if len(begins) else 0
        return Pieces.join(self.corpus, parts)

    def _locate(self, position: int) -> tuple[int, int]:
        """The epoch and the window of a position."""
        epoch, within = divmod(position, self.total)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], within, "right")) - 1

    def _permutation(self, count: int, *words: int) -> np.ndarray:
        return np.arange(count) if self.seed is None else permutation(count, self.seed, *words)

    def _load_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards, and where each window begins (and the last one ends)."""
        order = self._permutation(len(self._positions), SHARDS, self.corpus, epoch)
        bounds = np.concatenate([[0], np.cumsum(self._positions[order])])
        return order, np.append(bounds[: len(order) : self.shuffle_window], bounds[-1])

    def _load_window(self, epoch: int, window: int) -> _Window:
        order, starts = self._epoch(epoch)
        shards = order[window * self.shuffle_window : (window + 1) * self.shuffle_window]
        tables = [self._tokens(shard) for shard in shards.tolist()]
        first = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
        order = self._permutation(int(first[-1]), DOCUMENTS, self.corpus, epoch, window)
        begin = epoch * self.total + int(starts[window])
        bounds = np.zeros(len(order) + 1, np.int64)
        np.cumsum(np.concatenate(tables)[order], dtype=np.int64, out=bounds[1:])
        bounds += np.arange(begin, begin + len(bounds))
        return _Window(begin, int(bounds[-1]), bounds, order.astype(np.uint32), shards, first)

    def _tokens(self, shard: int) -> np.ndarray:
        """How many tokens each document of the shard has."""
        info = self.files.shards[shard]
        tokens = self.files.table(shard)["tokens"].copy()
        found = int(tokens.sum(dtype=np.int64))
        if found != info.tokens:
            raise UserError(
                f"{self.files.corpus.location}/{info.index} counts {found} tokens, the manifest {info.tokens}; "
                "prepare the corpus again."
            )
        return tokens

    def _cut(self, window: _Window, begins: np.ndarray, ends: np.ndarray) -> Pieces:
        """The pieces at intervals that lie inside the window."""
        low = np.searchsorted(window.bounds, begins, "right") - 1
        counts = np.searchsorted(window.bounds, ends, "left") - low
        index = np.arange(int(counts.sum())) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        first, last = window.bounds[index], window.bounds[index + 1]
        number = window.order[index].astype(np.int64)
        shard = np.searchsorted(window.first, number, "right") - 1
        begin = np.maximum(first, np.repeat(begins, counts))
        length = np.minimum(last, np.repeat(ends, counts)) - begin
        document = number - window.first[shard]
        return Pieces(self.corpus, begin, window.shards[shard], document, begin - first, length, last - first)

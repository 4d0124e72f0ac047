"""Rows become tensors: token bytes are read from mapped shards, in a thread beside training.

The only place of `data` that reads tokens. A batch depends on the rows asked for and on nothing else.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from .batch import IGNORED_LABEL, Batch
from .cache import ShardCache, SplitFiles
from .index import Corpus, TokenizerInfo
from .row_plan import DataPlan
from .streams import CorpusStream, Pieces

HELDOUT_STAGE = -1

Names = tuple[tuple[int, int] | tuple[()], ...]


class RowLoader:
    """Reads rows of a data plan.

    Args:
        plan: what rows hold.
        pin_memory: put batches into page-locked memory, from which a GPU copies without waiting.
    """

    def __init__(self, plan: DataPlan, pin_memory: bool = False):
        self.plan = plan
        self._assemble = _Assembler(plan.files, plan.corpora[0].tokenizer, pin_memory)

    def read(self, stage: int, rows: Sequence[int | None]) -> Batch:
        """The batch of these rows of a stage; None gives a dummy row, none of whose labels counts."""
        pieces = [None if row is None else self.plan.row(stage, row).pieces for row in rows]
        names: Names = tuple(() if row is None else (stage, row) for row in rows)
        return self._assemble(pieces, names, self.plan.stages[stage].seq_len)

    def prefetch(self, schedule: Iterable[tuple[int, Sequence[int | None]]], depth: int = 2) -> Prefetch:
        """Iterates over the batches of a schedule of (stage, rows), which a thread reads up to `depth` ahead."""
        return Prefetch(self.read, schedule, depth)


class HeldoutRows:
    """The rows of a split read once, in the order in which it was prepared: what validation runs over.

    The last row ends in padding. Rows are named (-1, row) in a batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        split: str = "heldout",
        cache: ShardCache | None = None,
        pin_memory: bool = False,
    ):
        self.seq_len = seq_len
        files = SplitFiles(corpus, split, cache, max_open=4)
        self._stream = CorpusStream(files)
        if not self._stream.total:
            raise ConfigError(f"{corpus.location} has no document in its {split} split; prepare one with more text.")
        self._assemble = _Assembler((files,), corpus.tokenizer, pin_memory)

    def __len__(self) -> int:
        return -(-self._stream.total // self.seq_len)

    def read(self, rows: Sequence[int | None]) -> Batch:
        """The batch of these rows; None gives a dummy row."""
        names: Names = tuple(() if row is None else (HELDOUT_STAGE, row) for row in rows)
        return self._assemble([None if row is None else self._pieces(row) for row in rows], names, self.seq_len)

    def _pieces(self, row: int) -> Pieces:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        begin, end = row * self.seq_len, min((row + 1) * self.seq_len, self._stream.total)
        return self._stream.resolve(np.array([begin]), np.array([end]))


@dataclass(frozen=True)
class Document:
    """A whole document: its stored tokens (int64, without begin and end) and the bytes of text they stand for."""

    shard: int
    document: int
    tokens: np.ndarray
    text_bytes: int


def documents(
    corpus: Corpus, split: str = "heldout", min_tokens: int = 0, cache: ShardCache | None = None
) -> Iterator[Document]:
    """Yields the documents of a split that have at least `min_tokens` tokens, in the order they were prepared."""
    files = SplitFiles(corpus, split, cache, max_open=2)
    for shard in range(len(files.shards)):
        table = files.table(shard)
        for number in np.flatnonzero(table["tokens"] >= min_tokens).tolist():
            entry = table[number]
            count = int(entry["tokens"])
            _check_bounds(files, shard, entry["offset"], entry["tokens"])
            tokens = np.frombuffer(files.data(shard), files.dtype, count, int(entry["offset"])) if count else []
            yield Document(shard, number, np.array(tokens, np.int64), int(entry["bytes"]))


def row_digest(batch: Batch) -> list[str]:
    """A hash of the inputs and labels of each row, the same on every machine."""
    pairs = zip(batch.inputs.cpu().numpy(), batch.labels.cpu().numpy(), strict=True)
    return [
        hashlib.blake2b(inputs.tobytes() + labels.tobytes(), digest_size=16).hexdigest() for inputs, labels in pairs
    ]


class _Assembler:
    """Fills batches from pieces of documents."""

    def __init__(self, files: Sequence[SplitFiles], tokenizer: TokenizerInfo, pin_memory: bool):
        if pin_memory and not torch.cuda.is_available():
            raise ConfigError("pin_memory is on and this process sees no CUDA GPU; turn it off.")
        self.files, self.tokenizer, self.pin_memory = files, tokenizer, pin_memory

    def __call__(self, rows: Sequence[Pieces | None], names: Names, seq_len: int) -> Batch:
        inputs, labels = (self._empty((len(rows), seq_len), torch.int64) for _ in range(2))
        doc_start = self._empty((len(rows) * seq_len,), torch.int32)
        bounds, text_bytes = [], 0.0
        for number, pieces in enumerate(rows):
            row_inputs, row_labels = inputs[number].numpy(), labels[number].numpy()
            at = np.zeros(1, np.int64)
            if pieces is not None:
                at = np.concatenate([at, np.cumsum(pieces.length)])
                text_bytes += self._fill(pieces, at, row_inputs, row_labels)
            row_inputs[at[-1] :] = self.tokenizer.bos_id
            row_labels[at[-1] :] = IGNORED_LABEL
            starts = at if at[-1] < seq_len else at[:-1]
            lengths = np.diff(starts, append=seq_len)
            doc_start[number * seq_len : (number + 1) * seq_len].numpy()[:] = np.repeat(starts, lengths)
            bounds.append(number * seq_len + starts)
        bounds.append(np.array([len(rows) * seq_len]))
        joined = np.concatenate(bounds)
        cu_seqlens = self._empty(joined.shape, torch.int32)
        cu_seqlens.numpy()[:] = joined
        continues = self._empty((len(rows),), torch.bool).zero_()
        return Batch(inputs, labels, cu_seqlens, continues, doc_start, names, text_bytes)

    def _fill(self, pieces: Pieces, at: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> float:
        """Writes inputs and labels of the pieces of a row, which begin at `at`; returns the labels' bytes of text."""
        files, item = self.files[pieces.corpus], self.files[pieces.corpus].dtype.itemsize
        offset, text_bytes = _look_up(files, pieces)
        tokens = pieces.total - 1
        stored = np.minimum(pieces.length, tokens - pieces.start)
        first = np.full(len(pieces), self.tokenizer.bos_id, np.int64)
        data = {shard: files.data(shard) for shard in set(pieces.shard.tolist())}
        columns = (pieces.shard, at[:-1], stored, offset + pieces.start * item, pieces.start)
        for number, (shard, begin, count, where, start) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            if count:
                labels[begin : begin + count] = np.frombuffer(data[shard], files.dtype, count, where)
            if start:
                first[number] = np.frombuffer(data[shard], files.dtype, 1, where - item)[0]
        ends = pieces.start + pieces.length == pieces.total
        labels[at[1:][ends] - 1] = self.tokenizer.eos_id
        filled = int(at[-1])
        inputs[1:filled] = labels[: filled - 1]
        inputs[at[:-1]] = first
        largest = max(labels[:filled].max(), first.max())
        if largest >= self.tokenizer.vocab_size:
            raise UserError(
                f"{files.corpus.location} holds token {largest}, and its vocabulary has {self.tokenizer.vocab_size}; "
                "a shard was changed. Check with verify=checksum, or prepare the corpus again."
            )
        return float((text_bytes * stored / np.maximum(tokens, 1)).sum())

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.pin_memory)


def _look_up(files: SplitFiles, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece's document begins in its shard, and the bytes of text of the whole document."""
    offset, text_bytes = np.empty(len(pieces), np.int64), np.empty(len(pieces), np.int64)
    for shard in np.unique(pieces.shard).tolist():
        here = pieces.shard == shard
        entries = files.table(shard)[pieces.document[here]]
        _check_bounds(files, shard, entries["offset"], entries["tokens"])
        offset[here], text_bytes[here] = entries["offset"], entries["bytes"]
    return offset, text_bytes


def _check_bounds(files: SplitFiles, shard: int, offset: Any, tokens: Any) -> None:
    """Raises UserError where a table points outside its shard."""
    info = files.shards[shard]
    end = int(np.max(offset.astype(np.int64) + tokens.astype(np.int64) * files.dtype.itemsize))
    if end > info.size:
        raise UserError(
            f"{files.corpus.location}/{info.index} points to byte {end} of {info.file}, which has {info.size}; "
            "prepare the corpus again."
        )


class Prefetch:
    """An iterator over batches that a thread reads ahead; an error of the thread is raised where it would be read.

    Close it, or leave its `with`, to end the thread early. The schedule is iterated by the thread.
    """

    def __init__(self, read: Callable[..., Batch], schedule: Iterable[tuple[Any, ...]], depth: int):
        assert depth >= 1, f"a prefetch depth of {depth}"
        self._ready: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_read_ahead, args=(read, schedule, self._ready, self._stopped), name="row-loader", daemon=True
        )
        weakref.finalize(self, self._stopped.set)
        self._thread.start()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Batch:
        if self._stopped.is_set():
            raise StopIteration
        batch, error = self._ready.get()
        if batch is None:
            self.close()
            assert error is not None
            raise error
        return batch

    def close(self) -> None:
        """Ends the thread and waits for it; nothing more can be read."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_ahead(
    read: Callable[..., Batch], schedule: Iterable[tuple[Any, ...]], ready: queue.Queue, stopped: threading.Event
) -> None:
    """Puts (batch, None) for each entry of the schedule, then (None, error or StopIteration)."""

    def put(item: tuple[Batch | None, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for entry in schedule:
            put((read(*entry), None))
            if stopped.is_set():
                return
        put((None, StopIteration()))
    except BaseException as error:
        put((None, error))

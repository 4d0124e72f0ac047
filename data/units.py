"""Units: the pieces of work that a corpus is prepared in, each done whole or not at all.

A unit reads its slices, encodes their documents, and writes a folder `unit-N` with the shards of both splits, a record
and the list of what was skipped. The folder gets its name when all in it is on the disk, so a unit that is there is
finished; and what it holds depends on its input alone, so it does not matter who does it, when, or how often.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable import sync, sync_folder, write_durably
from ..errors import UserError
from .encoded import encode
from .index import ShardInfo, TokenizerInfo
from .shards import SplitWriter, read_documents
from .sources import LARGEST_DOCUMENT, Document, EncodedDocument, Skipped, Slice, read_slice
from .tokenizer import TOKENIZER_FILE, ByteTokenizer, HuggingFaceTokenizer, Tokenizer

TRAIN, HELDOUT = "train", "heldout"
RECORD = "record.json"
SKIPPED = "skipped.jsonl"

_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every unit of one preparation shares; small, since it is sent to each worker."""

    work: Path
    tokenizer: TokenizerInfo
    heldout: float
    field: str
    shard_bytes: int


@dataclass(frozen=True)
class Unit:
    """A numbered piece of work. `moved` names a document whose split is given, whatever its hash says."""

    number: int
    slices: tuple[Slice, ...]
    moved: tuple[str, str] | None = None

    @property
    def size(self) -> int:
        """About how many bytes of text the unit reads."""
        return sum(piece.size for piece in self.slices)


@dataclass(frozen=True)
class Record:
    """What a finished folder holds: shards of each split, counts of what was skipped, and its outermost documents.

    `lowest` and `highest` are (position, name) of the documents with the lowest and highest split position.
    """

    splits: dict[str, list[ShardInfo]]
    skipped: dict[str, int]
    lowest: tuple[float, str] | None
    highest: tuple[float, str] | None

    def documents(self, split: str) -> int:
        """How many documents of a split the folder holds."""
        return sum(shard.documents for shard in self.splits[split])


def split_position(name: str) -> float:
    """Where in [0, 1) a document's name falls; it is held out where that is below the share."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()) / 2**64


def run_unit(job: Job, unit: Unit, check: Callable[[], None] = lambda: None) -> None:
    """Does a unit unless it is there already.

    Args:
        job: what all units share.
        unit: which slices to read.
        check: called every MiB or so; what it raises ends the unit and leaves nothing of it.
    """
    with new_folder(job.work / folder_name(unit.number), replace=unit.moved is not None) as folder:
        writers = {
            split: SplitWriter(folder, split, job.shard_bytes, f"{split}-{unit.number:06d}")
            for split in (TRAIN, HELDOUT)
        }
        try:
            record = _write_documents(job, unit, folder, writers, check)
        finally:
            for writer in writers.values():
                writer.abandon()
        write_record(folder, record)


def merge_shards(job: Job, parts: Iterable[tuple[Path, ShardInfo]], dtype: str, target: Path) -> None:
    """Writes the documents of many small held-out shards into few of full size, as the folder `target`."""
    with new_folder(target) as folder:
        writer = SplitWriter(folder, HELDOUT, job.shard_bytes, HELDOUT)
        try:
            for source, part in parts:
                for tokens, text_bytes in read_documents(source / part.file, source / part.index, dtype):
                    writer.add(tokens, text_bytes)
            shards = writer.close()
        finally:
            writer.abandon()
        write_record(folder, Record({TRAIN: [], HELDOUT: shards}, {}, None, None))


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that takes the name `target` in one step at the end, and leaves nothing where it is not filled.

    Raises:
        UserError: the disk is full.
    """
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        if replace and target.exists():
            os.rename(target, replaced)
        os.rename(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        if is_full(error):
            raise full_disk(target.parent) from error
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # a worker that outlived its parent was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk(folder: Path) -> UserError:
    """The error for a disk with no room left; what was finished stays, so the same command goes on from there."""
    return UserError(f"no room left on the disk of {folder}; what is finished is kept: free some and run again.")


def folder_name(number: int) -> str:
    """The name of a finished unit's folder."""
    return f"unit-{number:06d}"


def write_record(folder: Path, record: Record) -> None:
    """Puts the record in its folder."""
    write_durably(folder / RECORD, json.dumps(dataclasses.asdict(record)).encode())


def read_record(folder: Path) -> Record | None:
    """The record of a finished folder, None where the folder is not there."""
    try:
        fields: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    fields["splits"] = {name: [ShardInfo(**shard) for shard in shards] for name, shards in fields["splits"].items()}
    return Record(**fields)


def _write_documents(
    job: Job, unit: Unit, folder: Path, writers: dict[str, SplitWriter], check: Callable[[], None]
) -> Record:
    """Encodes the unit's documents into the writers and logs what is skipped."""
    tokenizer = _tokenizer(job)
    counts: Counter[str] = Counter()
    moved = dict([unit.moved] if unit.moved else [])
    lowest = highest = None
    with open(folder / SKIPPED, "wb") as log:
        for batch in _batches(job, unit, counts, log):
            check()
            for name, tokens, text_bytes in encode(batch, tokenizer):
                if not len(tokens):
                    _skip(Skipped("empty", name, "no tokens"), counts, log)
                    continue
                position = split_position(name)
                place = (position, name)
                lowest, highest = min(lowest or place, place), max(highest or place, place)
                split = moved.pop(name, HELDOUT if position < job.heldout else TRAIN)
                writers[split].add(tokens, text_bytes)
        sync(log)
    return Record({split: writer.close() for split, writer in writers.items()}, dict(counts), lowest, highest)


def _batches(job: Job, unit: Unit, counts: Counter[str], log: Any) -> Iterator[list[Document | EncodedDocument]]:
    """The unit's good documents, about a MiB of text or ids at a time."""
    batch: list[Document | EncodedDocument] = []
    size = 0
    for piece in unit.slices:
        for item in read_slice(piece, job.field):
            fault = item if isinstance(item, Skipped) else _fault(item)
            if fault is not None:
                _skip(fault, counts, log, piece.file.path)
                continue
            batch.append(item)  # type: ignore[arg-type]
            size += item.size  # type: ignore[union-attr]
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _fault(document: Document | EncodedDocument) -> Skipped | None:
    """Why a document cannot be stored, None where it can."""
    if isinstance(document, EncodedDocument):
        too_large = len(document.ids) > LARGEST_DOCUMENT
        return Skipped("too_large", document.name, f"{len(document.ids)} ids") if too_large else None
    if not document.text:
        return Skipped("empty", document.name)
    if len(document.text) > LARGEST_DOCUMENT:
        return Skipped("too_large", document.name, f"{len(document.text)} bytes")
    try:
        document.text.decode()
    except UnicodeDecodeError as error:
        return Skipped("bad_utf8", document.name, f"{error.reason} at byte {error.start}")
    return None


def skipped_line(item: Skipped, path: str = "") -> bytes:
    """A line of the log of what was skipped."""
    return json.dumps({**dataclasses.asdict(item), "path": path}).encode() + b"\n"


def _skip(item: Skipped, counts: Counter[str], log: Any, path: str = "") -> None:
    counts[item.reason] += 1
    log.write(skipped_line(item, path))


def _tokenizer(job: Job) -> Tokenizer:
    return _load(str(job.work / TOKENIZER_FILE), job.tokenizer)


@functools.lru_cache(maxsize=1)
def _load(path: str, info: TokenizerInfo) -> Tokenizer:
    """The tokenizer, loaded once a process."""
    return ByteTokenizer() if info.kind == "bytes" else HuggingFaceTokenizer(Path(path).read_bytes(), info)

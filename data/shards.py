"""Shards: WebDataset tars of token blocks, each with a table of its documents.

A sample of the tar is a block of consecutive documents, so that a document of a few hundred tokens does not pay tar's
kilobyte and more a member. Its members are `<key>.tokens` (the documents' ids, little-endian, back to back, nothing in
between), `<key>.lengths` and `<key>.bytes` (a `<u4` a document: its tokens, and the bytes of text they stand for). The
table beside the tar repeats what the members say, so it can be rebuilt from the shard alone; and equal documents give
equal bytes, on any machine, at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..durable import sync
from ..errors import UserError
from .index import DOCUMENT, ShardInfo

# Tokens a block aims at; a longer document is a block alone. At 1 MiB tar's headers and padding cost 0.3%.
BLOCK_BYTES = 1 << 20
_TAR_BLOCK = 512


class ShardWriter:
    """Writes one shard, `<stem>.tar` and `<stem>.npy`; it is whole, and on the disk, once `close` has returned."""

    def __init__(self, stem: Path, key: str):
        from webdataset.writer import TarWriter  # takes a second to import; readers of the index do without

        self._stem = stem
        self._key = key
        self._sink = _Sink(Path(f"{stem}.tar"))
        self._tar = TarWriter(self._sink, user="longscan", group="longscan", mtime=0, encoder=False)  # type: ignore[arg-type]
        self._block: list[np.ndarray] = []
        self._text_bytes: list[int] = []
        self._block_bytes = 0
        self._tables: list[np.ndarray] = []
        self.token_bytes = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Appends a document: its ids in the corpus's dtype, and the size of its text."""
        if self._block and self._block_bytes + tokens.nbytes > BLOCK_BYTES:
            self._write_block()
        self._block.append(tokens)
        self._text_bytes.append(text_bytes)
        self._block_bytes += tokens.nbytes
        self.token_bytes += tokens.nbytes

    def close(self) -> ShardInfo:
        """Finishes both files and returns what the manifest says of them; paths are the bare file names."""
        if self._block:
            self._write_block()
        self._tar.close()
        self._sink.close()
        table = np.concatenate(self._tables) if self._tables else np.empty(0, DOCUMENT)
        index = _save_table(Path(f"{self._stem}.npy"), table)
        return ShardInfo(
            file=f"{self._stem.name}.tar",
            index=f"{self._stem.name}.npy",
            documents=len(table),
            tokens=int(table["tokens"].sum(dtype=np.uint64)),
            bytes=int(table["bytes"].sum(dtype=np.uint64)),
            size=self._sink.size,
            sha256=self._sink.hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abandon(self) -> None:
        """Closes the file of a shard that will not be finished."""
        self._sink.abandon()

    def _write_block(self) -> None:
        lengths = np.array([len(tokens) for tokens in self._block], "<u4")
        text_bytes = np.array(self._text_bytes, "<u4")
        tokens = b"".join(self._block)  # type: ignore[arg-type]
        # Members are written in the order of their names: bytes, lengths, tokens; each after a header of one tar block.
        begin = self._tar.tarstream.offset + 3 * _TAR_BLOCK + 2 * _padded(lengths.nbytes)
        self._tar.write(
            {
                "__key__": f"{self._key}-{len(self._tables):06d}",
                "bytes": text_bytes.tobytes(),
                "lengths": lengths.tobytes(),
                "tokens": tokens,
            }
        )
        assert self._tar.tarstream.offset == begin + _padded(len(tokens)), "webdataset laid the members out otherwise"
        self._tables.append(_table(begin, lengths, text_bytes, self._block[0].itemsize))
        self._block, self._text_bytes, self._block_bytes = [], [], 0


class SplitWriter:
    """Writes documents into as many shards as they need, `<folder>/<name>-0000` and so on."""

    def __init__(self, folder: Path, name: str, shard_bytes: int, key: str):
        self._folder, self._name, self._shard_bytes, self._key = folder, name, shard_bytes, key
        self._shard: ShardWriter | None = None
        self._done: list[ShardInfo] = []

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Appends a document, in a new shard where it would take the current one past `shard_bytes`."""
        if self._shard and self._shard.token_bytes + tokens.nbytes > self._shard_bytes:
            self._close_shard()
        if self._shard is None:
            number = f"{len(self._done):04d}"
            self._shard = ShardWriter(self._folder / f"{self._name}-{number}", f"{self._key}-{number}")
        self._shard.add(tokens, text_bytes)

    def close(self) -> list[ShardInfo]:
        """Finishes the last shard and returns them all; none where no document came."""
        self._close_shard()
        return self._done

    def abandon(self) -> None:
        """Closes what is open, leaving files that are not whole."""
        if self._shard:
            self._shard.abandon()

    def _close_shard(self) -> None:
        if self._shard:
            self._done.append(self._shard.close())
            self._shard = None


def rebuild_index(shard: Path) -> np.ndarray:
    """The DOCUMENT table of a shard, read from its tar alone: equal to the `.npy` beside it."""
    tables = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for text_bytes, lengths, tokens in _blocks(tar):
                counts = np.frombuffer(_read(tar, lengths), "<u4")
                itemsize = tokens.size // int(counts.sum(dtype=np.uint64))
                tables.append(
                    _table(tokens.offset_data, counts, np.frombuffer(_read(tar, text_bytes), "<u4"), itemsize)
                )
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard} is damaged ({error}); fetch it or prepare the corpus again.") from error
    return np.concatenate(tables) if tables else np.empty(0, DOCUMENT)


def read_documents(shard: Path, index: Path, dtype: str) -> Iterator[tuple[np.ndarray, int]]:
    """Each document of a local shard in its order: the ids, as a view of the mapped file, and its text's size."""
    data = np.memmap(shard, np.uint8, "r")
    little = np.dtype(dtype).newbyteorder("<")
    for offset, tokens, text_bytes in np.load(index).tolist():
        yield data[offset : offset + tokens * little.itemsize].view(little), text_bytes


class _Sink:
    """A file to write, with the size and checksum of what went into it."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")  # noqa: SIM115 - closed by close or abandon
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        if self.file.closed:  # tarfile writes the end of an abandoned tar when it is collected
            return len(data)
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def close(self) -> None:
        sync(self.file)
        self.file.close()


def _table(begin: int, lengths: np.ndarray, text_bytes: np.ndarray, itemsize: int) -> np.ndarray:
    """DOCUMENT rows of a block whose tokens begin at byte `begin` of the tar."""
    table = np.empty(len(lengths), DOCUMENT)
    sizes = lengths.astype(np.uint64) * np.uint64(itemsize)
    table["offset"] = np.uint64(begin) + np.cumsum(sizes) - sizes
    table["tokens"] = lengths
    table["bytes"] = text_bytes
    return table


def _save_table(path: Path, table: np.ndarray) -> bytes:
    """Writes the table as `np.save` does, and returns the file's bytes."""
    buffer = io.BytesIO()
    np.save(buffer, table)
    with open(path, "wb") as file:
        file.write(buffer.getvalue())
        sync(file)
    return buffer.getvalue()


def _blocks(tar: tarfile.TarFile) -> Iterator[list[tarfile.TarInfo]]:
    """The members (bytes, lengths, tokens) of each block."""
    members = iter(tar)
    for first in members:
        block = [first, *(next(members, None) for _ in range(2))]
        suffixes = [member.name.rpartition(".")[2] if member else "nothing" for member in block]
        if suffixes != ["bytes", "lengths", "tokens"]:
            raise ValueError(f"{first.name} begins a sample of {', '.join(suffixes)}")
        yield block  # type: ignore[misc]


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise EOFError(f"{member.name} ends after {len(data)} of {member.size} bytes")
    return data


def _padded(size: int) -> int:
    """The bytes a member of `size` bytes takes in a tar, its header not counted."""
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK

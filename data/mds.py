"""MosaicML's shards of samples (MDS), of which one column is read: text, or token ids.

A shard describes itself, all numbers little-endian u32: the number of samples N, the first bytes of the samples and
the last one's end [N+1], a JSON object with names, encodings and fixed sizes of the columns, then the samples. A
sample is the sizes of those of its columns that have no fixed one, then the columns. `index.json` lists the shards of
a folder with their sizes. A shard may be compressed with zstd; it is then read from its beginning as a stream.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

INDEX = "index.json"
SUFFIXES = (".mds", ".mds.zstd", ".mds.zst")
# What `longscan prepare` takes for ids where the field asked for by default is none of the columns.
ID_COLUMNS = ("input_ids", "tokens")

# The dtypes of ndarrays by the byte that says them in the sample, where the encoding does not.
_DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_NAMES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in _DTYPES.values()}
_INT64 = np.dtype("<i8")
_READ_BYTES = 16 << 20


class Shard(contextlib.AbstractContextManager):
    """One shard, opened; use it as a context manager.

    Args:
        path: a file with one of `SUFFIXES`.
        field: the column to read; where there is no column "text", that of `ID_COLUMNS` which is there.

    Attributes:
        offsets: where each sample begins, and the last one ends; int64 [samples + 1].
        dtype: of the ids; None for a column of text.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence that begins with the path.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, field: str):
        self.zipped = not path.lower().endswith(".mds")
        self._stream = _unzipped(path) if self.zipped else open(path, "rb")  # noqa: SIM115 - closed by __exit__
        try:
            self._read_header()
            self._choose(field)
            if not self.zipped and self.offsets[-1] != os.path.getsize(path):
                raise ValueError(f"is truncated: it holds {os.path.getsize(path)} of {self.offsets[-1]} bytes")
        except BaseException:
            self._stream.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.offsets) - 1

    def cut(self, size: int) -> Iterator[tuple[int, int, int]]:
        """Yields (first sample, end, bytes of the shard) of consecutive ranges of about `size` bytes; one if zipped."""
        begin = 0
        while begin < len(self):
            wanted = self.offsets[-1] if self.zipped else self.offsets[begin] + size
            end = min(max(int(np.searchsorted(self.offsets, wanted)), begin + 1), len(self))
            yield begin, end, int(self.offsets[end] - self.offsets[begin])
            begin = end

    def read(self, begin: int, end: int) -> Iterator[bytes | np.ndarray]:
        """Yields the column of samples [begin, end): UTF-8, or ids of any integer dtype. Only once, from one place."""
        if begin:
            self._stream.seek(int(self.offsets[begin]))
        for number in range(begin, end):
            sample = self._exactly(int(self.offsets[number + 1] - self.offsets[number]))
            value = self._value(sample, number)
            yield value if self.dtype is None else self._ids(value, number)

    def _read_header(self) -> None:
        (samples,) = np.frombuffer(self._exactly(4), "<u4").tolist()
        size = self._stream.seek(0, os.SEEK_END) if not self.zipped else None
        if size is not None and 4 * (samples + 2) > size:
            raise ValueError(f"is no whole MDS shard: {samples} samples do not fit into {size} bytes")
        if size is not None:
            self._stream.seek(4)
        self.offsets = np.frombuffer(self._exactly(4 * (samples + 1)), "<u4").astype(np.int64)
        about = int(self.offsets[0]) - 4 * (samples + 2)
        if about < 2 or (np.diff(self.offsets) < 0).any():
            raise ValueError("is no MDS shard: its offsets are out of order")
        try:
            columns = json.loads(self._exactly(about))
            described = (columns[f"column_{key}"] for key in ("names", "encodings", "sizes"))
            self._columns = [
                (str(name), str(encoding), None if size is None else int(size))
                for name, encoding, size in zip(*described, strict=True)
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"is no MDS shard: it does not describe its columns ({error})") from error

    def _choose(self, field: str) -> None:
        """Finds the column and how it is written."""
        names = [name for name, _, _ in self._columns]
        chosen = field if field in names or field != "text" else next((n for n in ID_COLUMNS if n in names), field)
        if chosen not in names:
            raise ValueError(f"has no column {field!r}; its columns are {', '.join(names)}; choose with --field")
        self._index = names.index(chosen)
        _, encoding, size = self._columns[self._index]
        self._kind, _, detail = encoding.partition(":")
        name, _, shape = detail.partition(":")
        self._named, self._shaped = name, bool(shape)
        if self._kind == "str" or (self._kind == "bytes" and chosen not in ID_COLUMNS):
            self.dtype = None
        elif self._kind == "bytes":  # what LLM Foundry writes: int64 ids, bare
            self.dtype = _INT64
        elif self._kind == "ndarray" and (not name or name in _NAMES):
            self.dtype = _NAMES.get(name, _INT64)
        elif size is None and self._kind in _NAMES:  # arrays of a scalar's name, as registered by their writers
            self.dtype = _NAMES[self._kind]
        else:
            raise ValueError(f"has {encoding} in column {chosen!r}, neither text nor ids; choose another with --field")

    def _value(self, sample: bytes, number: int) -> bytes:
        """The column's bytes of a sample."""
        free = sum(size is None for _, _, size in self._columns)
        given = iter(np.frombuffer(sample[: 4 * free], "<u4").tolist())
        sizes = [next(given, 0) if size is None else size for _, _, size in self._columns]
        if 4 * free + sum(sizes) != len(sample):
            raise ValueError(f"is damaged: sample {number} holds {len(sample)} bytes and not what its sizes say")
        begin = 4 * free + sum(sizes[: self._index])
        return sample[begin : begin + sizes[self._index]]

    def _ids(self, value: bytes, number: int) -> np.ndarray:
        """The ids that a column's bytes hold, in one row."""
        dtype, begin = self.dtype, 0
        if self._kind == "ndarray" and not self._named:
            dtype, begin = np.dtype(_DTYPES.get(value[0] if value else 0, "V1")), 1
        if self._kind == "ndarray" and not self._shaped:
            # A byte of 4 x dims + log2 of the bytes of each dim, then the dims.
            shape = value[begin] if begin < len(value) else 0
            begin += 1 + ((shape >> 2) << (shape & 3))
        if dtype is None or dtype.kind not in "iu" or begin > len(value) or (len(value) - begin) % dtype.itemsize:
            raise ValueError(f"is damaged: {len(value)} bytes of sample {number} are no array of ids")
        return np.frombuffer(value, dtype, offset=begin) if begin < len(value) else np.empty(0, dtype)

    def _exactly(self, size: int) -> bytes:
        """The next `size` bytes; ValueError where the shard ends before them."""
        parts, left = [], size
        while left and (part := self._stream.read(min(left, _READ_BYTES))):
            parts.append(part)
            left -= len(part)
        if left:
            raise ValueError(f"is truncated or no MDS shard: it ends {left} bytes too early")
        return b"".join(parts)


def shards(folder: str | Path) -> list[str] | None:
    """The shards that a folder's index.json lists, relative to it, unpacked ones where they are there; None without.

    Raises ValueError where a shard is missing or of another size than listed.
    """
    try:
        index = json.loads(Path(folder, INDEX).read_bytes())
        entries = index["shards"]
        if not all(entry["format"] == "mds" for entry in entries):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [_shard_file(Path(folder), entry) for entry in entries]


def _shard_file(folder: Path, entry: dict[str, Any]) -> str:
    listed = [entry[key] for key in ("raw_data", "zip_data") if entry.get(key)]
    for data in listed:
        path = folder / data["basename"]
        if path.exists():
            if path.stat().st_size != data["bytes"]:
                raise ValueError(
                    f"lists {data['basename']} of {data['bytes']} bytes, which holds {path.stat().st_size}"
                )
            return data["basename"]
    raise ValueError(f"lists {listed[-1]['basename'] if listed else 'a shard without a file'}, which is not there")


def _unzipped(path: str) -> IO[bytes]:
    """A zstd file as a stream of what it holds."""
    try:
        import zstandard  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError("is compressed with zstd and zstandard is not installed: pip install zstandard") from error
    return _Stream(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), closefd=True), zstandard.ZstdError)  # type: ignore[return-value]


class _Stream:
    """A stream whose damage is a ValueError."""

    def __init__(self, stream: Any, damage: type[Exception]):
        self._stream, self._damage, self.close = stream, damage, stream.close

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except self._damage as error:
            raise ValueError(f"is damaged: {error}") from error

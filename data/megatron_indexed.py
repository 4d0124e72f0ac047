"""Megatron's indexed token files: `NAME.bin` holds ids back to back, `NAME.idx` says where sequences begin.

A document is one sequence or several (sentences) in a row. Both layouts of the index that Megatron-LM and its
descendants have written are read, all numbers little-endian:

    MMIDIDX\\0\\0, u64 version 1, u8 dtype, u64 S, u64 D+1; i32 lengths [S], i64 first bytes [S], i64 documents [D+1],
        where documents are numbers of sequences; multimodal files end with an i8 mode a sequence
    TNTIDX\\0\\0, u64 version 1, u64 dtype, u64 item size, u64 S, u64 dims, u64 D+1; i64 dim offsets [S+1], i64 first
        items [S+1], i64 lengths [dims], i64 documents [D+1]

The files are mapped, so an index of any size costs no memory.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

_MAPPED, _MAPPED_HEADER = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
_LISTED, _LISTED_HEADER = b"TNTIDX\0\0", struct.Struct("<8sQQQQQQ")
# 6 and 7 are floating point, which no ids are.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class IndexedTokens:
    """The documents of one pair of files.

    Args:
        path: the `.idx`; the `.bin` lies beside it.

    Raises:
        ValueError: what is wrong with the files, as the end of a sentence that begins with the path.
        OSError: they cannot be read.
    """

    def __init__(self, path: str):
        self._path = path
        self._data_path = data_file(path)
        with open(path, "rb") as file:
            header = file.read(_LISTED_HEADER.size)
        if header.startswith(_MAPPED):
            self._open_mapped(header)
        elif header.startswith(_LISTED):
            self._open_listed(header)
        else:
            raise ValueError("is no Megatron index: it begins with neither MMIDIDX nor TNTIDX")
        self._check()

    def __len__(self) -> int:
        """The number of documents."""
        return max(len(self._boundaries) - 1, 0)

    def cut(self, tokens: int) -> Iterator[tuple[int, int, int]]:
        """Yields (first document, end, tokens in them) of consecutive ranges of about `tokens` each."""
        begin = 0
        while begin < len(self):
            first = self._first(self._boundaries[begin])
            sequence = bisect_left(range(self._sequences), first + tokens, key=self._first)
            end = min(max(bisect_left(self._boundaries, sequence), begin + 1), len(self))
            yield begin, end, self._first(self._boundaries[end]) - first
            begin = end

    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Yields the ids of documents [begin, end), views of the mapped file; ValueError where the index is damaged."""
        boundaries = np.array(self._boundaries[begin : end + 1])
        if (np.diff(boundaries) < 0).any() or boundaries[0] < 0 or boundaries[-1] > self._sequences:
            raise ValueError(f"is damaged: the sequences of documents {begin} to {end - 1} are out of order")
        firsts = [self._first(sequence) for sequence in boundaries]
        lengths = np.array(self._lengths[boundaries[0] : boundaries[-1]], np.int64)
        if (np.diff(firsts) < 0).any() or firsts[-1] - firsts[0] != lengths.sum() or firsts[-1] > self._items:
            raise ValueError(f"is damaged: lengths and offsets of documents {begin} to {end - 1} disagree")
        data = np.memmap(self._data_path, self._dtype, "r") if self._items else np.empty(0, self._dtype)
        yield from (data[a:b] for a, b in zip(firsts, firsts[1:], strict=False))

    def _open_mapped(self, header: bytes) -> None:
        begin = _MAPPED_HEADER.size
        self._check_header(header, begin)
        _, version, code, self._sequences, boundaries = _MAPPED_HEADER.unpack(header[:begin])
        self._dtype = _dtype(version, code)
        self._lengths = self._map("<i4", begin, self._sequences)
        self._begins = self._map("<i8", begin + 4 * self._sequences, self._sequences)
        end = begin + 12 * self._sequences
        self._boundaries = self._map("<i8", end, boundaries)
        self._unit = self._dtype.itemsize
        self._check_size({end + 8 * boundaries, end + 8 * boundaries + self._sequences})

    def _open_listed(self, header: bytes) -> None:
        begin = _LISTED_HEADER.size
        self._check_header(header, begin)
        _, version, code, size, self._sequences, dims, boundaries = _LISTED_HEADER.unpack(header)
        self._dtype = _dtype(version, code)
        if dims != self._sequences or size != self._dtype.itemsize:
            raise ValueError(f"holds {dims} dims of {self._sequences} sequences, {size} bytes each: no rows of ids")
        offsets = 8 * (self._sequences + 1)
        self._begins = self._map("<i8", begin + offsets, self._sequences + 1)
        self._lengths = self._map("<i8", begin + 2 * offsets, dims)
        self._boundaries = self._map("<i8", begin + 2 * offsets + 8 * dims, boundaries)
        self._unit = 1
        self._check_size({begin + 2 * offsets + 8 * (dims + boundaries)})

    def _check_header(self, header: bytes, size: int) -> None:
        if len(header) < size:
            raise ValueError(f"is truncated: it holds {len(header)} of the header's {size} bytes")

    def _map(self, dtype: str, begin: int, count: int) -> np.ndarray:
        """`count` numbers from byte `begin`; ValueError where the file ends before them."""
        size = os.path.getsize(self._path)
        if begin + np.dtype(dtype).itemsize * count > size:
            raise ValueError(f"is truncated: it ends after {size} bytes")
        return np.memmap(self._path, dtype, "r", begin, (count,)) if count else np.empty(0, dtype)

    def _check_size(self, sizes: set[int]) -> None:
        size = os.path.getsize(self._path)
        if size not in sizes:
            raise ValueError(f"is damaged: it holds {size} bytes, and what it counts takes {min(sizes)}")

    def _check(self) -> None:
        """Holds the index against the size of the data and its documents against its sequences."""
        if not os.path.isfile(self._data_path):
            raise ValueError(f"has no {self._data_path} beside it")
        size = os.path.getsize(self._data_path)
        self._items = size // self._dtype.itemsize
        last = self._sequences - 1
        needed = (self._first(last) + int(self._lengths[last])) * self._dtype.itemsize if last >= 0 else 0
        if size != needed:
            raise ValueError(f"describes {needed} bytes and {self._data_path} holds {size}")
        bounds = [int(self._boundaries[i]) for i in (0, -1)] if len(self._boundaries) else [0, 0]
        if bounds != [0, self._sequences]:
            raise ValueError(f"has documents from sequence {bounds[0]} to {bounds[1]} of {self._sequences}")

    def _first(self, sequence: int) -> int:
        """Where a sequence begins, in ids; where the last one ends for the number of all."""
        return int(self._begins[sequence]) // self._unit if sequence < self._sequences else self._items


def data_file(index: str) -> str:
    """The `.bin` that belongs to an `.idx`."""
    return f"{os.path.splitext(index)[0]}.bin"


def index_file(path: str) -> str | None:
    """The `.idx` that `path` means: itself, its `.bin`, or both without their suffix; None where there is none."""
    stem, suffix = os.path.splitext(path)
    candidates = {".idx": path, ".bin": f"{stem}.idx"}
    index = candidates.get(suffix, path if os.path.exists(path) else f"{path}.idx")
    return index if index.endswith(".idx") and _is_index(index) else None


def _is_index(path: str) -> bool:
    """Whether the file is a Megatron index, or one that lies beside a `.bin` and should be."""
    try:
        with open(path, "rb") as file:
            return file.read(9).startswith((_MAPPED, _LISTED)) or os.path.exists(data_file(path))
    except OSError:
        return False


def _dtype(version: int, code: int) -> np.dtype:
    if version != 1:
        raise ValueError(f"is of version {version}, and only version 1 is known")
    if code not in _DTYPES:
        raise ValueError(f"holds numbers of dtype code {code}, which are no token ids")
    return np.dtype(_DTYPES[code])

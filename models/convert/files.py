"""Tensors in safetensors files, read and written one at a time.

Nothing here is unpickled. Files are mapped for reading, so that memory holds the tensor in hand alone.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...durable import sync
from ...errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
WRITE_BYTES = 2**24


@dataclass(frozen=True)
class Entry:
    """A tensor of a file; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Written:
    """A file as it was written: size, crc32, and where in it each tensor begins."""

    bytes: int
    checksum: int
    begins: tuple[int, ...]


class Weights:
    """The tensors of a folder: of model.safetensors, or of the files that model.safetensors.index.json names.

    Opening reads the headers alone. UserError where a file is missing, truncated, or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self._files: dict[str, Any] = {}
        index = _read_index(folder)
        for file in sorted(set(index.values())) if index else [SINGLE]:
            handle = _open(folder / file)
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                part = handle.get_slice(name)
                self.entries[name] = Entry(name, part.get_dtype(), tuple(part.get_shape()))
                self._files[name] = handle
        for name, file in index.items():
            if name not in self.entries:
                raise UserError(f"{folder / file} holds no {name}, which {INDEX} says it does; fetch the model again")

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self._files[name].get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; UserError where there is none."""
    try:
        mapping = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{path} holds no mapping; fetch it again")
    return mapping


def write_file(
    path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> Written:
    """Writes one file durably, each tensor as it comes, in the order of `entries`, and returns what it is."""
    header, begins = _header(entries, metadata)
    checksum, size = zlib.crc32(header), len(header)
    with open(path, "xb") as file:
        file.write(header)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[entry.dtype], entry.shape), entry.name
            for block in _blocks(tensor):
                file.write(block)
                checksum, size = zlib.crc32(block, checksum), size + len(block)
        sync(file)
    return Written(size, checksum, begins)


def shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """The entries in order, in files of at most `limit` bytes of tensors, a larger tensor by itself."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.bytes > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.bytes
    return files


def write_model(folder: Path, entries: Iterable[Entry], tensors: Iterator[Tensor], limit: int) -> list[str]:
    """Writes tensors under the names that transformers reads, and their index where they fill several files.

    The order of `entries` is kept; transformers' is that of their names.
    """
    files = shards(entries, limit)
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, held in zip(names, files, strict=True):
        write_file(folder / name, held, (next(tensors) for _ in held), {"format": "pt"})
    if len(files) > 1:
        total = sum(entry.bytes for held in files for entry in held)
        places = {entry.name: name for name, held in zip(names, files, strict=True) for entry in held}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return names


def write_json(path: Path, mapping: dict[str, Any]) -> None:
    """Writes a JSON file durably, laid out as transformers does."""
    write_text(path, json.dumps(mapping, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file durably."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        sync(file)


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor; empty where the model is one file."""
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{folder / INDEX} has no weight_map; fetch it again")
        return places
    if not (folder / SINGLE).exists():
        found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {found[0]} is a pickle, which is never read: save it as safetensors" if found else ""
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    return {}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = f"{os.path.getsize(path)} bytes" if path.exists() else "missing"
        raise UserError(f"{path} ({size}) cannot be read: {error}; fetch it again") from error


def _header(entries: Sequence[Entry], metadata: dict[str, str] | None) -> tuple[bytes, tuple[int, ...]]:
    """The header, padded to 8 bytes, and where in the file each tensor begins."""
    listed: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begins, end = [], 0
    for entry in entries:
        begins.append(end)
        end += entry.bytes
        listed[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begins[-1], end]}
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, tuple(8 + len(text) + begin for begin in begins)


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes, at most 16 MiB at a time, without a copy."""
    view = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(view), WRITE_BYTES):
        yield view[begin : begin + WRITE_BYTES]

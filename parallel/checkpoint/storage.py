"""Where PyTorch's distributed checkpoint puts and finds bytes: one safetensors file a rank and the manifest.

Its own writer keeps its metadata as a pickle; here nothing on disk is one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from .boxes import Box
from .folder import publish, unfinished_folder
from .manifest import DTYPES, Chunk, DataFile, Manifest, write_manifest
from .pieces import Pieces

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITE_BYTES = 2**24
# One process without a group is a use we mean. Saves run in a thread, so the filter cannot be set around the call.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class FolderWriter(StorageWriter):
    """Writes one safetensors file a rank into a folder under a temporary name, then the manifest, then renames."""

    def __init__(self, folder: Path, step: int, updates: int, pieces: dict[str, Pieces], meta: dict[str, Any]):
        self._folder = folder
        self._step = step
        self._updates = updates
        self._pieces = pieces
        self._meta = meta
        self._unfinished: Path | None = None
        self.is_coordinator = False

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget: a writer saves one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """The folder is given at construction, so there is no other id."""
        return checkpoint_id is None

    def storage_meta(self) -> StorageMeta | None:
        """Nothing for the planner to keep."""
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Notes whether this rank makes the folder and the manifest."""
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the unfinished folder and tells every rank its file in it."""
        self._unfinished = unfinished_folder(self._folder, self._step)
        self._unfinished.mkdir(parents=True)
        return [
            replace(plan, storage_data=str(self._unfinished / f"rank-{rank:05d}.safetensors"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Writes this rank's file; each result carries the box's place and the file's size and checksum."""
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(_write_file(Path(plan.storage_data), plan.items, planner) if plan.items else [])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after every rank has written: the manifest, then the rename."""
        assert self._unfinished is not None
        manifest = Manifest(
            self._step,
            self._updates,
            {name: (piece.shape, _DTYPE_NAMES[piece.dtype]) for name, piece in self._pieces.items()},
            tuple(_data_file(file) for file in results if file),
            self._meta,
        )
        manifest.check_cover()
        for file in manifest.files:
            found = (self._unfinished / file.name).stat().st_size
            if found != file.bytes:
                raise OSError(0, f"{file.name} has {found} bytes here, its rank wrote {file.bytes}")
        write_manifest(manifest, self._unfinished)
        publish(self._unfinished, self._folder, self._step)

    def clean_up(self) -> None:
        """Removes what a failed save left; after every rank has reported, so nobody still writes there."""
        if self._unfinished is not None:
            shutil.rmtree(self._unfinished, ignore_errors=True)


def _data_file(results: list[WriteResult]) -> DataFile:
    """The manifest's entry for the file that one rank's results describe."""
    name, size, checksum, _ = results[0].storage_data
    return DataFile(name, size, checksum, tuple(result.storage_data[3] for result in results))


def _write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Writes the boxes as a safetensors file and makes it durable."""
    tensors = [cast(Tensor, planner.resolve_data(item)) for item in items]
    boxes = (Box(tuple(i.index.offset or ()), tuple(t.shape)) for i, t in zip(items, tensors, strict=True))
    places = [(item.index.fqn, box) for item, box in zip(items, boxes, strict=True)]
    header, begins = _header(places, tensors)
    checksum, size = 0, 0
    with open(path, "xb", buffering=0) as file:
        for block in _blocks(header, tensors):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
            while block:
                block = block[file.write(block) :]
        os.fsync(file.fileno())
    chunks = [Chunk(name, box, begin) for (name, box), begin in zip(places, begins, strict=True)]
    return [
        WriteResult(item.index, tensor.nbytes, (path.name, size, checksum, chunk))
        for item, tensor, chunk in zip(items, tensors, chunks, strict=True)
    ]


def _header(places: list[tuple[str, Box]], tensors: list[Tensor]) -> tuple[bytes, list[int]]:
    """The safetensors header, padded to 8 bytes, and where in the file each tensor begins."""
    entries, end = {}, 0
    for (name, box), tensor in zip(places, tensors, strict=True):
        entries[f"{name}[{','.join(map(str, box.offsets))}]"] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    begins = [8 + len(text) + entry["data_offsets"][0] for entry in entries.values()]
    return struct.pack("<Q", len(text)) + text, begins


def _blocks(header: bytes, tensors: list[Tensor]) -> Iterable[memoryview]:
    """The file's bytes, at most 16 MiB at a time, without a copy."""
    yield memoryview(header)
    for tensor in tensors:
        view = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(view), _WRITE_BYTES):
            yield view[begin : begin + _WRITE_BYTES]


class FolderReader(StorageReader):
    """Answers PyTorch's load plans from a checkpoint folder."""

    def __init__(self, path: Path, manifest: Manifest):
        self._manifest = manifest
        self._files = MappedFiles(path)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget: a reader loads one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """The folder is given at construction, so there is no other id."""
        return checkpoint_id is None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the manifest's tensors and chunk table as PyTorch's metadata."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in self._manifest.tensors}
        places: dict[MetadataIndex, tuple[DataFile, Chunk]] = {}
        for file in self._manifest.files:
            for chunk in file.chunks:
                offsets, sizes = torch.Size(chunk.box.offsets), torch.Size(chunk.box.sizes)
                chunks[chunk.tensor].append(ChunkStorageMetadata(offsets, sizes))
                places[MetadataIndex(chunk.tensor, offsets)] = (file, chunk)
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype]), torch.Size(shape), chunks[name])
            for name, (shape, dtype) in self._manifest.tensors.items()
        }
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keeps the chunk table."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Copies each planned part from its file to this rank's memory."""
        for item in plan.items:
            file, chunk = self._places[item.storage_index]
            dtype = DTYPES[self._manifest.tensors[chunk.tensor][1]]
            stored = narrow(self._files.tensor(file, chunk, dtype), item.storage_offsets, item.lengths)
            planner.resolve_tensor(item).copy_(stored)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done


class MappedFiles:
    """The data files of a checkpoint, memory-mapped when first needed."""

    def __init__(self, path: Path):
        self._path = path
        self._bytes: dict[str, Tensor] = {}

    def tensor(self, file: DataFile, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """Returns the chunk's elements in its box's shape, backed by the file."""
        if file.name not in self._bytes:
            # Copy-on-write, since torch has no read-only tensors; nothing ever writes to it.
            self._bytes[file.name] = torch.from_numpy(np.memmap(self._path / file.name, np.uint8, mode="c"))
        count = math.prod(chunk.box.sizes) * dtype.itemsize
        return self._bytes[file.name].narrow(0, chunk.begin, count).view(dtype).view(chunk.box.sizes)


def narrow(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Returns the box of `tensor` as a view."""
    return tensor[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]

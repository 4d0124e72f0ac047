"""Loading: into an engine of any layout, or the weights alone into a model.

PyTorch's distributed checkpoint plans which stored boxes meet which boxes of this rank; bytes come from memory-mapped
files, so a rank reads only the pages it needs and memory stays bounded by one tensor.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader

from ...errors import UserError
from ..engine import Engine
from ..zero import WEIGHT
from .manifest import DTYPES, Chunk, DataFile, Manifest, read_manifest
from .pieces import pieces_of


def load(path: Path | str, engine: Engine, group: dist.ProcessGroup | None = None) -> Manifest:
    """Sets weights, moments and update count of `engine` to the checkpoint's, bit for bit; returns the manifest.

    Collective. The checkpoint may have been saved by any number of ranks and any ZeRO stage. It is not verified here.

    Args:
        path: the step-N folder.
        engine: the engine to fill.
        group: a gloo group of all ranks that nothing else is using.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_fit(path, manifest, engine.shapes)
    pieces: dict[str, Any] = dict(pieces_of(engine.logical_shapes(), engine.fragments()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(  # pyright: ignore[reportPrivateImportUsage]
                pieces,
                storage_reader=FolderReader(path, manifest),
                planner=PiecesLoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise UserError(f"checkpoint {path} cannot be read: rank {rank} failed with {cause!r}") from error
    engine.steps = manifest.updates
    engine.publish()
    return manifest


def load_weights(path: Path | str, model: nn.Module) -> Manifest:
    """Fills the parameters of `model` with the checkpoint's fp32 weights in their own dtype; returns the manifest.

    One process, no process group, no optimizer; one tensor at a time.
    """
    path = Path(path)
    manifest = read_manifest(path)
    parameters = dict(model.named_parameters())
    check_fit(path, manifest, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    files = MappedFiles(path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_whole(manifest, files, f"{WEIGHT}/{name}"))
    return manifest


def _whole(manifest: Manifest, files: MappedFiles, name: str) -> Tensor:
    shape, dtype = manifest.tensors[name]
    whole = torch.empty(shape, dtype=DTYPES[dtype])
    for file, chunk in manifest.chunks(name):
        _narrow(whole, chunk.box.offsets, chunk.box.sizes).copy_(files.tensor(file, chunk, DTYPES[dtype]))
    return whole


def check_fit(path: Path, manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the checkpoint holds exactly the weights `shapes`, naming the first that differs."""
    kinds = ((name.partition("/"), shape) for name, (shape, _) in manifest.tensors.items())
    stored = {name: shape for (kind, _, name), shape in kinds if kind == WEIGHT}
    remedy = "use the model configuration it was saved with"
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(f"checkpoint {path} is of another model: it has no {name} {list(shape)}; {remedy}")
        if stored[name] != shape:
            found = list(stored[name])
            raise UserError(
                f"checkpoint {path} is of another model: {name} is {found} there and {list(shape)} here; {remedy}"
            )
    for name in stored.keys() - shapes.keys():
        raise UserError(f"checkpoint {path} is of another model: its {name} is not in this one; {remedy}")


class PiecesLoadPlanner(DefaultLoadPlanner):
    """PyTorch's load planner over a flat dictionary of Pieces."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Takes the dictionary as it is."""
        self.state_dict = state_dict
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Returns the box that `index` names, as live memory."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


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
            stored = _narrow(self._files.tensor(file, chunk, dtype), item.storage_offsets, item.lengths)
            planner.resolve_tensor(item).copy_(stored)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done


def _narrow(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]

"""Loading: into an engine of any layout, or the weights alone into a model.

PyTorch's distributed checkpoint plans which stored boxes meet which boxes of this rank; bytes come from memory-mapped
files, so a rank reads only the pages it needs and memory stays bounded by one tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)

from ...errors import UserError
from ..engine import Engine
from ..optimizer import WEIGHT
from .manifest import DTYPES, Manifest, read_manifest
from .pieces import pieces_of
from .storage import FolderReader, MappedFiles, narrow

if TYPE_CHECKING:
    from ...models import LanguageModel


def load(path: Path | str, engine: Engine, group: dist.ProcessGroup | None = None) -> Manifest:
    """Sets weights, moments and update count of `engine` to the checkpoint's, bit for bit; returns the manifest.

    Collective. The checkpoint may have been saved by any layout of ranks. It is not verified here.

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


def load_weights(path: Path | str, model: LanguageModel, may_lack: Collection[str] = ()) -> Manifest:
    """Fills the parameters of `model` with the checkpoint's fp32 weights in their own dtype; returns the manifest.

    Not collective, no optimizer; one tensor at a time, of which the model may hold a box.

    Args:
        path: the step-N folder.
        model: what to fill.
        may_lack: names of parameters that are left as they are where the checkpoint has none of that name.
    """
    path = Path(path)
    manifest = read_manifest(path)
    lacking = {name for name in may_lack if f"{WEIGHT}/{name}" not in manifest.tensors}
    named = ((name, p) for name, p in model.named_parameters() if name not in lacking)
    places = {name: (p, model.backend.logical(name, p)) for name, p in named}
    check_fit(path, manifest, {name: s for name, s in model.logical_shapes().items() if name not in lacking})
    files = MappedFiles(path)
    with torch.no_grad():
        for name, (parameter, place) in places.items():
            whole = _whole(manifest, files, f"{WEIGHT}/{name}")
            parameter.copy_(narrow(whole, place.offsets, tuple(parameter.shape)))
    return manifest


def _whole(manifest: Manifest, files: MappedFiles, name: str) -> Tensor:
    shape, dtype = manifest.tensors[name]
    whole = torch.empty(shape, dtype=DTYPES[dtype])
    for file, chunk in manifest.chunks(name):
        narrow(whole, chunk.box.offsets, chunk.box.sizes).copy_(files.tensor(file, chunk, DTYPES[dtype]))
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

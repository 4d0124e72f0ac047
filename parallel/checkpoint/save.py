"""Saving: the state is copied to host memory while training waits, and written while it goes on.

PyTorch's distributed checkpoint plans which rank writes which box and carries a failure on one rank to all; the files
are ours. Its ranks exchange plans as pickled objects over their own gloo group, in memory; nothing on disk is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ...errors import UserError
from ..engine import Engine
from ..zero import Fragment
from .boxes import Box
from .folder import find_latest, prune, publish, step_folder, unfinished_folder
from .load import load
from .manifest import DTYPES, Chunk, DataFile, Manifest, plain_json, write_manifest
from .pieces import Pieces, pieces_of

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITE_BYTES = 2**24


class Checkpointer:
    """Saves an engine's state into a folder, one save at a time, in the background.

    Making one is collective. `save` returns once the state is copied; the copy costs one more set of masters and
    moments in host memory. A save that failed is told by the next `save`, `wait` or `close`, on every rank.
    """

    def __init__(self, folder: Path | str, engine: Engine, keep_last: int = 0, keep_every: int = 0):
        self.folder = Path(folder)
        self._engine = engine
        self._keep = (keep_last, keep_every)
        # Never the training group: gloo aborts the process when two threads use one group.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._host: dict[tuple[str, int], Tensor] = {}

    def save(self, step: int, meta: dict[str, Any]) -> None:
        """Begins to save the state as `step`, with the caller's JSON; waits for the save before it, if any.

        Collective: every rank calls it after the same update, and `meta` of rank 0 is what is kept.
        """
        self.wait()
        meta = plain_json(meta)
        pieces = pieces_of(self._engine.logical_shapes(), self._copy_to_host(self._engine.fragments()))
        self._pending = self._thread.submit(self._write, step, self._engine.steps, pieces, meta)

    def wait(self) -> Path | None:
        """Returns the checkpoint that was being saved, once it is in place, or None; UserError where it failed."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    @property
    def saving(self) -> bool:
        """Whether a save is still being written."""
        return self._pending is not None and not self._pending.done()

    def find_latest(self) -> tuple[Path | None, list[str]]:
        """Returns the newest checkpoint that verifies, and warnings, as rank 0 sees them; collective."""
        found: list[Any] = [None]
        if self._group is None or dist.get_rank() == 0:
            path, warned = find_latest(self.folder)
            found = [(str(path) if path else None, warned)]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        path, warned = found[0]
        return Path(path) if path else None, warned

    def load(self, path: Path | str) -> Manifest:
        """Sets the engine's state to that of the checkpoint at `path` and returns its manifest; collective."""
        self.wait()
        return load(path, self._engine, self._group)

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _copy_to_host(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments in host memory of this checkpointer's own, pinned where they come from a GPU."""
        copies = []
        for fragment in fragments:
            key = (fragment.name, fragment.start)
            if key not in self._host:
                self._host[key] = torch.empty(
                    fragment.data.shape, dtype=fragment.data.dtype, pin_memory=fragment.data.is_cuda
                )
            self._host[key].copy_(fragment.data, non_blocking=True)
            copies.append(replace(fragment, data=self._host[key]))
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        return copies

    def _write(self, step: int, updates: int, pieces: dict[str, Pieces], meta: dict[str, Any]) -> Path:
        writer = FolderWriter(self.folder, step, updates, pieces, meta)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save(  # pyright: ignore[reportPrivateImportUsage]
                    dict(pieces),
                    storage_writer=writer,
                    planner=PiecesSavePlanner(),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException as error:
            raise UserError(_explain(step, self.folder, error)) from error
        except (RuntimeError, OSError) as error:
            raise UserError(f"checkpoint of step {step} was not saved: {error}; older ones are intact") from error
        finally:
            writer.clean_up()
        path = step_folder(self.folder, step)
        if writer.is_coordinator:
            # Removing is no part of saving: what cannot go now is tried again after the next save.
            with contextlib.suppress(OSError):
                prune(self.folder, *self._keep, newest_valid=path)
        return path


def _explain(step: int, folder: Path, error: CheckpointException) -> str:
    """One sentence from the failures of all ranks."""
    rank, (cause, _) = min(error.failures.items())
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else f"{type(cause).__name__}: {cause}"
    return (
        f"checkpoint of step {step} was not saved in {folder}: rank {rank} failed with {reason!r}; "
        "older checkpoints are intact, make room or mend the disk and start the run again to resume"
    )


class PiecesSavePlanner(DefaultSavePlanner):
    """PyTorch's save planner over a flat dictionary of Pieces; boxes held by several ranks are written by one."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Returns the box that `index` names."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


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

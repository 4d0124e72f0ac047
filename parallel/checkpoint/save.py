"""Saving: the state is copied to host memory while training waits, and written while it goes on.

PyTorch's distributed checkpoint plans which rank writes which box and carries a failure on one rank to all; the files
are ours. Its ranks exchange plans as pickled objects over their own gloo group, in memory; nothing on disk is a pickle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from ...errors import UserError
from ..engine import Engine
from ..optimizer import Fragment
from .folder import find_latest, list_steps, prune, step_folder
from .load import load
from .manifest import Manifest, plain_json, verify
from .pieces import Pieces, pieces_of
from .storage import FolderWriter


class Checkpointer:
    """Saves an engine's state into a folder, one save at a time, in the background.

    Making one is collective. `save` returns once the state is copied; the copy costs one more set of masters and
    moments in host memory. A save that failed is told by the next `save`, `wait` or `close`, on every rank.
    """

    def __init__(self, folder: Path | str, engine: Engine | None, keep_last: int = 0, keep_every: int = 0):
        self.folder = Path(folder)
        self._engine: Any = engine
        self._keep = (keep_last, keep_every)
        # Never the training group: gloo aborts the process when two threads use one group.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._host: dict[tuple[str, int], Tensor] = {}

    def serve(self, engine: Engine | None) -> None:
        """Saves and loads the state of `engine` from now on; lets go of the one before, whose save it waits for."""
        self.wait()
        self._engine = engine
        self._host.clear()

    def save(self, step: int, meta: dict[str, Any]) -> None:
        """Begins to save the state as `step`, with the caller's JSON; waits for the save before it, if any.

        Collective: every rank calls it after the same update, and `meta` of rank 0 is what is kept.
        """
        self.wait()
        meta = plain_json(meta)
        pieces = pieces_of(self._engine.logical_shapes(), self._copy_to_host(self._engine.fragments(copies=False)))
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
        """Returns the newest checkpoint that verifies, and warnings, on every rank the same; collective.

        The ranks share the reading, and what one of them finds damaged all pass over.
        """
        if self._group is None:
            return find_latest(self.folder)
        steps = [list_steps(self.folder)]
        dist.broadcast_object_list(steps, src=0, group=self._group)
        return find_latest(self.folder, steps[0], self._verify_together)

    def _verify_together(self, path: Path) -> None:
        """Raises UserError on every rank where one of them does."""
        problem, problems = None, [None] * dist.get_world_size(self._group)
        try:
            verify(path, rank=dist.get_rank(self._group), ranks=len(problems))
        except UserError as error:
            problem = str(error)
        dist.all_gather_object(problems, problem, group=self._group)
        if found := next(filter(None, problems), None):
            raise UserError(found)

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

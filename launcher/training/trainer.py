"""The loop: rows in, updates out, until the last step or a request to stop.

One trainer for every way of running: alone in a process for a debugger, or as one rank of many. It is told where it
stands (`Place`), reports what it does, and starts nothing. What a step trains is decided by the schedule and the data
plan; a run that was interrupted goes on with the same rows, bits and lines as one that was not.
"""

from __future__ import annotations

import os
import platform
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...data import Batch, Corpus, Cursor, DataPlan, HeldoutRows, RowLoader, ShardCache
from ...errors import ConfigError, UserError
from ...models import LanguageModel, flops_per_token
from ...parallel import Engine, OptimizerOptions, ParallelDims, checkpoint, process_group
from ..config import Config, differences, load
from ..run_folder import RunFolder
from ..validate import open_corpora
from .data_plan import make_plan
from .guard import LossGuard
from .metrics import Meter, MetricsWriter, bits_per_byte
from .schedule import Step, TrainingSchedule

Report = Callable[[dict[str, Any]], None]

# Micro-batches read ahead of the one that trains.
PREFETCH = 4


@dataclass(frozen=True)
class Place:
    """Where a trainer stands: its rank of `world`, the incarnation of the group, and rank 0's "host:port"."""

    rank: int
    world: int
    incarnation: int
    address: str


class Trainer:
    """Trains one rank of a run.

    Args:
        config: resolved and validated, vocabulary filled in.
        folder: the run folder, on a disk that every rank sees.
        place: which rank this is.
        report: called with what a person may want to see; only rank 0 reports.
        stop_requested: once set on any rank, every rank saves and leaves after the step in progress.
    """

    def __init__(self, config: Config, folder: str, place: Place, report: Report, stop_requested: threading.Event):
        self.config = config
        self.folder = RunFolder.open(Path(folder))
        self.place = place
        self.stop_requested = stop_requested
        self._report = report
        self.schedule = TrainingSchedule(config)
        self.guard = LossGuard(config.run.max_loss_ratio)
        self.device = choose_device(config.run.device)
        self.done = 0

    def run(self, init_from: str | None = None, stop_at: int | None = None) -> str:
        """Trains to the end, or to step `stop_at`; returns "finished" or "stopped"."""
        seed_process(self.config, self.place)
        with process_group(
            rank=self.place.rank,
            world_size=self.place.world,
            address=self.place.address or None,
            device=self.device,
            timeout_seconds=self.config.run.timeout_seconds,
        ):
            self._build()
            try:
                self._restore(init_from)
                return self._loop(min(stop_at or self.schedule.total_steps, self.schedule.total_steps))
            finally:
                self._close()

    def _build(self) -> None:
        """Makes the model, its engine, the rows and the writers."""
        config, world = self.config, self.place.world
        corpora = open_corpora(config)
        self.corpora: list[Corpus] = corpora
        self.plan: DataPlan = make_plan(config, corpora, self.schedule)
        cache = ShardCache(config.data.cache or None, int(config.data.cache_gib * 2**30))
        self.loader = RowLoader(self.plan, cache, verify=config.data.verify, pin_memory=self.device.type == "cuda")
        self.heldout = HeldoutRows(corpora, cache, verify=config.data.verify)
        model = LanguageModel(config.model, implementation=config.run.implementation)
        model.init_weights(config.run.seed)
        self.dims = ParallelDims(**{**asdict(config.parallel), "data": world})
        options = OptimizerOptions(
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            clip=config.optimizer.clip,
        )
        self.engine = Engine(model, self.dims, options, choose_precision(config.precision, self.device), self.device)
        self.saver = checkpoint.Checkpointer(self.folder.checkpoints)
        self.meter = Meter(self.device, world)
        self.writer = MetricsWriter(config, self.folder) if self.place.rank == 0 else None

    def _close(self) -> None:
        self.loader.close()
        self.saver.close()
        self.engine.close()
        if self.writer:
            self.writer.close()

    # --- state -------------------------------------------------------------------------------------------------

    def _state(self, step: Step | None) -> dict[str, Any]:
        """What rides along in a checkpoint beside the tensors."""
        return {
            "step": self.done,
            "cursor": asdict(self._cursor(step)),
            "plan": self.plan.to_dict(),
            "config": asdict(self.config),
            "guard": self.guard.state(),
            "incarnation": self.place.incarnation,
            "dims": asdict(self.dims),
            "versions": {"longscan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _cursor(self, step: Step | None) -> Cursor:
        """The first row not trained yet."""
        return Cursor(step.stage, step.first_row + step.rows) if step else Cursor(0, 0)

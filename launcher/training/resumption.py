"""What a checkpoint says of the run that saved it, and whether this run may go on from there.

Going on means: the next row is the row that follows, for the same tokenizer. Everything else may change and is noted.
"""

from __future__ import annotations

import contextlib
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...data import Corpus, Cursor, DataPlan
from ...errors import ConfigError, UserError
from ...parallel import ParallelDims
from ...parallel.checkpoint import list_steps, read_manifest, step_folder
from ..config import Config, differences, from_mapping
from ..run_folder import RunFolder
from ..validate import open_corpora, parallel_dims, worker_count
from .rows import make_plan
from .schedule import Step, TrainingSchedule


def check_resumes(config: Config, folder: RunFolder) -> None:
    """Raises ConfigError where the run's newest readable checkpoint is not one that `config` goes on from.

    Reads manifests and tables only, so that a run is refused before anything is written or started; whether the bytes
    are whole is found out by who loads them.
    """
    for step in reversed(list_steps(folder.checkpoints)):
        path = step_folder(folder.checkpoints, step)
        with contextlib.suppress(UserError):
            meta = read_manifest(path).meta
            break
    else:
        return
    corpora, schedule = open_corpora(config), TrainingSchedule(config)
    dims = parallel_dims(config, worker_count(config))
    resumption = Resumption(config, corpora[0], make_plan(config, corpora, schedule), schedule, dims)
    resumption.check_tokenizer(str(path), meta)
    then = from_mapping(meta["config"])
    if changes := differences(then, replace(then, model=config.model)):
        raise ConfigError(
            f"checkpoint {path} is of another model: {'; '.join(changes)}. Undo that to resume, or begin a new run "
            "with --run."
        )
    resumption.check(path, meta)


class Resumption:
    """Describes this run for its checkpoints, and holds a checkpoint's description against it."""

    def __init__(self, config: Config, corpus: Corpus, plan: DataPlan, schedule: TrainingSchedule, dims: ParallelDims):
        self.config = config
        self.corpus = corpus
        self.plan = plan
        self.schedule = schedule
        self.dims = dims

    def describe(self, step: Step) -> dict[str, Any]:
        """What rides along in the checkpoint after `step`."""
        return {
            "step": step.number,
            "cursor": asdict(_after(step)),
            "plan": self.plan.to_dict(),
            "tokenizer": self.corpus.tokenizer.fingerprint,
            "config": asdict(self.config),
            "dims": self._dims(),
            "versions": {"longscan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def check(self, path: Path, meta: dict[str, Any]) -> Cursor:
        """The first row not trained yet; raises ConfigError where this run would not go on with it."""
        self.check_tokenizer(str(path), meta)
        if "cursor" not in meta:
            raise ConfigError(
                f"{path} holds converted weights and no training to resume; begin a new run with them: --init-from "
                f"{path} --run NEW_FOLDER."
            )
        cursor = Cursor(**meta["cursor"])
        self._check_plan(path, meta, cursor)
        self._check_schedule(path, meta["step"], cursor)
        if self.config.run.deterministic and meta["dims"] != self._dims():
            raise ConfigError(
                f"run.deterministic is on and {path.name} was trained with {meta['dims']['data']} replicas, not "
                f"{self.dims.data}; sums over another number of workers round differently. Use as many, or switch "
                "run.deterministic off."
            )
        return cursor

    def _dims(self) -> dict[str, Any]:
        """The layout as JSON gives it back."""
        return {**asdict(self.dims), "stage_layers": list(self.dims.stage_layers)}

    def check_tokenizer(self, path: str, meta: dict[str, Any]) -> None:
        """Raises ConfigError where the checkpoint's ids mean something else."""
        tokenizer = self.corpus.tokenizer
        if meta["tokenizer"] != tokenizer.fingerprint:
            raise ConfigError(
                f"checkpoint {path} was trained with tokenizer {meta['tokenizer']}, but {self.corpus.location} was "
                f"prepared with {tokenizer.fingerprint} ({tokenizer.kind}); prepare it with the tokenizer of that run."
            )

    def _check_plan(self, path: Path, meta: dict[str, Any], cursor: Cursor) -> None:
        if not self.plan.agrees_with(meta["plan"], cursor):
            changes = "; ".join(self.plan.describe_difference(meta["plan"]))
            raise ConfigError(
                f"{path.name} was trained on other rows: {changes}. Undo that to resume, or begin a new run with its "
                f"weights: --init-from {path} --run NEW_FOLDER."
            )

    def _check_schedule(self, path: Path, number: int, cursor: Cursor) -> None:
        total = self.schedule.total_steps
        if number > total:
            raise ConfigError(
                f"{path.name} stands at step {number} and this configuration has {total} steps; train on more tokens, "
                "or begin a new run."
            )
        here = _after(self.schedule.step(number))
        if here != cursor:
            raise ConfigError(
                f"{path.name} stands at row {cursor.row} of stage {cursor.stage} after step {number}; with this batch "
                f"size it would be row {here.row} of stage {here.stage}. Undo the change of batch or stages to resume."
            )


def _after(step: Step) -> Cursor:
    return Cursor(step.stage, step.first_row + step.rows)

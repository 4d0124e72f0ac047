"""Forms the worker group, watches it, and ends it: the only place that decides when a run starts and stops.

It holds the run folder's lock and counts incarnations. It computes nothing of the model and reads none of the data.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UserError
from ...parallel.checkpoint import list_steps
from ..config import Config, differences, load, to_yaml
from ..run_folder import RunFolder
from ..trained import find_checkpoint
from ..training.progress import Progress
from ..training.resumption import check_resumes

POLL_SECONDS = 0.2
# How long after a first failure others are waited for: the rank that died is named, not the peer that noticed.
SECONDS_TO_COLLECT_FAILURES = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished" or "stopped", and its folder."""

    status: str
    folder: Path


@dataclass(frozen=True)
class Attempt:
    """One incarnation of a run: what is trained and where, from which checkpoint's weights, and until which step."""

    config: Config
    folder: RunFolder
    incarnation: int
    weights: str | None
    stop_at: int | None


def train(config: Config, *, fresh: bool = False, init_from: str | None = None, stop_at: int | None = None) -> Outcome:
    """Runs or resumes the training that `config` describes.

    Args:
        config: a resolved and validated configuration; `run.folder` names the run.
        fresh: refuse to continue an existing run.
        init_from: a checkpoint or run whose weights begin a new run, with a fresh optimiser.
        stop_at: save and leave after this step, as if the job's time were up.

    Raises:
        UserError: the run failed; the message says where and how to go on.
    """
    weights = _first_weights(RunFolder(Path(config.run.folder)), init_from)
    folder = RunFolder.create(config.run.folder, fresh=fresh)
    with folder.lock():
        check_resumes(config, folder)
        changes = differences(load(folder.config_file), config) if folder.exists else []
        folder.save_config(to_yaml(config))
        incarnation = 1 + max((event["incarnation"] for event in folder.events.read()), default=0)
        if init_from and weights:
            _event(folder, "initialized", incarnation, init_from=str(Path(init_from).resolve()))
        with StopSignals() as signals, Progress() as progress:
            if changes:
                progress.show({"kind": "note", "text": "changed since the last start: " + "; ".join(changes)})
            launch = _train_inline if config.run.launcher == "inline" else _train_on_ray
            status = launch(Attempt(config, folder, incarnation, weights, stop_at), signals, progress)
        _event(folder, "ended", incarnation, status=status)
        return Outcome(status, folder.path)


def _first_weights(folder: RunFolder, init_from: str | None) -> str | None:
    """The checkpoint whose weights begin the run; None where the run goes on from checkpoints of its own."""
    if not init_from:
        return None
    if not list_steps(folder.checkpoints):
        return str(find_checkpoint(Path(init_from))[1])
    begun = next((event["init_from"] for event in folder.events.read() if "init_from" in event), None)
    if begun != str(Path(init_from).resolve()):
        raise ConfigError(
            f"{folder.path} already holds checkpoints and was begun with {begun or 'weights of its own'}, so "
            f"--init-from {init_from} would be ignored. Name a new run folder with --run, or leave --init-from out to "
            "resume."
        )
    return None


def _event(folder: RunFolder, kind: str, incarnation: int, **fields: Any) -> None:
    folder.events.append({"time": round(time.time(), 3), "event": kind, "incarnation": incarnation, **fields})


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to save and stop; the second leaves at once."""

    def __init__(self):
        self.requested = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = self.take_over()
        return self

    def take_over(self) -> dict[int, Any]:
        """Puts the handlers in place and returns those that were; again after Ray has started, which sets its own."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: object) -> None:
        if self.requested.is_set():
            os._exit(1)
        self.requested.set()


def _train_inline(attempt: Attempt, signals: StopSignals, progress: Progress) -> str:
    """The same trainer in this process, for debuggers and profilers."""
    from ..training.trainer import Place, Trainer

    workers = [{"rank": 0, "host": socket.gethostname(), "pid": os.getpid()}]
    _event(attempt.folder, "formed", attempt.incarnation, workers=workers)
    place = Place(rank=0, world=1, incarnation=attempt.incarnation, address="")
    trainer = Trainer(attempt.config, str(attempt.folder.path), place, progress.show, signals.requested)
    return trainer.run(init_from=attempt.weights, stop_at=attempt.stop_at)


def _train_on_ray(attempt: Attempt, signals: StopSignals, progress: Progress) -> str:
    """One Ray actor a rank."""
    from ..cluster.ray_cluster import RayCluster

    began = time.monotonic()
    with RayCluster(attempt.config) as cluster:
        signals.take_over()
        workers, places = cluster.form(attempt.folder.path, attempt.incarnation)
        seconds = round(time.monotonic() - began, 3)
        _event(attempt.folder, "formed", attempt.incarnation, workers=places, seconds=seconds)
        return _watch(cluster, workers, places, attempt, signals, progress)


def _watch(
    cluster: Any,
    workers: list[Any],
    places: list[dict[str, Any]],
    attempt: Attempt,
    signals: StopSignals,
    progress: Progress,
) -> str:
    """Shows rank 0's reports until every rank has ended; raises for the first that failed."""
    from ..training.trainer import Place

    address = f"{places[0]['address']}:{places[0]['port']}"
    runs = [
        worker.train.remote(Place(rank, len(workers), attempt.incarnation, address), attempt.weights, attempt.stop_at)
        for rank, worker in enumerate(workers)
    ]
    stop_sent = False
    statuses: dict[int, str] = {}
    while len(statuses) < len(runs):
        if signals.requested.is_set() and not stop_sent:
            progress.show({"kind": "note", "text": "stopping after this step; once more leaves at once"})
            for worker in workers:
                worker.stop.remote()
            stop_sent = True
        ended, failures = cluster.poll(runs, POLL_SECONDS)
        statuses.update(ended)
        if failures:
            time.sleep(SECONDS_TO_COLLECT_FAILURES)
            _show_reports(cluster, workers, progress)
            ended, failures = cluster.poll(runs, 0)
            silent = cluster.silent(set(range(len(runs))) - ended.keys() - failures.keys())
            raise _failure(failures, places, silent, attempt.config.run.timeout_seconds)
        _show_reports(cluster, workers, progress)
    return statuses[0]


def _show_reports(cluster: Any, workers: list[Any], progress: Progress) -> None:
    for report in cluster.ask(workers[0].reports.remote, default=[]):
        progress.show(report)


def _failure(
    failures: dict[int, Exception], places: list[dict[str, Any]], silent: Collection[int] = (), timeout: float = 0.0
) -> UserError:
    """The error to show: a rank's own clear sentence, then silence, then a death, then what others noticed of them.

    Args:
        failures: what the ranks that failed raised.
        places: where each rank stands.
        silent: the ranks whose processes do not answer.
        timeout: how many seconds the others waited for those.
    """
    rank = min(failures, key=lambda rank: (_severity(failures[rank]), rank))
    error = failures[rank]
    if isinstance(error, UserError):
        return error
    what = str(error).strip().split("\n")[-1]
    if silent:
        noticed, rank = rank, min(silent)
        what = f"it does not answer, and rank {noticed} waited run.timeout_seconds={timeout:g} for it"
    place = places[rank]
    return UserError(
        f"rank {rank} (pid {place['pid']} on {place['host']}) failed: {what}. Its log is in the run folder "
        "under logs/; the same command resumes from the last checkpoint."
    )


def _severity(error: Exception) -> int:
    return 0 if isinstance(error, UserError) else 1 if "died" in str(error).lower() else 2

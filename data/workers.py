"""Worker processes: who does the units of a preparation.

Started afresh (spawn), since a process that has loaded torch or threads must not be forked. Nothing is shared but the
work folder; a worker ends when it is told to, and when its parent is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event

from ..errors import UserError
from .units import Job, Unit, folder_name, run_unit

Progress = Callable[[int, int], None]


class Stopped(Exception):
    """Another unit failed, or the user asked to stop: the unit was left undone."""


def run_units(job: Job, units: Sequence[Unit], workers: int, progress: Progress | None) -> None:
    """Returns when every unit is there: those that are missing are done, in this process if one is enough.

    Raises:
        UserError: a unit failed, or a worker died; the units that are finished stay.
    """
    total = sum(unit.size for unit in units)
    missing = [unit for unit in units if not (job.work / folder_name(unit.number)).exists()]
    done = total - sum(unit.size for unit in missing)

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    advance(0)
    if workers == 1:
        with _one_thread():
            for unit in missing:
                run_unit(job, unit)
                advance(unit.size)
    elif missing:
        _run_in_processes(job, missing, min(workers, len(missing)), advance)


def _run_in_processes(job: Job, units: Sequence[Unit], workers: int, advance: Callable[[int], None]) -> None:
    """Does the units in fresh processes; the first failure, or Ctrl-C, ends the others within a MiB of text."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (stop,))
    try:
        futures = {pool.submit(_run_in_worker, job, unit): unit for unit in units}
        for future in as_completed(futures):
            future.result()
            advance(futures[future].size)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} worker processes died, most likely for lack of memory; what is finished is kept: "
            "run again with fewer workers."
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the `tokenizers` library to one thread, as one worker means one core."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# Set in each worker process by `_start_worker`: the parent sets the event when work is to end early.
_stop: Event | None = None


def _start_worker(stop: Event) -> None:
    """Prepares a worker process: one thread, deaf to Ctrl-C (the parent tells it), and gone when the parent is."""
    global _stop
    _stop = stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _run_in_worker(job: Job, unit: Unit) -> None:
    """`run_unit` in a worker process; raises Stopped where the parent said to end."""

    def check() -> None:
        if _stop is not None and _stop.is_set():
            raise Stopped

    check()
    run_unit(job, unit, check)

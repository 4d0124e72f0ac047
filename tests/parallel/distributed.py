"""Runs a test's function in several fresh processes that share a gloo group; the suite's only way to do so.

The function lives at the top of a test file. Each process loads that file by its path, so the test modules need no
importable names, and arguments and results travel as JSON, so nothing is pickled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

import torch


def run_distributed(function, world_size, *args, join=True, timeout=100.0, env=None, preload=()):
    """Returns what `function(*args)` returned on each rank.

    Args:
        function: a function at the top of a test file.
        world_size: how many processes.
        args: JSON values or paths.
        join: make the process group first. Without it the processes only know RANK and WORLD_SIZE.
        timeout: seconds until all are killed.
        env: more environment variables; or a function that gives those of a rank, for processes of their own.
        preload: modules that take seconds to import and that the test file does not import itself. Not for CUDA.

    Without a GPU, and where `preload` says so, one process imports the test file and forks into the ranks: importing
    takes longer than what most functions do.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "file": function.__code__.co_filename,
            "function": function.__name__,
            "args": [str(a) if isinstance(a, Path) else a for a in args],
            "store": str(Path(folder, "store")) if join else None,
            "preload": list(preload),
        }
        Path(folder, "job.json").write_text(json.dumps(job))
        starts = ["all"] if preload or not torch.cuda.is_available() else range(world_size)
        workers = [_start(folder, rank, world_size, env(rank) if callable(env) else env or {}) for rank in starts]
        try:
            _wait(workers, folder, time.monotonic() + timeout)
        finally:
            for worker in workers:
                with suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        return [json.loads(Path(folder, f"result-{rank}.json").read_text()) for rank in range(world_size)]


def _start(folder: str, rank: int | str, world_size: int, env: dict[str, str]) -> subprocess.Popen:
    """A process for one rank, or for "all"; it leads a process group of its own."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, folder, str(rank)]
    return subprocess.Popen(command, env={**os.environ, **env, **ranks}, start_new_session=True)


def _wait(workers: list[subprocess.Popen], folder: str, deadline: float) -> None:
    """Waits for all; the first that fails ends the wait with its traceback."""
    while any(worker.poll() is None for worker in workers):
        for rank, worker in enumerate(workers):
            if worker.poll():
                time.sleep(0.5)
                raise AssertionError(_reports(folder) or f"rank {rank} ended with exit code {worker.returncode}")
        if time.monotonic() > deadline:
            raise AssertionError(f"{len(workers)} processes did not end in time\n{_reports(folder)}")
        time.sleep(0.02)
    if any(worker.returncode for worker in workers):
        raise AssertionError(_reports(folder) or [worker.returncode for worker in workers])


def _reports(folder: str) -> str:
    """The tracebacks so far, first failure first."""
    paths = sorted(Path(folder).glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return "\n".join(f"{path.stem}:\n{path.read_text()}" for path in paths)


def load_function(file: str, name: str):
    """Returns the function `name` of the Python file `file`."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _fork(folder: str, world_size: int) -> None:
    """Becomes all ranks; ends like the first of them that fails."""
    job = json.loads(Path(folder, "job.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ["longscan.parallel", *job["preload"]]:
            importlib.import_module(name)
    load_function(job["file"], job["function"])
    for rank in range(world_size):
        if os.fork() == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(_guarded(folder, rank))
    for _ in range(world_size):
        if code := os.waitstatus_to_exitcode(os.wait()[1]):
            sys.exit(code)


def _guarded(folder: str, rank: int) -> int:
    """The exit code of one rank's work, its traceback kept."""
    try:
        _work(folder, rank)
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        return 1
    return 0


def _work(folder: str, rank: int) -> None:
    from longscan.parallel import destroy_process_group, init_process_group

    job = json.loads(Path(folder, "job.json").read_text())
    if job["store"]:
        init_process_group(rank, int(os.environ["WORLD_SIZE"]), store=job["store"], timeout_seconds=60)
    result = load_function(job["file"], job["function"])(*job["args"])
    Path(folder, f"result-{rank}.json").write_text(json.dumps(result))
    destroy_process_group()


if __name__ == "__main__":
    if sys.argv[2] == "all":
        _fork(sys.argv[1], int(os.environ["WORLD_SIZE"]))
    else:
        sys.exit(_guarded(sys.argv[1], int(sys.argv[2])))

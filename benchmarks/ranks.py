"""Ranks of one host for a benchmark: their processes, the groups they join, and a clock that they share."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from longscan.parallel import process_group

from .record import record

# How a rank ends that had too little memory, after it left a note of what it tried.
OUT_OF_MEMORY = 77
# Seconds a collective waits, and how often a time is taken after how many calls that warm up.
PATIENCE, WARM, REPEAT = 120.0, 2, 5


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        rank, size: its number and how many there are.
        folder: empty at the start, the same for all ranks.
    """

    rank: int
    size: int
    folder: Path

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none."""
        return torch.device("cuda", self.rank) if torch.cuda.is_available() else torch.device("cpu")

    def alone(self) -> AbstractContextManager[None]:
        """A process group of this rank only."""
        return process_group(device=self.device)

    def together(self, name: str) -> AbstractContextManager[None]:
        """The process group of all ranks; `name` is used once."""
        options = {"store": self.folder / name, "device": self.device, "timeout_seconds": PATIENCE}
        return process_group(rank=self.rank, world_size=self.size, **options)

    def note(self, work: str, metric: str, value: float, unit: str, floor: float | None = None) -> None:
        """Records a figure once, whichever rank has it."""
        if self.rank == 0:
            record("parallel", work, "longscan", metric, value, unit, floor)


def settle(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, together: bool = True) -> float:
    """The median time of `run` on the host's clock, the device's work included, after calls to warm up.

    Args:
        run: what every rank of the default group does.
        device: where.
        together: the ranks begin together and the slowest counts; else each runs for itself and their mean counts.
    """
    times = []
    for _ in range(WARM + REPEAT):
        if together and dist.is_initialized():
            dist.barrier()
        settle(device)
        began = time.perf_counter()
        run()
        settle(device)
        times.append(time.perf_counter() - began)
    if together:
        return statistics.median(over_ranks(times[WARM:], dist.ReduceOp.MAX, device))
    return mean_over_ranks(statistics.median(times[WARM:]), device)


def compile_kernels(work: Callable[[], object], device: torch.device) -> None:
    """Compiles the kernels of some work all at once, where it would compile one after the other as it meets them.

    Args:
        work: goes through them without them and leaves nothing behind; every rank of its groups does it.
        device: where it runs; on a CPU there are none.
    """
    if device.type != "cuda":
        return
    from longscan.kernels.precompile import prepare, rehearse

    prepare(rehearse(work))


def over_ranks(values: Sequence[float], op: dist.ReduceOp.RedOpType, device: torch.device) -> list[float]:
    """Each value reduced over the ranks of the default group; as they are where there is none."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(found, op)
    return found.tolist()


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean over the ranks of the default group."""
    total, ranks = over_ranks([value, 1.0], dist.ReduceOp.SUM, device)
    return total / ranks


def run_ranks(module: str, arguments: Sequence[str], folder: Path, gpus: Sequence[str], patience: float) -> int:
    """Runs `python -m module *arguments --place RANK:SIZE:FOLDER` on every GPU and returns the first failure, or 0.

    One that fails, or the end of `patience` seconds, ends all: their peers would wait for them in a collective.
    Without GPUs two ranks run on the CPU.
    """
    size = len(gpus) or 2
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, "-m", module, *arguments, "--place", f"{rank}:{size}:{folder}"] for rank in range(size)
    ]
    ranks = [subprocess.Popen(command, env=environment) for command in commands]
    deadline = time.monotonic() + patience
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > deadline:
                return -1
            time.sleep(0.05)
        return next((rank.returncode for rank in ranks if rank.returncode), 0)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()

"""The longest row that a model trains on: whole steps, masters in fp32, the update included, rows of growing length.

A row lies on all GPUs of the run as one context group, under ZeRO 1. The peaks of the last two rows say how far memory
reaches: the next row is a little shorter than that, at most twice as long as the last and at least a granule
longer, until memory is out. `--cap-gib` makes a larger GPU as small as another; what CUDA and NCCL take beside tensors
counts, and so would what other processes take: a search needs its GPUs for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longscan.parallel import Engine, ParallelDims
from longscan.parallel.plan import Load, memory

from .figures import newest
from .ranks import OUT_OF_MEMORY, Place, run_ranks, settle
from .steps import batch_of, compile_step, engine_of, load_of, release, take_step

# How much of the length that memory seems to reach is tried, and how many times the last row.
SHARE, LEAP = 0.95, 2
# In tokens: what one 80 GB GPU is to reach, and how many times that two are.
TARGETS, GAIN = {"full": 256 * 1024, "offload": 512 * 1024}, 2.1
FAILED = "failed.json"
# What CUDA takes of a GPU for a process that has done nothing is less; above it another process is at work there.
CONTEXT_GIB = 1.5


@dataclass(frozen=True)
class Scale:
    """The preset, and the tokens a rank by which rows grow."""

    preset: str
    granule: int


FULL, TINY = Scale("griffin-1.3b", 16384), Scale("griffin-tiny", 16)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the search."""
    parser.add_argument("--modes", nargs="+", default=["full", "offload"], help="longest: what of a block is kept")
    parser.add_argument("--counts", nargs="+", type=int, help="longest: numbers of GPUs; by default 1 and all")
    parser.add_argument(
        "--cap-gib",
        type=float,
        default=79.1,
        help="longest: memory of the GPU that is searched for; nothing else may run on the GPUs, it would count",
    )
    parser.add_argument(
        "--budget", type=float, default=90.0, help="longest: seconds after which a search tries no further row"
    )
    parser.add_argument("--start", type=int, default=0, help="longest: a row from which to go up by granules")


def search(module: str, shared: Sequence[str], gpus: Sequence[str], options: argparse.Namespace) -> bool:
    """Searches under each mode on each number of GPUs; whether all searches ended as they should."""
    # So that blocks of freed memory of other sizes are of use.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    counts = options.counts or sorted({1, len(gpus)})
    runs = [(mode, gpus[:count]) for mode in options.modes for count in counts if gpus] or [(options.modes[0], [])]
    ended = [_search(module, shared, mode, chosen, options) for mode, chosen in runs]
    return all(ended)


def _search(module: str, shared: Sequence[str], mode: str, gpus: Sequence[str], options: argparse.Namespace) -> bool:
    """One search; where a leap was too far, it goes on by granules from the row before."""
    start, name = options.start, f"longest, recompute {mode}, {len(gpus)} GPUs"
    for _ in range(3):
        chosen = [f"--start={start}", f"--cap-gib={options.cap_gib}", f"--budget={options.budget}", f"--modes={mode}"]
        with tempfile.TemporaryDirectory() as folder:
            code = run_ranks(module, ["longest", *shared, *chosen], Path(folder), gpus, options.patience)
            if code != OUT_OF_MEMORY:
                print(f"{name}: ended before memory did, {code}", file=sys.stderr)
                return code == 0
            failed, trained, granule = json.loads(Path(folder, FAILED).read_text())
        print(f"{name}: rows of {failed} tokens do not train", file=sys.stderr)
        if failed - trained <= granule:
            return True
        start = trained + granule
    return False


def climb(place: Place, scale: Scale, options: argparse.Namespace) -> None:
    """Trains one step on each of ever longer rows, and records the longest so far."""
    check_alone(place.device)
    dims = ParallelDims(context=place.size, zero=1 if place.size > 1 else 0)
    granule = scale.granule * place.size
    load = load_of(scale.preset, dims, granule, 1, 1, options.modes[0])
    group: AbstractContextManager[None] = place.together("longest") if place.size > 1 else place.alone()
    with group, engine_of(load, place.device) as engine:
        run, began = Climb(place, scale.preset, load, engine), time.perf_counter()
        compile_step(engine, batch_of(run.of(2 * granule)))
        _, peak = run.step(2 * granule)
        limit, tried = run.cap(options.cap_gib), [(2 * granule, peak)]
        tokens = options.start or 4 * granule
        while True:
            try:
                taken, peak = run.step(tokens)
            except torch.OutOfMemoryError as error:
                print(run.shortage(tokens, limit, error), file=sys.stderr)
                # What is given to go up from is one granule above a row that trained.
                trained = max(tried[-1][0], options.start - granule)
                (place.folder / FAILED).write_text(json.dumps([tokens, trained, granule]))
                sys.stderr.flush()
                # A rank that runs out too says so; others wait in a collective, and `run_ranks` ends them.
                time.sleep(1)
                os._exit(OUT_OF_MEMORY)
            run.note(tokens, taken, peak)
            tried.append((tokens, peak))
            tokens = tokens + granule if options.start else longer(tried, limit, granule)
            # One clock for all ranks: all go on or none.
            if engine.sum(time.perf_counter() - began)[0] > options.budget:
                break


def check_alone(device: torch.device) -> None:
    """Ends a process that has done nothing yet where another one holds memory of its GPU."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if (held := (total - free) / 2**30) > CONTEXT_GIB:
        sys.exit(
            f"longest: {held:.1f} GiB of {device} are taken before the search begins, and would make rows shorter; end "
            "the other processes on that GPU, or choose another by --gpus"
        )


def longer(tried: Sequence[tuple[int, float]], limit: float, granule: int) -> int:
    """The tokens of the next row, a multiple of `granule`, after rows and their peaks; `limit` is the highest peak."""
    (tokens, first), (last, second) = tried[-2:]
    growth = (second - first) / (last - tokens)
    reach = last + (limit - second) / growth if growth > 0 else last
    return max(last + granule, int(min(LEAP * last, SHARE * reach)) // granule * granule)


class Climb:
    """Steps of one engine on rows of any length; `load` names all but that."""

    def __init__(self, place: Place, preset: str, load: Load, engine: Engine) -> None:
        self.place, self.preset, self.load, self.engine = place, preset, load, engine

    def step(self, tokens: int) -> tuple[float, float]:
        """(seconds of one step, bytes that tensors took at its peak)."""
        device, load = self.place.device, self.of(tokens)
        release(device)
        batch = batch_of(load)
        began = time.perf_counter()
        take_step(self.engine, load, [batch])
        settle(device)
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        return time.perf_counter() - began, float(peak)

    def of(self, tokens: int) -> Load:
        """The load with rows of so many tokens."""
        load = self.load
        return replace(load, seq_len=tokens)

    def cap(self, gib: float) -> float:
        """Bytes that tensors may take on a GPU of so much memory; more are refused from now on."""
        if self.place.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info(self.place.device)
        beside = total - free - torch.cuda.memory_reserved(self.place.device)
        limit = min(gib * 2**30, total) - beside
        torch.cuda.set_per_process_memory_fraction(limit / total, self.place.device)
        return limit

    def shortage(self, tokens: int, limit: float, error: torch.OutOfMemoryError) -> str:
        """A line that says for what this rank had too little memory; `limit` is what tensors may take."""
        device = self.place.device
        sizes = {
            "limit": limit,
            "planned": memory(self.of(tokens)).total,
            "allocated at the peak": torch.cuda.max_memory_allocated(device),
            "reserved at the peak": torch.cuda.max_memory_reserved(device),
        }
        said = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items())
        return f"rank {self.place.rank}, row of {tokens} tokens: {said}; {' '.join(str(error).split())}"

    def note(self, tokens: int, taken: float, peak: float) -> None:
        """Records a row that trained."""
        place, mode = self.place, self.load.checkpointing
        work = f"{self.preset} longest row, recompute {mode}"
        count = f"{place.size} GPU" + "s" * (place.size > 1)
        floor = TARGETS.get(mode) if place.size == 1 else None
        place.note(work, f"tokens, {count}", tokens, "tokens", floor)
        place.note(work, f"one step, {count}", taken, "s")
        place.note(work, f"peak memory of tensors, {count}", peak / 2**30, "GiB")
        place.note(work, f"planned, {count}", memory(self.of(tokens)).total / 2**30, "GiB")
        if place.size > 1 and place.rank == 0 and (alone := length_of_one(work)):
            place.note(work, f"{count} over one", tokens / alone, "x one GPU", GAIN if place.size == 2 else None)


def length_of_one(work: str) -> float | None:
    """The longest row of one GPU, where one is recorded."""
    found = [f["value"] for f in newest("parallel") if f["work"] == work and f["metric"] == "tokens, 1 GPU"]
    return found[-1] if found else None

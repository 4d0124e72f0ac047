"""Seconds to save and to resume: what training waits for, what happens behind it, and how soon a run goes on.

Each figure is the best of five, in processes that are up: libraries imported, model and engine built. Resume is what a
restarted run does then: find the newest checkpoint that verifies, every byte read, and load it into the engine.

    python -m benchmarks.checkpoint [--ranks 1 2] [--models griffin-demo wide]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from longscan.models import LanguageModel, ModelConfig
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group
from longscan.parallel.checkpoint import Checkpointer, load_weights, verify

from .record import ROOT, record

REPEATS = 5
RESUME_FLOOR = 2.0
# `wide` is the demo at 1024 channels: large enough that bytes, not planning, take the time.
MODELS = {
    "griffin-demo": {},
    "wide": {"width": 1024, "rg_lru": {"width": 1408, "gate_blocks": 4}, "mlp": {"hidden": 3072}},
}


def build(name: str) -> LanguageModel:
    """The model with its weights drawn."""
    mapping = load_preset("griffin-demo")
    for key, value in {"vocab_size": 320, **MODELS[name]}.items():
        mapping[key] = {**mapping[key], **value} if isinstance(value, dict) else value
    config: ModelConfig = config_from_mapping(mapping)
    model = LanguageModel(config)
    model.init_weights(0)
    return model


def best(act: Callable[[], object]) -> float:
    """The least seconds of five calls."""
    return min(seconds(act) for _ in range(REPEATS))


def seconds(act: Callable[[], object]) -> float:
    """The seconds of one call."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def measure(name: str, rank: int, ranks: int, folder: Path) -> None:
    """One rank's part; rank 0 records."""
    with process_group(rank=rank, world_size=ranks, store=folder / "store"):
        model = build(name)
        parameters = sum(p.numel() for p in model.parameters())
        engine = Engine(model, ParallelDims(data=ranks), OptimizerOptions())
        checkpointer = Checkpointer(folder / "checkpoints", engine, keep_last=1)
        waits, totals = [], []
        for step in range(REPEATS):
            begin = time.perf_counter()
            checkpointer.save(step, {})
            waits.append(time.perf_counter() - begin)
            checkpointer.wait()
            totals.append(time.perf_counter() - begin)
        resume = best(lambda: checkpointer.load(checkpointer.find_latest()[0] or ""))
        if rank == 0:
            work = f"{name}, {parameters / 1e6:.2f}M parameters, zero 1, {ranks} rank{'s' * (ranks > 1)}"
            report(work, folder, model, waits, totals, resume, 12 * parameters)
        checkpointer.close()
        engine.close()


def report(
    work: str, folder: Path, model: LanguageModel, waits: list[float], totals: list[float], resume: float, size: int
) -> None:
    """Records the figures, and those of reading in one process."""
    path = max((folder / "checkpoints").glob("step-*"))
    figures = {
        "training waits for a save": (min(waits[1:]), "s", None),
        "save until in place": (statistics.median(totals), "s", None),
        "resume: verify and load": (resume, "s", RESUME_FLOOR if "demo" in work else None),
        "verify": (size / best(lambda: verify(path)) / 2**30, "GiB/s", None),
        "load weights alone": (best(lambda: load_weights(path, model)), "s", None),
        "manifest": ((path / "manifest.json").stat().st_size, "bytes", None),
    }
    for metric, (value, unit, floor) in figures.items():
        record("checkpoint", work, "longscan", metric, value, unit, floor)


def start(name: str, ranks: int) -> None:
    """Runs the ranks as processes of this file."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, "-m", "benchmarks.checkpoint", "--worker", name, str(r), str(ranks), folder]
            for r in range(ranks)
        ]
        workers = [
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in commands
        ]
        if any(worker.wait() for worker in workers):
            raise SystemExit(f"a rank of {name} failed")


def main() -> None:
    """Measures every model with every count of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, rank, ranks, folder = options.worker
        torch.manual_seed(0)
        return measure(name, int(rank), int(ranks), Path(folder))
    for name in options.models:
        for ranks in options.ranks:
            start(name, ranks)


if __name__ == "__main__":
    main()

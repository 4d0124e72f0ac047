"""Records one measured figure: a JSON object a line in `benchmarks/results/<bench>-<device>.jsonl`, and on the screen.

from .record import record   # in a benchmark, which is run as `python -m benchmarks.<bench>`
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_VERSIONED = (
    "torch",
    "triton",
    "numpy",
    "liger-kernel",
    "deepspeed",
    "megatron-core",
    "ray",
    "webdataset",
    "tokenizers",
)


def record(
    bench: str,
    work: str,
    impl: str,
    metric: str,
    value: float,
    unit: str,
    floor: float | None = None,
    *,
    quiet: bool = False,
) -> dict[str, object]:
    """Returns the figure as it was appended to the results.

    Args:
        bench: the benchmark's name, which names the file.
        work: what was done, shape or corpus: the same string for every `impl` that did it.
        impl: `longscan`, or a peer's name with its version.
        metric: what was measured.
        value: the figure.
        unit: its unit.
        floor: the least (or, for times, most) that is promised; None where nothing is.
        quiet: leaves the screen to the bench, which shows its figures in its own way.
    """
    kind, device = _device()
    figure: dict[str, object] = {
        "bench": bench,
        "work": work,
        "impl": impl,
        "metric": metric,
        "value": float(f"{value:.6g}"),
        "unit": unit,
        "floor": floor,
        "device": device,
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{bench}-{kind}.jsonl", "a") as file:
        file.write(json.dumps(figure) + "\n")
    if not quiet:
        promised = "" if floor is None else f" (promised: {floor:g})"
        print(f"{work} | {impl} | {metric}: {figure['value']:g} {unit}{promised}", file=sys.stderr)
    return figure


def _device() -> tuple[str, str]:
    """The device for the file's name (cpu, h100, ...) and for people to read."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return name.replace("NVIDIA", "").split()[0].lower(), name
    return "cpu", f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def _versions() -> dict[str, str]:
    """The versions of Python and of the libraries that are installed."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def _commit() -> str:
    """The commit measured, with `+` where the tree had changes beyond it; empty outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short=12", "--verify", "HEAD") + ("+" if changed else "")

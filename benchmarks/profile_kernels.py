"""Counters of each of our kernels at the usual shapes, read by NVIDIA's Nsight Compute (ncu) and recorded.

    python -m benchmarks.profile_kernels [group ...] --keep FOLDER

One process runs every work twice, forward and backward, and the second time under the profiler; `--keep` is where ncu's
own table is left. Times under ncu are of one kernel alone at an even clock, from a cold cache: shares, not speed.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .figures import is_sweep
from .gpu_timing import Work, launches
from .kernels import GROUPS
from .record import ROOT, record

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "ComputeWorkloadAnalysis")
# How many reasons for which warps wait are recorded.
REASONS = 3
_STALL = re.compile(r"^smsp__average_warps_issue_stalled_(?!\w+_not_issued)(\w+)_per_issue_active\.ratio$")

_JITTED = re.compile(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)")


@dataclass(frozen=True)
class Counter:
    """A figure: its name and unit here, and the beginnings of the names that ncu gives it in one release or another."""

    name: str
    unit: str
    names: tuple[str, ...]


COUNTERS = (
    Counter("dram", "%", ("dram__throughput.avg.pct", "gpu__dram_throughput.avg.pct")),
    Counter("multiprocessors", "%", ("sm__throughput.avg.pct",)),
    Counter("tensor pipe", "%", ("sm__pipe_tensor_cycles_active.avg.pct", "sm__inst_executed_pipe_tensor")),
    Counter("occupancy", "%", ("sm__warps_active.avg.pct",)),
    Counter("registers", "a thread", ("launch__registers_per_thread",)),
)
# What ncu may give a time in.
_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6}


class Launch(NamedTuple):
    """One launch that ncu profiled: the kernel's name, its microseconds, and the counters read."""

    kernel: str
    time: float
    values: dict[str, float]


def launches_in(text: str) -> list[Launch]:
    """The launches of ncu's `--csv --page raw` output; lines around the table are passed over.

    The table has a line of names, a line of units, then a line a launch. ValueError where there is none.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        said = next((line for line in reversed(lines) if "==ERROR==" in line), "it is empty of launches")
        raise ValueError(f"ncu's table: {said}")
    names, units, *rows = (row for row in csv.reader(lines[first:]) if row and not row[0].startswith("=="))
    units_of = dict(zip(names, units, strict=False))
    return [_launch(dict(zip(names, row, strict=False)), units_of) for row in rows if row[0].isdigit()]


def _launch(row: dict[str, str], units: dict[str, str]) -> Launch:
    time = next((name for name in row if name.startswith("gpu__time_duration")), "")
    scale = _MICROSECONDS.get(units.get(time, ""), 1e-3)
    numbers = {name: number for name, text in row.items() if (number := _number(text)) is not None}
    values = {counter.name: value for counter in COUNTERS if (value := _pick(counter, numbers)) is not None}
    stalls = {found[1]: value for name, value in numbers.items() if (found := _STALL.search(name))}
    stalls.pop("selected", None)
    for reason in sorted(stalls, key=lambda reason: -stalls[reason])[:REASONS]:
        values[f"waits: {reason}"] = stalls[reason]
    return Launch(row["Kernel Name"].split("(")[0].strip(), numbers.get(time, 0.0) * scale, values)


def _pick(counter: Counter, numbers: dict[str, float]) -> float | None:
    """The largest of the columns whose names begin so: a pipe may be split in several."""
    for beginning in counter.names:
        found = [
            v for name, v in numbers.items() if name.startswith(beginning) and (counter.unit != "%" or "pct" in name)
        ]
        if found:
            return max(found)
    return None


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def together(found: Sequence[Launch]) -> Launch:
    """The launches of one kernel in one work as one: times added, counters weighted by time."""
    whole = sum(launch.time for launch in found)
    names = dict.fromkeys(name for launch in found for name in launch.values)
    shares = [launch.time / whole if whole else 1 / len(found) for launch in found]
    values = {n: sum(s * f.values.get(n, 0.0) for s, f in zip(shares, found, strict=True)) for n in names}
    return Launch(found[0].kernel, whole, values)


def note(found: Sequence[Launch], ran: Sequence[tuple[str, str]]) -> None:
    """Records the launches by work and kernel.

    Args:
        found: what ncu saw, in order.
        ran: (work, kernel) of each launch the program made, in order.
    """
    if [launch.kernel for launch in found] != [kernel for _, kernel in ran]:
        raise ValueError(f"ncu profiled {len(found)} launches and the program made {len(ran)}, or others")
    groups: dict[tuple[str, str], list[Launch]] = {}
    for launch, key in zip(found, ran, strict=True):
        groups.setdefault(key, []).append(launch)
    for (work, kernel), several in groups.items():
        whole = together(several)
        put = partial(record, "profile", f"{work}: {kernel}", "longscan")
        put("time", whole.time, "us")
        put("launches", len(several), "launches")
        units = {counter.name: counter.unit for counter in COUNTERS}
        for name, value in whole.values.items():
            put(name, value, units.get(name, "warps an issue"))


def our_kernels() -> list[str]:
    """The names of all jitted functions under kernels/."""
    sources = (file.read_text() for file in sorted((ROOT / "kernels").glob("*/kernel.py")))
    return sorted({name for text in sources for name in _JITTED.findall(text)})


def run_works(groups: Iterable[str], told: Path) -> None:
    """Runs our works forward and backward, the second time between the profiler's marks; writes who ran what."""
    ours, ran = set(our_kernels()), []
    for group in groups:
        for work in importlib.import_module(f".kernels_{group}", __package__).works():
            if work.impl.startswith("longscan") and not is_sweep(work.name):
                call = _both(work)
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                with launches() as names:
                    call()
                    torch.cuda.synchronize()
                torch.cuda.profiler.stop()
                suffix = work.impl.removeprefix("longscan")
                ran += [(work.name + suffix, name) for name in names if name in ours]
            del work
    told.write_text(json.dumps(ran))


def _both(work: Work) -> Callable[[], object]:
    if not work.leaves:
        return lambda: work.call(*work.inputs)
    grad = torch.randn_like(work.call(*work.inputs))
    return lambda: torch.autograd.grad(work.call(*work.inputs), work.leaves, grad)


def profile(groups: Sequence[str], folder: Path) -> None:
    """Runs the works under ncu and records what it says; its table stays in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table, told = folder / "ncu.csv", folder / "launches.json"
    told.unlink(missing_ok=True)
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(table), "--force-overwrite"]
    command += ["--clock-control", "none", "--profile-from-start", "off"]
    command += ["-k", f"regex:^({'|'.join(our_kernels())})$"]
    command += [option for section in SECTIONS for option in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.profile_kernels", "--child", str(told), *groups]
    done = subprocess.run(command, cwd=ROOT)
    if not told.exists():
        said = table.read_text()[-500:] if table.exists() else ""
        sys.exit(f"ncu ended with {done.returncode} before the works did. {said}")
    try:
        note(launches_in(table.read_text()), [(work, kernel) for work, kernel in json.loads(told.read_text())])
    except (OSError, ValueError) as error:
        sys.exit(f"{error}; what ncu and the program wrote is in {folder}")


def main() -> None:
    """Profiles the groups named, or all, or is the process that ncu watches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; all where none is named")
    parser.add_argument("--keep", type=Path, help="folder for ncu's own table")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.groups:
        if name not in GROUPS:
            parser.error(f"no group {name!r}, expected some of {', '.join(GROUPS)}")
    groups = options.groups or GROUPS
    if options.child:
        run_works(groups, options.child)
        return
    if options.keep is None:
        parser.error("name a folder for ncu's table: --keep FOLDER")
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        sys.exit("benchmarks.profile_kernels needs a CUDA GPU and ncu (Nsight Compute) on the path")
    profile(groups, options.keep)


if __name__ == "__main__":
    main()

"""Hardware counters of the kernels of our works at the usual shapes, read by Nsight Compute (ncu) and recorded.

    python -m benchmarks.profile_kernels [group ...] [--works TEXT ...] --keep FOLDER

Every work has a process of its own under ncu, which runs it forward and backward, and is recorded when that ends, so
that what is done stays done. ncu's own tables are left in `--keep`. A process that ncu does not watch compiles the
kernels of all works beforehand. Times under ncu are of one kernel alone, from a cold cache: shares, not speed.
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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import kernels
from .figures import is_sweep
from .gpu_timing import Work
from .kernels import GROUPS
from .record import ROOT, record

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "ComputeWorkloadAnalysis")
# How many reasons for which warps wait are recorded.
REASONS = 3
# The least share of a work's time for which a kernel of it is recorded.
LEAST = 0.01
# What ncu says where counters are kept from this user, and then of every work.
FORBIDDEN = "ERR_NVGPUCTRPERM"
_STALL = re.compile(r"^smsp__average_warps_issue_stalled_(?!\w+_not_issued)(\w+)_per_issue_active\.ratio$")


@dataclass(frozen=True)
class Counter:
    """A figure: its name and unit here, and the beginnings of the names that ncu gives it in one release or another."""

    name: str
    unit: str
    names: tuple[str, ...]


COUNTERS = (
    Counter("dram", "%", ("dram__throughput.avg.pct", "gpu__dram_throughput.avg.pct")),
    Counter("L2", "%", ("lts__throughput.avg.pct",)),
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
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = [row for row in csv.reader(lines[first:]) if row and not row[0].startswith("==")]
    if len(table) < 3:
        raise ValueError(f"ncu's table: {errors_in(text) or 'it is empty of launches'}")
    names, units, *rows = table
    units_of = dict(zip(names, units, strict=False))
    return [_launch(dict(zip(names, row, strict=False)), units_of) for row in rows if row[0].isdigit()]


def errors_in(text: str) -> str:
    """What ncu's output says went wrong, in a line; empty where nothing did."""
    return " ".join(dict.fromkeys(line for line in text.splitlines() if line.startswith("==ERROR==")))


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


def note(work: str, found: Sequence[Launch]) -> None:
    """Records what ncu saw of a work, kernel by kernel, products and other people's included."""
    whole = sum(launch.time for launch in found)
    units = {counter.name: counter.unit for counter in COUNTERS}
    for kernel in dict.fromkeys(launch.kernel for launch in found):
        several = [launch for launch in found if launch.kernel == kernel]
        one = together(several)
        if one.time < LEAST * whole:
            continue
        put = partial(record, "profile", f"{work}: {kernel}", "longscan", quiet=True)
        put("time", one.time, "us")
        put("share of the work", 100 * one.time / whole if whole else 0.0, "%")
        put("launches", len(several), "launches")
        for name, value in one.values.items():
            put(name, value, units.get(name, "warps an issue"))


def our_works(groups: Iterable[str]) -> Iterator[tuple[str, str, Work]]:
    """(group, name, work) of what we implement, lengths that only show a growth left out."""
    for group in groups:
        for work in importlib.import_module(f".kernels_{group}", __package__).works():
            if work.impl.startswith("longscan") and not is_sweep(work.name):
                yield group, work.name + work.impl.removeprefix("longscan"), work
            del work


def plan(groups: Sequence[str], texts: Sequence[str], told: Path) -> None:
    """Compiles the kernels of the works chosen and writes which those are, as (group, name).

    Args:
        groups: of GROUPS.
        texts: parts of names; all works where there are none. One that is part of no name ends the process.
        told: the file to write.
    """
    from longscan.kernels.precompile import prepare, rehearse

    known: list[tuple[str, str]] = []

    def run() -> None:
        for group, name, work in our_works(groups):
            known.append((group, name))
            if is_chosen(name, texts):
                _both(work)()
            del work

    missing = rehearse(run)
    if unknown := [text for text in texts if not any(text in name for _, name in known)]:
        names = "\n".join(name for _, name in known)
        sys.exit(f"no work has {' or '.join(map(repr, unknown))} in its name; known:\n{names}")
    prepare(missing)
    told.write_text(json.dumps([entry for entry in known if is_chosen(entry[1], texts)]))


def is_chosen(name: str, texts: Sequence[str]) -> bool:
    """Whether one of the texts, if there are any, is part of the name."""
    return not texts or any(text in name for text in texts)


def run_work(group: str, wanted: str) -> None:
    """Runs a work forward and backward, then once more between the profiler's marks."""
    call = _both(next(work for _, name, work in our_works([group]) if name == wanted))
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _both(work: Work) -> Callable[[], object]:
    if not work.leaves:
        return lambda: work.call(*work.inputs)
    grad = torch.randn_like(work.call(*work.inputs))
    return lambda: torch.autograd.grad(work.call(*work.inputs), work.leaves, grad)


def profile(groups: Sequence[str], texts: Sequence[str], folder: Path) -> list[str]:
    """Profiles the works chosen one after the other, records each when it ends, and returns those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    began, told, failed = time.perf_counter(), folder / "works.json", []
    planning = [*_PROGRAM, *groups, "--plan", str(told), *(["--works", *texts] if texts else [])]
    if code := subprocess.run(planning, cwd=ROOT).returncode:
        sys.exit(code)
    works = json.loads(told.read_text())
    print(f"{len(works)} works compiled in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    for group, name in works:
        began, said = time.perf_counter(), ""
        try:
            found = look(group, name, folder)
        except (OSError, ValueError) as error:
            failed.append(name)
            said = f"FAILED, {error}"
        else:
            note(name, found)
            said = f"{len(found)} launches"
        print(f"{name}: {said}, in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if FORBIDDEN in said:
            break
    return failed


_PROGRAM = (sys.executable, "-m", "benchmarks.profile_kernels")


def look(group: str, name: str, folder: Path) -> list[Launch]:
    """The launches of a work as ncu sees them; its table stays in the folder. ValueError where it ends badly."""
    table = folder / (re.sub(r"\W+", "-", name) + ".csv")
    table.unlink(missing_ok=True)
    # Compilers and the like, which a process may start, are not watched.
    command = ["ncu", "--target-processes", "application-only", "--profile-from-start", "off"]
    command += ["--clock-control", "none", *(option for section in SECTIONS for option in ("--section", section))]
    command += ["--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "function"]
    command += ["--log-file", str(table), *_PROGRAM, group, "--child", name]
    code = subprocess.run(command, cwd=ROOT).returncode
    text = table.read_text()
    if code:
        raise ValueError(f"ncu ended with {code}: {errors_in(text)}")
    return launches_in(text)


def main() -> None:
    """Profiles the works chosen, or is the process that plans, or the one that ncu watches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; all where none is named")
    parser.add_argument(
        "--works", nargs="+", default=[], metavar="TEXT", help="only works with such a part in their name"
    )
    parser.add_argument("--keep", type=Path, help="folder for ncu's own tables")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.groups:
        if name not in GROUPS:
            parser.error(f"no group {name!r}, expected some of {', '.join(GROUPS)}")
    groups = options.groups or GROUPS
    kernels._hide_this_folder()
    if options.child:
        run_work(groups[0], options.child)
        return
    if options.plan:
        plan(groups, options.works, options.plan)
        return
    if options.keep is None:
        parser.error("name a folder for ncu's tables: --keep FOLDER")
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        sys.exit("benchmarks.profile_kernels needs a CUDA GPU and ncu (Nsight Compute) on the path")
    failed = profile(groups, options.works, options.keep.resolve())
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

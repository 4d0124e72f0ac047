"""Time and peak memory of each op on one GPU beside the machine's floor and its peers.

Run as `longscan bench kernels [op ...]` or `python -m benchmarks.kernels [op ...]`; every figure is recorded as soon as
it is measured. The floor is the larger of bytes over the measured copy rate and FLOPs over the measured matmul rate,
each input read once and each output written once. Times are medians of what the GPU spends between two events, from a
cold L2 cache and with the host's work queued ahead. Forward and backward together are one figure, since training pays
both.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longscan.errors import ConfigError, UserError

from .figures import is_sweep
from .gpu_timing import Work, copy_rate, matmul_rate, milliseconds, seconds
from .record import ROOT, record

# The modules benchmarks/kernels_<name>.py, each of which has works().
GROUPS = sorted(path.stem.removeprefix("kernels_") for path in Path(__file__).parent.glob("kernels_*.py"))
# A figure is the median of so many runs, fewer where they would take longer than BUDGET_S.
REPEAT, QUICK_REPEAT, FEWEST = 30, 10, 3
BUDGET_S = 1.0
# The distribution behind the first word of a peer's name, whose version goes into the records.
PEERS = {
    "FlexAttention": "torch",
    "Liger": "liger-kernel",
    "SDPA": "torch",
    "accelerated-scan": "accelerated-scan",
    "fla": "fla-core",
    "fla-core": "fla-core",
    "torch": "torch",
    "torch.compile": "torch",
}


@dataclass(frozen=True)
class Ceilings:
    """Bytes and FLOPs a second of the machine."""

    copied: float
    multiplied: float

    def floor(self, moved: int, flops: int) -> float:
        """The fewest milliseconds for that much."""
        return max(moved / self.copied, flops / self.multiplied) * 1e3


@dataclass
class Row:
    """A row of the table, times and floors in ms; `error` says why the rest is missing."""

    work: str
    impl: str
    forward: float | None = None
    both: float | None = None
    forward_floor: float | None = None
    both_floor: float | None = None
    peak_mib: float | None = None
    first_call_s: float = 0.0
    whole_s: float = 0.0
    error: str | None = None

    @property
    def ours(self) -> bool:
        """Whether this is not a peer."""
        return self.impl.startswith("longscan")

    def line(self) -> str:
        """What a user who waits wants to read."""
        told = [f"{name} {_ratio(value, floor)}" for name, value, floor in self.passes() if value is not None]
        told += [self.error] if self.error else []
        return (
            f"{self.work} | {self.impl}: {', '.join(told)}; {self.whole_s:.1f} s ({self.first_call_s:.1f} s to compile)"
        )

    def passes(self) -> Iterator[tuple[str, float | None, float | None]]:
        """(metric, time, floor) of forward, and of forward and backward."""
        yield "fwd", self.forward, self.forward_floor
        yield "fwd+bwd", self.both, self.both_floor


@dataclass(frozen=True)
class Measured:
    """What a run of the bench found, in the order measured."""

    rows: list[Row]

    @property
    def failed(self) -> list[str]:
        """The works of ours that did not run."""
        return [row.work for row in self.rows if row.ours and row.error]

    def to_json(self) -> list[dict[str, Any]]:
        """One object a row."""
        return [asdict(row) for row in self.sorted()]

    def sorted(self) -> list[Row]:
        """The rows work by work, ours before its peers, fast ones first."""
        works = list(dict.fromkeys(row.work for row in self.rows))
        slowest = float("inf")
        return sorted(self.rows, key=lambda r: (works.index(r.work), not r.ours, r.both or r.forward or slowest))

    def show(self, console: Any) -> None:
        """Prints the rows as a table, a block a work."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("work, and who did it", overflow="fold")
        for name in ("fwd ms", "x floor", "fwd+bwd ms", "x floor", "peak MiB"):
            table.add_column(name, justify="right", no_wrap=True)
        work = None
        for row in self.sorted():
            if row.work != work:
                table.add_section()
                table.add_row(f"[bold]{_escaped(row.work)}[/]")
                work = row.work
            table.add_row(*_cells(row), style="" if row.ours else "dim")
        console.print(table)


def run(groups: Sequence[str] = (), quick: bool = False) -> Measured:
    """Measures, records and returns the works of the groups named, or of all; reports each on standard error.

    Args:
        groups: of GROUPS.
        quick: leaves out works that only show the growth with T, and repeats less.
    """
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise ConfigError(f"no benchmark {unknown[0]!r}; expected some of {', '.join(GROUPS)}")
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU, and these times hold only on one; run this on a machine with a CUDA GPU")
    _hide_this_folder()
    torch.manual_seed(0)
    ceilings, rows = _ceilings(), []
    for work in _works(groups or GROUPS, quick, rows):
        rows.append(_row(work, ceilings, QUICK_REPEAT if quick else REPEAT))
        print(rows[-1].line(), file=sys.stderr, flush=True)
        del work
        # Each work compiles afresh: PyTorch falls back to eager code, in silence, after a few shapes of one function.
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return Measured(rows)


def _ceilings() -> Ceilings:
    found = Ceilings(copy_rate(), matmul_rate())
    record("kernels", "device copy 1 GiB", versioned("torch"), "rate", found.copied / 1e9, "GB/s")
    record("kernels", "matmul 8192^3 bf16", versioned("torch"), "rate", found.multiplied / 1e12, "TFLOP/s")
    return found


def _works(groups: Sequence[str], quick: bool, rows: list[Row]) -> Iterator[Work]:
    """The works asked for; a group whose next inputs cannot be made ends with a row that says so."""
    for name in groups:
        try:
            for work in importlib.import_module(f".kernels_{name}", __package__).works():
                if not (quick and is_sweep(work.name)):
                    yield work
                del work
        except Exception as error:  # the figures of the other groups still stand
            rows.append(Row(f"{name}: the works after the last one shown", "longscan", error=_reason(error)))
            print(rows[-1].line(), file=sys.stderr, flush=True)


def _row(work: Work, ceilings: Ceilings, repeat: int) -> Row:
    """The figures of a work, recorded; where it cannot run, why."""
    begin = time.perf_counter()
    row = Row(work.name, versioned(work.impl))
    row.forward_floor = ceilings.floor(work.forward_bytes, work.forward_flops)
    row.both_floor = ceilings.floor(work.both_bytes, work.both_flops)
    try:
        _measure(work, row, repeat)
    except Exception as error:  # a peer may not run here; the other figures still stand
        row.error = _reason(error)
        if isinstance(error, torch.OutOfMemoryError):
            record("kernels", row.work, row.impl, "does not fit in", _memory_gib(), "GiB", quiet=True)
    row.whole_s = time.perf_counter() - begin
    return row


def _measure(work: Work, row: Row, repeat: int) -> None:
    """Fills in and records forward, then forward plus backward where something has a gradient."""

    def forward() -> None:
        with torch.no_grad():
            work.call(*work.inputs)

    row.forward, row.peak_mib = _pass(row, "fwd", forward, row.forward_floor, repeat)
    if not work.leaves:
        return
    grad = torch.randn_like(work.call(*work.inputs))

    def both() -> None:
        torch.autograd.grad(work.call(*work.inputs), work.leaves, grad)

    row.both, row.peak_mib = _pass(row, "fwd+bwd", both, row.both_floor, repeat)


def _pass(row: Row, metric: str, call: Callable[[], None], floor: float | None, repeat: int) -> tuple[float, float]:
    """(milliseconds, MiB at the peak above the inputs) of a pass, recorded."""
    row.first_call_s += seconds(call)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    spent = seconds(call)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    affordable = int(BUDGET_S / max(spent, 1e-6))
    took = milliseconds(call, max(FEWEST, min(repeat, affordable)), warm=min(3, affordable))
    record("kernels", row.work, row.impl, metric, took, "ms", floor, quiet=True)
    record("kernels", row.work, row.impl, f"{metric} peak above inputs", peak, "MiB", quiet=True)
    return took, peak


def _reason(error: Exception) -> str:
    """Why a work did not run, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"does not fit in {_memory_gib():.0f} GiB"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def _memory_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def versioned(impl: str) -> str:
    """An implementation's name with the version of its distribution, unless it has one or is ours."""
    first = impl.split()[0]
    distribution = PEERS.get(first.rstrip(","))
    if distribution is None:
        return impl
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return impl
    if version in impl:
        return impl
    return (
        impl.replace(first, f"{first} {version}", 1) if first == distribution else f"{impl}, {distribution} {version}"
    )


def _ratio(value: float, floor: float | None) -> str:
    return f"{value:.3g} ms" + (f" = {value / floor:.2f} x floor" if floor else "")


def _cells(row: Row) -> list[str]:
    cells = ["  " + _escaped(row.impl)]
    for _, value, floor in row.passes():
        cells += ["", ""] if value is None else [f"{value:.4g}", f"{value / floor:.2f}" if floor else ""]
    cells.append("" if row.peak_mib is None else f"{row.peak_mib:,.0f}")
    if row.error:
        cells[0] += f": {_escaped(row.error)}"
    return cells


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _hide_this_folder() -> None:
    """Peers probe for a distribution called `kernels`; found in the working folder, ours would break their import."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def main() -> None:
    """Measures the works of the groups named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="op", help=f"of {', '.join(GROUPS)}; all where none is named")
    parser.add_argument("--quick", action="store_true", help="only the table's shapes, fewer repeats")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options = parser.parse_args()
    try:
        measured = run(options.groups, options.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if options.json:
        print(json.dumps(measured.to_json(), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        measured.show(Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    sys.exit(1 if measured.failed else 0)


if __name__ == "__main__":
    main()

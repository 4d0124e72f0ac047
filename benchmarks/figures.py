"""The figures recorded in `results/`, the newest of each kind, and what the names of works and peers say.

Not a plot and not a page: `plot_kernels` and `report` make those from here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from .record import RESULTS

Figure = dict[str, Any]

# Where a work's name holds the tokens in a row, or the rows of a product. A batch is below 1000: (32768, 16, 128) are
# tokens, heads and dims.
_TOKENS = (
    r"\bT (?P<tokens>\d+)",
    r"\(B, H, T\) = \(\d+, \d+, (?P<tokens>\d+)\)",
    r"\(\d{1,3}, (?P<tokens>\d+)(, [\dx]+)+\)",
    r" (?P<tokens>\d+) x \d+ x \d+",
)
# Works that were measured at several lengths, and the usual ones: of a row, and of cross entropy's rows of logits.
_SEVERAL = re.compile(r"\bB 1\b|\(1, | x 2560 x 32000")
USUAL = (32768, 16384)


class Series(NamedTuple):
    """A work's place among the same work at other lengths; `name` has T for the number."""

    name: str
    tokens: int


def series(work: str) -> Series | None:
    """The series that a work is part of, or None where its name holds no length."""
    for pattern in _TOKENS:
        found = re.search(pattern, work)
        if found:
            begin, end = found.span("tokens")
            return Series(work[:begin] + "T" + work[end:], int(found["tokens"]))
    return None


def is_sweep(work: str) -> bool:
    """Whether a work is only there to show the growth with T: of one row, and not of a usual length."""
    place = series(work)
    return place is not None and place.tokens not in USUAL and bool(_SEVERAL.search(work))


def op_of(work: str) -> str:
    """The op of a work, its name's first word."""
    return work.split()[0]


def peer(impl: str) -> str:
    """An implementation's name without its version."""
    return re.sub(r" v?\d+(\.\d+)+\S*", "", re.sub(r", [\w-]+ \d+(\.\d+)+\S*$", "", impl))


def newest(bench: str | None = None) -> list[Figure]:
    """The last figure recorded of each bench, device, work, implementation and metric, in the order recorded.

    Another version of a peer is the same peer: its older figure is superseded.
    """
    figures: dict[tuple[str, ...], Figure] = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            figure = json.loads(line)
            if bench in (None, figure["bench"]):
                keys = ("bench", "device", "work", "metric")
                figures[(*(figure[k] for k in keys), peer(figure["impl"]))] = figure
    return list(figures.values())


@dataclass(frozen=True)
class Timing:
    """What one implementation takes for one work, in ms and MiB; None where it was not measured.

    `memory_gib` is the memory of a machine in which forward and backward did not fit.
    """

    device: str
    work: str
    impl: str
    forward: float | None
    both: float | None
    forward_floor: float | None
    both_floor: float | None
    peak: float | None
    memory_gib: float | None
    commit: str
    date: str

    @property
    def ours(self) -> bool:
        """Whether this is not a peer."""
        return self.impl.startswith("longscan")

    @property
    def forward_ratio(self) -> float | None:
        """The time of forward over its floor."""
        return self.forward / self.forward_floor if self.forward and self.forward_floor else None

    @property
    def both_ratio(self) -> float | None:
        """The time of forward and backward over its floor."""
        return self.both / self.both_floor if self.both and self.both_floor else None


def timings() -> list[Timing]:
    """The newest times, by device, work and implementation: ours before its peers, fast ones first."""
    found: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for figure in newest("kernels"):
        place = (figure["device"], figure["work"], peer(figure["impl"]))
        found.setdefault(place, {})[figure["metric"]] = figure
    works = list(dict.fromkeys((device, work) for device, work, _ in found))
    made = [_timing(metrics) for metrics in found.values() if metrics.keys() & {"fwd", "fwd+bwd", "does not fit in"}]
    return sorted(made, key=lambda t: (works.index((t.device, t.work)), not t.ours, t.both or t.forward or 0.0))


def _timing(metrics: dict[str, Figure]) -> Timing:
    def of(metric: str, field: str = "value") -> Any:
        return metrics[metric][field] if metric in metrics else None

    last = max(metrics.values(), key=lambda figure: figure["date"])
    fits = "fwd+bwd" in metrics and metrics["fwd+bwd"]["date"] == last["date"]
    return Timing(
        device=last["device"],
        work=last["work"],
        impl=last["impl"],
        forward=of("fwd"),
        both=of("fwd+bwd"),
        forward_floor=of("fwd", "floor"),
        both_floor=of("fwd+bwd", "floor"),
        peak=of("fwd+bwd peak above inputs") or of("fwd peak above inputs"),
        memory_gib=None if fits else of("does not fit in"),
        commit=last["commit"],
        date=last["date"],
    )

"""The simulator against recorded steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...models.config import config_from_mapping, load_preset
from ..dims import ParallelDims
from .load import Load
from .machine import Cluster
from .simulate import simulate
from .work import RATIOS, Ratio

RATE_METRIC = "tokens per second"
# What a benchmark records steps with `run.cuda_graphs` as.
GRAPHED = "longscan, CUDA graphs"
_AXES = ("data", "context", "tensor", "pipeline", "zero", "sequence_parallel")
_WORK = re.compile(
    r"(?P<preset>\S+) (?P<batches>\d+) x (?P<rows>\d+) x (?P<tokens>\d+) tokens (?P<checkpointing>\w+) (?P<axes>\S+=.*)"
)


def work_name(preset: str, load: Load) -> str:
    """What a benchmark records as its work, so that `errors` can simulate it: `load_named` is the inverse."""
    axes = " ".join(f"{axis}={int(getattr(load.dims, axis))}" for axis in _AXES)
    return f"{preset} {load.micro_batches} x {load.micro_rows} x {load.seq_len} tokens {load.checkpointing} {axes}"


def load_named(work: str, vocabulary: int = 32000) -> Load | None:
    """The load that a recorded work names; None for works of another form."""
    found = _WORK.fullmatch(work)
    if found is None:
        return None
    model = config_from_mapping({**load_preset(found["preset"]), "vocab_size": vocabulary})
    sizes: dict[str, Any] = {axis: int(size) for axis, size in (part.split("=") for part in found["axes"].split())}
    batches, rows, tokens = (int(found[key]) for key in ("batches", "rows", "tokens"))
    return Load(model, ParallelDims(**sizes), tokens, rows, batches, checkpointing=found["checkpointing"])


def errors(
    rows: Iterable[Mapping[str, Any]], cluster: Cluster, ratios: Mapping[str, Ratio] = RATIOS
) -> dict[str, tuple[float, float]]:
    """By work, (measured, simulated) tokens a second of the recorded steps among `rows`, the newest of each.

    A recorded step has `work_name` as its work, "longscan" as its impl and "tokens per second" as its metric. With CUDA
    graphs, where those were recorded: the simulator knows no host that is slower than its GPU.
    """
    rates: dict[str, dict[str, float]] = {"longscan": {}, GRAPHED: {}}
    for row in rows:
        if row["metric"] == RATE_METRIC and row["impl"] in rates:
            rates[row["impl"]][row["work"]] = row["value"]
    found = {}
    for work, measured in (rates["longscan"] | rates[GRAPHED]).items():
        if (load := load_named(work)) is not None:
            found[work] = (measured, simulate(load, cluster, ratios).rate)
    return found

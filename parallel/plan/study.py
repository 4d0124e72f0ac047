"""What more GPUs bring: the best layout of each count, and where they stop helping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from ...errors import ConfigError
from ...models.block import ACTIVATION_CHECKPOINTS
from ..dims import ParallelDims
from .load import Load
from .machine import Cluster
from .memory import memory
from .simulate import Step, carry_seconds, simulate
from .work import RATIOS, Ratio, state_elements

# A doubling of the GPUs that brings less is where scaling stops.
WORTH = 1.5


@dataclass(frozen=True)
class Carry:
    """What a row's carries cost over `ranks` ranks each way: bytes a rank receives, seconds flat and by node."""

    ranks: int
    bytes: int
    flat: float
    by_node: float


def _carry(load: Load, cluster: Cluster, ranks: int) -> Carry:
    dims = ParallelDims(context=ranks)
    alone = replace(load, dims=dims, micro_rows=1)
    states = [4 * sum(state_elements(alone, load.model.mixer_config(name))) for name in load.model.mixers]
    flat, by_node = (
        sum(carry_seconds(dims, cluster, each, folded) for each in states if each) for folded in (False, True)
    )
    return Carry(ranks, (ranks - 1) * sum(states), flat, by_node)


@dataclass(frozen=True)
class Study:
    """What more GPUs bring: the best layout of each count, by row length.

    Attributes:
        steps: by row length, the best step of each count of GPUs that has one.
        cluster: the machine.
        batch: tokens of a step.
    """

    cluster: Cluster
    batch: int
    steps: dict[int, list[Step]] = field(default_factory=dict)

    def scaling(self, length: int) -> list[float]:
        """Speed of each count over its share of the first count's."""
        first, *_ = steps = self.steps[length]
        base = first.rate / first.load.dims.world_size
        return [step.rate / step.load.dims.world_size / base for step in steps]

    def carries(self) -> list[Carry]:
        """What the carries of one row cost over ever more context ranks, without tensor ranks; none without carries."""
        loads = [step.load for steps in self.steps.values() for step in steps]
        ranks = [2**power for power in range(1, max((load.dims.world_size for load in loads), default=1).bit_length())]
        return [found for count in ranks if (found := _carry(loads[0], self.cluster, count)).bytes]

    def limit(self, length: int) -> tuple[int, str] | None:
        """The last count of GPUs whose doubling brings WORTH, and the term that then costs most; None if none does."""
        for step, doubled in zip(self.steps[length], self.steps[length][1:], strict=False):
            if doubled.rate < WORTH * step.rate:
                return step.load.dims.world_size, doubled.overhead
        return None


def study(
    load: Load,
    cluster: Cluster,
    batch: int,
    counts: Sequence[int],
    lengths: Sequence[int],
    ratios: Mapping[str, Ratio] = RATIOS,
    overlap: float = 0.0,
) -> Study:
    """The best of the layouts that fit, for each count of GPUs and row length, at `batch` tokens a step or one row."""
    found = Study(cluster, batch)
    for length in lengths:
        rows = max(1, batch // length)
        steps = (
            min(
                (simulate(other, cluster, ratios, overlap) for other in layouts(load, cluster, count, length, rows)),
                key=lambda step: step.seconds,
                default=None,
            )
            for count in counts
        )
        found.steps[length] = [step for step in steps if step is not None]
    return found


def layouts(load: Load, cluster: Cluster, gpus: int, length: int, rows: int) -> Iterator[Load]:
    """Loads of `gpus` ranks that fit: sizes in powers of two, tensor ranks inside a node, one row a micro-batch.

    Of each layout the least checkpointing that fits, which is the fastest.
    """
    powers = [2**power for power in range(gpus.bit_length())]
    divided = [size for size in powers if size <= cluster.node and _runs(ParallelDims(tensor=size), load)]
    staged = [size for size in powers if size <= load.model.layers]
    for tensor, pipeline, context in product(divided, staged, powers):
        data, rest = divmod(gpus, tensor * pipeline * context)
        if rest or not 1 <= data <= rows or length % (context * tensor):
            continue
        dims = replace(load.dims, data=data, context=context, tensor=tensor, pipeline=pipeline)
        dims = replace(dims, sequence_parallel=tensor > 1, interleave=1, stage_layers=())
        batches = math.ceil(rows / data)
        for checkpointing in ACTIVATION_CHECKPOINTS:
            other = replace(load, dims=dims, seq_len=length, micro_rows=1, micro_batches=batches)
            other = replace(other, checkpointing=checkpointing)
            if fits(other, cluster):
                yield other
                break


def fits(load: Load, cluster: Cluster) -> bool:
    """Whether every stage has room."""
    return all(memory(load, stage).total <= cluster.gpu.usable for stage in {0, load.dims.pipeline - 1})


def _runs(dims: ParallelDims, load: Load) -> bool:
    try:
        dims.validate(model=load.model)
    except ConfigError:
        return False
    return True

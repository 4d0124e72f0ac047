"""A layout on paper: which rank holds what, how many bytes that takes, whether a GPU has them, and what would help."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from ...errors import ConfigError
from ...models.block import ACTIVATION_CHECKPOINTS
from .activations import kept_by_block
from .load import Load
from .machine import Cluster
from .memory import Memory, memory
from .simulate import simulate
from .work import halo_elements, state_elements

# How many remedies are told, of how many changes at most, and over how many times the GPUs.
REMEDIES, CHANGES, MORE_GPUS = 3, 3, (1, 2, 4, 8)


@dataclass(frozen=True)
class Place:
    """A rank's coordinates; tensor ranks lie next to each other, then context, pipeline and data ranks."""

    rank: int
    data: int
    pipeline: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Remedy:
    """A layout that fits, what it changes, and the tokens a second it is simulated to train."""

    load: Load
    changes: tuple[str, ...]
    total: int
    rate: float | None


@dataclass(frozen=True)
class Plan:
    """What `load` takes on the GPUs of `cluster`."""

    load: Load
    cluster: Cluster

    @property
    def stages(self) -> list[Memory]:
        """What a rank of each pipeline stage holds."""
        return [memory(self.load, stage) for stage in range(self.load.dims.pipeline)]

    @property
    def largest(self) -> int:
        """Bytes of the rank that holds most."""
        return max(held.total for held in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every rank's bytes are there, the reserve kept free."""
        return self.largest <= self.cluster.gpu.usable

    def places(self) -> list[Place]:
        """Every rank's coordinates."""
        dims = self.load.dims
        sizes = (dims.tensor, dims.context, dims.pipeline)
        found = []
        for rank in range(dims.world_size):
            rest, axes = rank, []
            for size in sizes:
                rest, coordinate = divmod(rest, size)
                axes.append(coordinate)
            tensor, context, pipeline = axes
            found.append(Place(rank, rest, pipeline, context, tensor))
        return found

    def layers(self, stage: int) -> list[range]:
        """The runs of blocks that a pipeline rank holds."""
        return self.load.dims.chunks(self.load.model.layers)[stage :: self.load.dims.pipeline]

    def block_bytes_per_token(self) -> dict[str, dict[str, float]]:
        """By mixer, then by checkpointing, what a block keeps of a token of this rank."""
        loads = {mode: replace(self.load, checkpointing=mode) for mode in ACTIVATION_CHECKPOINTS}
        names = dict.fromkeys(self.load.model.mixers)
        return {name: {mode: kept_by_block(load, name) / load.tokens for mode, load in loads.items()} for name in names}

    def exchanged(self) -> dict[str, dict[str, int]]:
        """By mixer, the bytes a rank gives away each way for a micro-batch: of its carry, and of its halos."""
        found = {}
        for name in dict.fromkeys(self.load.model.mixers):
            options = self.load.model.mixer_config(name)
            halos = sum(entries * elements for entries, elements in halo_elements(self.load, options))
            found[name] = {
                "carry": 4 * self.load.micro_rows * sum(state_elements(self.load, options)),
                "halo": self.load.element * self.load.micro_rows * halos,
            }
        return found if self.load.dims.context > 1 else {}

    def remedies(self) -> list[Remedy]:
        """Layouts that fit: on the fewest GPUs, by the fewest changes, then the fastest; none where this one fits."""
        for more in () if self.fits else MORE_GPUS:
            for count in range(1, CHANGES + 1):
                found = list(self._changed(more, count))
                if found:
                    return sorted(found, key=lambda remedy: -(remedy.rate or 1 / remedy.total))[:REMEDIES]
        return []

    def _changed(self, more: int, count: int) -> Iterator[Remedy]:
        """The layouts of `more` times the GPUs that `count` changes lead to, that keep every rule and fit."""
        gpus = more * self.load.dims.world_size
        extra = (f"{gpus} GPUs",) if more > 1 else ()
        for chosen in combinations(list(_changes(self.load)), count):
            if len({key for key, _ in chosen}) < count:
                continue
            load = _apply(self.load, dict(chosen), gpus)
            if load is None:
                continue
            plan = Plan(load, self.cluster)
            if plan.fits:
                rate = simulate(load, self.cluster).rate if load.precision == "bf16" else None
                told = (f"{key}={str(value).lower()}" for key, value in chosen)
                yield Remedy(load, (*told, *extra), plan.largest, rate)


def _changes(load: Load) -> Iterator[tuple[str, int | str | bool]]:
    """Single changes that save memory, by configuration key."""
    dims = load.dims
    kept = ACTIVATION_CHECKPOINTS.index(load.checkpointing)
    for mode in ACTIVATION_CHECKPOINTS[kept + 1 :]:
        yield "run.activation_checkpoint", mode
    if load.micro_rows > 1:
        yield "batch.micro_rows", load.micro_rows // 2
    for stage in range(dims.zero + 1, 4):
        yield "parallel.zero", stage
    for axis in ("context", "tensor", "pipeline"):
        for factor in (2, 4, 8):
            yield f"parallel.{axis}", factor * getattr(dims, axis)
    if dims.tensor > 1 and not dims.sequence_parallel:
        yield "parallel.sequence_parallel", True
    if not dims.offload_optimizer:
        yield "parallel.offload_optimizer", True
    if load.cuda_graphs:
        yield "run.cuda_graphs", False


def _apply(load: Load, changes: dict[str, int | str | bool], gpus: int) -> Load | None:
    """`load` with the changes on so many GPUs, its rows dealt anew; None where that breaks a rule."""
    keys = {key.removeprefix("parallel."): value for key, value in changes.items() if key.startswith("parallel.")}
    dims = replace(load.dims, **keys, stage_layers=() if "pipeline" in keys else load.dims.stage_layers)  # pyright: ignore[reportArgumentType]
    data, rest = divmod(gpus, dims.replica_size)
    rows = load.micro_batches * load.micro_rows * load.dims.data
    if rest or not 1 <= data <= rows:
        return None
    dims = replace(dims, data=data)
    try:
        dims.validate(gpus, load.model, [load.seq_len])
    except ConfigError:
        return None
    micro_rows = int(changes.get("batch.micro_rows", load.micro_rows))
    checkpointing = str(changes.get("run.activation_checkpoint", load.checkpointing))
    batches = math.ceil(rows / micro_rows / data)
    load = replace(load, dims=dims, micro_rows=micro_rows, micro_batches=batches, checkpointing=checkpointing)
    load = replace(load, cuda_graphs=bool(changes.get("run.cuda_graphs", load.cuda_graphs)))
    return None if load.cuda_graphs and not load.fits_graphs else load

"""The sizes of the parallel axes: one frozen object, checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

_AXES = ("data", "context", "tensor", "pipeline")
_AVAILABLE_STAGES = (0, 1)


@dataclass(frozen=True)
class ParallelDims:
    """How many ranks lie along each axis, and what ZeRO shards over the data axis.

    Attributes:
        data: replicas of the model; each takes its own rows of a step.
        context: ranks that share one sequence.
        tensor: ranks that share one layer.
        pipeline: ranks that share the stack of layers.
        zero: 0 replicates the optimizer state on every replica, 1 shards it over them.
        sequence_parallel: norms and residuals are split over the tensor axis.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 1
    sequence_parallel: bool = False

    @property
    def replica_size(self) -> int:
        """How many ranks hold one copy of the model."""
        return self.context * self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.data * self.replica_size

    def validate(self, world_size: int | None = None) -> None:
        """Raises ConfigError where the sizes are impossible, unavailable, or do not fill `world_size` ranks."""
        for axis in _AXES:
            size = getattr(self, axis)
            if size < 1:
                raise ConfigError(f"parallel.{axis} is {size}; it counts ranks and must be at least 1")
            if axis != "data" and size > 1:
                raise ConfigError(
                    f"parallel.{axis} is {size}, but this version shards over data only; set parallel.{axis}=1"
                )
        if self.zero not in _AVAILABLE_STAGES:
            known = " or ".join(map(str, _AVAILABLE_STAGES))
            raise ConfigError(f"parallel.zero is {self.zero}; this version has ZeRO stages {known}")
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError("parallel.sequence_parallel needs parallel.tensor > 1, which is 1; set it to false")
        if world_size is not None and self.world_size != world_size:
            raise ConfigError(
                f"data {self.data} x context {self.context} x tensor {self.tensor} x pipeline {self.pipeline} = "
                f"{self.world_size} ranks, but {world_size} are to be started; "
                f"set parallel.data={max(1, world_size // self.replica_size)} or start {self.world_size}"
            )

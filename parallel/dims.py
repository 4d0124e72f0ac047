"""The sizes of the parallel axes: one frozen object, checked against the model before any process starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..models.mixer_config import AttentionConfig, HeadsConfig, RGLRUConfig, ShortConvConfig

if TYPE_CHECKING:
    from ..models import ModelConfig
    from ..models.mixer_config import MixerConfig

_AXES = ("data", "context", "tensor", "pipeline")
_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class ParallelDims:
    """How many ranks lie along each axis, and what ZeRO shards over data x context.

    Attributes:
        data: replicas of the model; each takes its own rows of a step.
        context: ranks that share one sequence.
        tensor: ranks that share one layer.
        pipeline: ranks that share the stack of layers, consecutive layers on each.
        zero: 0 replicates the optimizer state over data x context, 1 shards it, 2 gradients too, 3 parameters too.
        sequence_parallel: norms and residuals are split over the tensor axis.
        copy_engines: tensor ranks, of one node, exchange rows by their GPUs' copy engines instead of collectives.
        interleave: how many separate runs of layers, chunks, each pipeline rank holds: a smaller bubble, more messages.
        stage_layers: the number of layers of each chunk in the order a row passes them; empty: `chunks` deals them.
        offload_optimizer: masters and moments lie in host memory, and the update is computed there.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    copy_engines: bool = False
    interleave: int = 1
    stage_layers: tuple[int, ...] = ()
    offload_optimizer: bool = False

    @property
    def replica_size(self) -> int:
        """How many ranks hold one copy of the model."""
        return self.context * self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.data * self.replica_size

    def chunks(self, layers: int) -> list[range]:
        """Returns the layers of each chunk in the order a row passes them; chunk i lies on rank i % pipeline.

        What does not divide goes to inner chunks first, then to the first: the last one has the loss to compute.
        """
        count = self.pipeline * self.interleave
        even, rest = divmod(layers, count)
        favoured = [*range(1, count - 1), 0][:rest]
        sizes = self.stage_layers or [even + (chunk in favoured) for chunk in range(count)]
        ends = list(itertools.accumulate(sizes, initial=0))
        return [range(begin, end) for begin, end in itertools.pairwise(ends)]

    def validate(
        self, world_size: int | None = None, model: ModelConfig | None = None, seq_lens: Sequence[int] = ()
    ) -> None:
        """Raises ConfigError where the sizes are impossible or unavailable, with the nearest layout that is not.

        Args:
            world_size: how many ranks are to be started.
            model: the model, whose layers `tensor` must divide; its vocabulary may be unknown yet (0).
            seq_lens: the row lengths of the run, which `context` must divide.
        """
        for axis in _AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(f"parallel.{axis} is {getattr(self, axis)}; it counts ranks and must be at least 1")
        self._check_features()
        problem = next(_problems(self, model, seq_lens), None)
        if problem:
            raise ConfigError(f"{problem}; {_remedy(self, world_size, model, seq_lens)}")
        if world_size is not None and self.world_size != world_size:
            raise ConfigError(
                f"data {self.data} x context {self.context} x tensor {self.tensor} x pipeline {self.pipeline} = "
                f"{self.world_size} ranks, but {world_size} are to be started; "
                f"set parallel.data={max(1, world_size // self.replica_size)} or start {self.world_size}"
            )

    def _check_features(self) -> None:
        """Raises ConfigError for what no size of an axis would mend."""
        if self.zero not in _STAGES:
            raise ConfigError(f"parallel.zero is {self.zero}; choose a stage of {', '.join(map(str, _STAGES))}")
        if self.pipeline > 1 and self.zero > 1:
            raise ConfigError(
                f"parallel.zero is {self.zero} with parallel.pipeline {self.pipeline}, which accumulates whole "
                "gradients; set parallel.zero=1 or parallel.pipeline=1"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ConfigError("parallel.offload_optimizer needs parallel.zero >= 1, which is 0; set parallel.zero=1")
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError("parallel.sequence_parallel needs parallel.tensor > 1, which is 1; set it to false")
        if self.copy_engines and not self.sequence_parallel:
            raise ConfigError(
                "parallel.copy_engines needs parallel.sequence_parallel, which is false: without it rows are summed, "
                "not copied; set parallel.sequence_parallel=true"
            )
        self._check_chunks()

    def _check_chunks(self) -> None:
        chunks = self.pipeline * self.interleave
        if self.interleave < 1:
            raise ConfigError(f"parallel.interleave is {self.interleave}; it counts chunks and must be at least 1")
        if self.interleave > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.interleave is {self.interleave} with parallel.pipeline 1, which has nothing to interleave; "
                "set parallel.interleave=1"
            )
        if self.stage_layers and (len(self.stage_layers) != chunks or min(self.stage_layers) < 1):
            raise ConfigError(
                f"parallel.stage_layers is {list(self.stage_layers)}; it must be {chunks} numbers above 0, one a chunk "
                f"(parallel.pipeline {self.pipeline} x parallel.interleave {self.interleave}), or []"
            )


def _problems(dims: ParallelDims, model: ModelConfig | None, seq_lens: Sequence[int]) -> Iterator[str]:
    """The divisibility rules that do not hold, each with its values."""
    for seq_len in seq_lens:
        piece, rest = divmod(seq_len, dims.context)
        if rest:
            yield f"parallel.context={dims.context} does not divide the row length {seq_len}"
        elif dims.sequence_parallel and piece % dims.tensor:
            yield (
                f"parallel.sequence_parallel: parallel.tensor={dims.tensor} does not divide the {piece} tokens of a "
                f"piece (row length {seq_len} / parallel.context {dims.context})"
            )
    if model is not None and dims.stage_layers and sum(dims.stage_layers) != model.layers:
        yield f"parallel.stage_layers is {list(dims.stage_layers)}, {sum(dims.stage_layers)} of {model.layers} layers"
    elif model is not None and dims.pipeline * dims.interleave > model.layers:
        yield (
            f"parallel.pipeline={dims.pipeline} x parallel.interleave={dims.interleave} leaves a chunk without any of "
            f"{model.layers} layers"
        )
    if model is not None and dims.tensor > 1:
        yield from _tensor_problems(dims.tensor, model)


def _tensor_problems(tensor: int, model: ModelConfig) -> Iterator[str]:
    width, name = model.width, f"parallel.tensor={tensor}"
    sizes = {"model.mlp.hidden": model.mlp.hidden_size(width)}
    for mixer in dict.fromkeys(model.mixers):
        for key, size in _divided_sizes(model.mixer_config(mixer), width):
            sizes[f"model.{mixer}.{key}"] = size
    for key, size in sizes.items():
        # Key and value heads fewer than ranks are held whole, each rank reading the one its queries share.
        shared = key.endswith("kv_heads") and tensor % size == 0
        if size % tensor and not shared:
            yield f"{name} does not divide {key}={size}"
    if 0 < model.vocab_size <= (tensor - 1) * -(-model.vocab_size // tensor):
        yield f"{name} leaves a rank no row of a vocabulary of {model.vocab_size}"


def _divided_sizes(options: MixerConfig, width: int) -> Iterator[tuple[str, int]]:
    """The sizes of a mixer that are dealt to tensor ranks."""
    if isinstance(options, RGLRUConfig):
        yield "gate_blocks", options.gate_blocks
    if isinstance(options, ShortConvConfig):
        yield "width", options.channels(width)
    if isinstance(options, HeadsConfig):
        yield "heads", options.query_heads(width)
    if isinstance(options, AttentionConfig):
        yield "kv_heads", options.key_heads(width)


def _remedy(dims: ParallelDims, world_size: int | None, model: ModelConfig | None, seq_lens: Sequence[int]) -> str:
    """The layout nearest to `dims`, of as many ranks where that is known, that keeps every rule."""
    measured = (*_AXES, "interleave")
    found = min(
        (other for other in _layouts(dims, world_size) if not any(_problems(other, model, seq_lens))),
        key=lambda other: sum(abs(math.log(getattr(other, axis) / getattr(dims, axis))) for axis in measured),
    )
    axes = [axis for axis in measured if axis in _AXES[:3] or getattr(dims, axis) > 1]
    return f"the nearest layout that works is {', '.join(f'parallel.{a}={getattr(found, a)}' for a in axes)}"


def _layouts(dims: ParallelDims, world_size: int | None) -> Iterator[ParallelDims]:
    """Layouts of at most the size of `dims` along its axes; 1 x 1 x 1, which breaks no rule, is among them."""
    axes = (dims.context, dims.tensor, dims.pipeline, dims.interleave)
    for context, tensor, pipeline, interleave in itertools.product(*(range(1, size + 1) for size in axes)):
        size = context * tensor * pipeline
        data, rest = divmod(world_size or dims.data * size, size)
        if data and not rest and (pipeline > 1 or interleave == 1):
            sizes = {"data": data, "context": context, "tensor": tensor, "pipeline": pipeline, "interleave": interleave}
            sequence_parallel = dims.sequence_parallel and tensor > 1
            yield replace(dims, **sizes, sequence_parallel=sequence_parallel, stage_layers=())

"""What a rank builds of the model, and the backend that its layers come from."""

from __future__ import annotations

from typing import Any

from ..models import Backend, LanguageModel, LocalBackend, ModelConfig, Part
from .dims import ParallelDims
from .groups import layout_groups, megatron


def make_model(config: ModelConfig, dims: ParallelDims, **options: Any) -> LanguageModel:
    """Returns what this rank holds of the model, without values, inside the process group; collective.

    Args:
        config: the whole model.
        dims: the layout.
        options: LanguageModel's other arguments.
    """
    return LanguageModel(config, make_backend(config, dims), part=_part(config, dims), **options)


def _part(config: ModelConfig, dims: ParallelDims) -> Part | None:
    """The layers of this rank's chunks, and the ends of the model that are theirs; None for all."""
    group = layout_groups(dims).pipeline
    if group is None:
        return None
    chunks = dims.chunks(config.layers)[group.rank() :: dims.pipeline]
    layers = frozenset(layer for chunk in chunks for layer in chunk)
    return Part(layers, first=0 in layers, last=config.layers - 1 in layers)


def make_backend(config: ModelConfig, dims: ParallelDims) -> Backend:
    """Returns what `LanguageModel(config, backend)` takes its layers from, inside the process group; collective."""
    if dims.tensor == 1:
        return LocalBackend()
    megatron()
    from .tensor import MegatronBackend

    return MegatronBackend(config, dims)

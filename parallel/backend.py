"""The backend that a layout's model is built from."""

from __future__ import annotations

from ..models import Backend, LocalBackend, ModelConfig
from .dims import ParallelDims
from .groups import megatron


def make_backend(config: ModelConfig, dims: ParallelDims) -> Backend:
    """Returns what `LanguageModel(config, backend)` takes its layers from, inside the process group; collective."""
    if dims.tensor == 1:
        return LocalBackend()
    megatron()
    from .tensor import MegatronBackend

    return MegatronBackend(config, dims)

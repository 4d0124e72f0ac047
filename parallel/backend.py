"""What a rank builds of the model, and the backend that its layers come from."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..models import Backend, LanguageModel, LocalBackend, ModelConfig, Part
from ..models.block import Block
from .dims import ParallelDims
from .groups import layout_groups, megatron

# Of the function that all blocks share: one for each kind of block, row length, number of rows and mode.
MOST_GRAPHS = 64


def make_model(
    config: ModelConfig,
    dims: ParallelDims,
    compile: bool = False,
    kind: type[LanguageModel] = LanguageModel,
    **options: Any,
) -> LanguageModel:
    """Returns what this rank holds of the model, without values, inside the process group; collective.

    Args:
        config: the whole model.
        dims: the layout.
        compile: whether torch.compile makes the blocks' kernels, at their first calls; names stay as they are.
        kind: the class to build.
        options: LanguageModel's other arguments.
    """
    assert not (compile and dims.zero == 3), "ZeRO 3's hooks change the shapes that a graph was compiled for"
    model = kind(config, make_backend(config, dims), part=_part(config, dims), **options)
    if compile:
        _compile_blocks(model, dims)
    return model


def _compile_blocks(model: LanguageModel, dims: ParallelDims) -> None:
    """Sets the blocks to be compiled in place, each as one or some of its layers."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # Tables that the kernels' references keep; in a graph they are computed anew.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    for block in filter(None, model.blocks):
        for module in _compiled_modules(block, dims):
            module.compile(dynamic=False)


def _compiled_modules(block: Block, dims: ParallelDims) -> list[nn.Module]:
    """The block, or what of it neither exchanges with context ranks nor is called by what computes it again.

    Inside a checkpoint, so that what is computed again is the compiled code; and never an MLP in tiles, which calls no
    module.
    """
    if block.activation_checkpoint == "none":
        return [block] if dims.context == 1 else [block.mixer_norm, block.mlp_norm, block.mlp]
    return [block.mixer_norm, block.mixer] if dims.context == 1 else [block.mixer_norm]


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

"""Pipeline parallelism: each rank holds some of the layers, and Megatron's schedules say who computes what when.

One chunk of consecutive layers a rank runs by 1F1B, several by the interleaved schedule. Between chunks go hidden
states in the model's dtype, one way, and their gradients, the other: of this rank's piece of the rows, and of its
share of the piece with sequence_parallel. Every rank of a replica has the batch, so documents travel nowhere. What a
chunk sent is kept until its backward pass. A chunk may have a part of the loss of its own: it stays with its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor, nn

from ..data.batch import IGNORED_LABEL, Batch
from ..models import ModelConfig
from .dims import ParallelDims
from .megatron_cpu import serve_cpu

# The batch, layers and the hidden states they read (None: they read tokens), to hidden states, to these and a part of
# the summed loss, or to the summed loss.
Run = Callable[[Batch, range, Tensor | None], Tensor | tuple[Tensor, Tensor]]


class Pipeline:
    """Runs this rank's chunks over micro-batches, in step with the other ranks of `group`.

    Args:
        run: computes one chunk.
        config: the whole model's.
        dims: the layout; Megatron's groups stand.
        group: the pipeline ranks, in the order of their layers.
    """

    def __init__(self, run: Run, config: ModelConfig, dims: ParallelDims, group: dist.ProcessGroup) -> None:
        if dist.get_backend(group) == "gloo":
            serve_cpu("pipeline_parallel.schedules", "pipeline_parallel.p2p_communication")
        self._dims = dims
        chunks = dims.chunks(config.layers)
        self._options = _schedule_options(config, dims)
        mine = chunks[group.rank() :: dims.pipeline]
        self._chunks = [_Chunk(run, layers, self._options, dims, n) for n, layers in enumerate(mine)]

    def __call__(self, pieces: list[Batch], divisor: int | None, dtype: torch.dtype) -> list[Tensor]:
        """Returns this rank's part of each micro-batch's summed loss, detached, or nothing; collective.

        It is all of it on the last rank, but where earlier chunks have parts of their own.

        Args:
            pieces: this rank's tokens of the micro-batches, all of one shape.
            divisor: adds the gradients of the losses divided by it; None takes no gradients.
            dtype: of the hidden states.
        """
        shapes = {tuple(piece.inputs.shape) for piece in pieces}
        assert len(shapes) == 1, f"the micro-batches of a pipeline have one shape, not {sorted(shapes)}"
        ((rows, tokens),) = shapes
        count = len(pieces)
        if self._dims.interleave > 1:
            pieces = pieces + [_dummy(pieces[0])] * (self._dims.pipeline - count)
        self._options.pipeline_dtype = dtype
        self._options.microbatch_group_size_per_vp_stage = _group_size(len(pieces), self._dims.pipeline)
        step = partial(_step, divisor or 1)
        batches = [iter(pieces) for _ in self._chunks]
        schedule = forward_backward_pipelining_with_interleaving
        if self._dims.interleave == 1:
            schedule = forward_backward_pipelining_without_interleaving
        for chunk in self._chunks:
            chunk.losses.clear()
        schedule(
            forward_step_func=step,
            data_iterator=batches,
            model=[*self._chunks],
            num_microbatches=len(pieces),
            seq_length=tokens * self._dims.context,
            micro_batch_size=rows,
            forward_only=divisor is None,
        )
        made = [chunk.losses for chunk in self._chunks if chunk.losses]
        return [torch.stack(parts).sum() for parts in zip(*made, strict=True)][:count]


class _Chunk(nn.Module):
    """A run of layers, as the schedules see it: given hidden states of the wire's shape, then called with a batch.

    Attributes:
        losses: what of each micro-batch's summed loss was made here, detached.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, run: Run, layers: range, config: Any, dims: ParallelDims, number: int) -> None:
        super().__init__()
        self.vp_stage = number if dims.interleave > 1 else None
        self._run, self._layers, self.config = run, layers, config
        self._received: Tensor | None = None
        self.losses: list[Tensor] = []

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Takes what came over the wire, None for the first chunk."""
        (self._received,) = tensors

    def forward(self, batch: Batch, divisor: int) -> Tensor:
        """Hidden states for the wire [T, B, D], or the summed loss over `divisor`."""
        x = self._received
        # The same bytes as [B, T, D]: the wire's shape is Megatron's way of counting them.
        x = None if x is None else x.view(batch.inputs.shape[0], -1, x.shape[-1])
        y = self._run(batch, self._layers, x)
        if isinstance(y, tuple):
            y = _Beside.apply(y[0], self._noted(y[1]) / divisor)
        elif y.ndim == 0:
            return self._noted(y) / divisor
        return y.contiguous().view(-1, *y.shape[::2])

    def _noted(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.detach())
        return loss


class _Beside(torch.autograd.Function):
    """x [...], which depends on nothing, with a scalar loss behind it: a backward pass through x is one of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, Tensor]:
        return None, ctx.one


def _step(divisor: int, batches: Iterator[Batch], chunk: _Chunk) -> tuple[Tensor, Callable]:
    """Megatron's forward step: a chunk's output, and what makes of the last one's (its loss, token count, record)."""
    return chunk(next(batches), divisor), lambda loss: (loss, 0, None)


def _schedule_options(config: ModelConfig, dims: ParallelDims) -> Any:
    """What the schedules read of Megatron's configuration; each says of itself what it is."""
    options: Any = ModelParallelConfig(
        tensor_model_parallel_size=dims.tensor,
        pipeline_model_parallel_size=dims.pipeline,
        context_parallel_size=dims.context,
        virtual_pipeline_model_parallel_size=dims.interleave if dims.interleave > 1 else None,
        sequence_parallel=dims.sequence_parallel,
        pipeline_dtype=torch.float32,
        # Batched messages between two ranks would meet in the wrong order where chunks are interleaved.
        batch_p2p_comm=False,
        overlap_p2p_comm=dims.interleave > 1,
    )
    options.hidden_size = config.width
    # Keeps the schedules from dividing the loss: it is divided by the tokens of the whole step.
    options.calculate_per_token_loss = True
    options.fine_grained_activation_offloading = False
    return options


def _group_size(micro_batches: int, pipeline: int) -> int:
    """The fewest micro-batches in a row for one chunk that leave no rest too small for the interleaved schedule."""
    rests = ((size, micro_batches % size) for size in range(pipeline, micro_batches + 1))
    return next((size for size, rest in rests if rest == 0 or rest >= pipeline), pipeline)


def _dummy(piece: Batch) -> Batch:
    """A micro-batch like `piece` of which nothing counts."""
    return replace(piece, labels=torch.full_like(piece.labels, IGNORED_LABEL))

"""The engine: one global batch in, one update of the weights out, whatever the ranks and the precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch import Batch
from ..errors import ConfigError
from .context import piece_of
from .dims import ParallelDims
from .gradients import is_last_copy, tied_parameter
from .graphs import MicroBatchGraphs
from .groups import layout_groups
from .loss import LossModule
from .optimizer import KINDS, Fragment, OptimizerOptions
from .replicated import ReplicatedAdamW
from .zero import ShardedAdamW

if TYPE_CHECKING:
    from ..models import LanguageModel

PRECISIONS = ("fp32", "bf16")


class Engine:
    """Trains `model` over the ranks of the default process group.

    A step is `forward_backward` with this replica's micro-batches, at least one (a dummy if need be), a look at the
    all-reduced loss, then `update`; `discard` instead of `update` drops the step. The loss is the sum over all ranks
    of the tokens' losses divided by `global_tokens`, so how rows are dealt to ranks and micro-batches, uneven masks
    and dummies change nothing.

    With `cuda_graphs`, which needs a GPU and neither ZeRO nor a pipeline, forward and backward of a micro-batch are one
    launch (`MicroBatchGraphs`), of the same kernels.

    Attributes:
        model: the module itself, its parameters in the engine's precision, usable for evaluation at any time; under
            ZeRO 3, which empties parameters between modules, only through `evaluate`.
        steps: how many updates were taken.
        skipped: how many updates were refused because the gradient norm was not finite.
    """

    def __init__(
        self,
        model: LanguageModel,
        dims: ParallelDims,
        optimizer: OptimizerOptions,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        cuda_graphs: bool = False,
    ):
        assert not cuda_graphs or (dims.zero == 0 and dims.pipeline == 1), f"{dims} takes no CUDA graphs"
        dims.validate(dist.get_world_size() if dist.is_initialized() else 1)
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
        self.dims = dims
        self.precision = precision
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.skipped = 0
        self.shapes = model.logical_shapes()
        groups = layout_groups(dims)
        self._groups = groups
        self._loss = LossModule(self.model, groups.context)
        make = partial(ShardedAdamW, dims=dims) if dims.zero else ReplicatedAdamW
        self._optimizer = make(self._loss, optimizer, precision, self.device, groups)
        self._pipeline = None
        if groups.pipeline is not None:
            from .pipeline import Pipeline

            self._pipeline = Pipeline(self._optimizer.loss, model.config, dims, groups.pipeline)
        self._graphs = None
        if cuda_graphs:
            self._graphs = MicroBatchGraphs(partial(_learn, self._optimizer), self.model, self.device)
        self._micro_batches = 0

    def forward_backward(self, batches: Iterable[Batch], global_tokens: int) -> Tensor:
        """Adds the gradients of this replica's micro-batches and returns their summed loss, fp64, on the device.

        Args:
            batches: the replica's micro-batches of the step, whole rows, the same on each of its ranks.
            global_tokens: valid labels of the whole step, over all ranks.
        """
        assert global_tokens > 0, f"a step of {global_tokens} valid tokens"
        self.model.train()
        return self._losses(batches, global_tokens)

    def update(self, rate: float) -> float:
        """Takes the update and returns the global gradient norm before clipping.

        Where the norm is not finite nothing changes, on every rank alike, `skipped` grows and inf or NaN comes back.
        """
        assert self._micro_batches, "an update without a micro-batch; give each rank at least a dummy"
        self._micro_batches = 0
        norm = self._optimizer.step(rate)
        # The optimizer's count of steps lies on the device: to read it the host would wait for the update.
        self.skipped += not math.isfinite(norm)
        return norm

    def discard(self) -> None:
        """Drops the gradients of this step; every rank does so or none."""
        self._micro_batches = 0
        self._optimizer.discard()

    def rehearse(self, batches: Iterable[Batch]) -> None:
        """Does what `forward_backward` does with these micro-batches, but as no graph, and drops what came of it.

        Every rank does so or none. Nothing is left of it but what the libraries keep ready from then on.
        """
        graphs, self._graphs = self._graphs, None
        if graphs is not None:
            graphs.drop()  # They keep memory that this may need.
        self.forward_backward(batches, 1)
        self._graphs = graphs
        self.discard()

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """Returns the summed loss of this replica's batches, fp64, on the device; no gradient, evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            total = self._losses(batches, None)
        self.model.train()
        return total

    def sum(self, *values: float | Tensor) -> list[float]:
        """Returns each value summed over the replicas, in fp64, the same bits on every rank.

        The ranks of a replica give the same value; where they do not (a request that reached one of them), their mean
        counts.
        """
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(stacked)
        return (stacked / self.dims.replica_size).tolist()

    @property
    def steps(self) -> int:
        """How many updates were taken."""
        return self._optimizer.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._optimizer.steps = count

    def fragments(self, copies: bool = True) -> list[Fragment]:
        """Returns the parts of every logical tensor that this rank holds, as live fp32 memory.

        Without `copies` those of a tied embedding are left out on the last pipeline rank: the first one's are as good.
        """
        found = self._optimizer.fragments()
        tied = tied_parameter(self.model, self._groups)
        if copies or tied is None or not is_last_copy(self._groups):
            return found
        return [fragment for fragment in found if not fragment.name.endswith("/embedding.weight")]

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every logical tensor, whoever owns it."""
        return {f"{kind}/{name}": shape for kind in KINDS for name, shape in self.shapes.items()}

    def publish(self) -> None:
        """Makes the parameters follow from the fp32 weights, after those were written from outside; collective."""
        self._optimizer.publish()

    def close(self) -> None:
        """Lets go of the process group's collectives; the model keeps its weights and can be given to a new engine."""
        if self._graphs is not None:
            self._graphs.drop()
        self._optimizer.close()

    def _piece(self, batch: Batch) -> Batch:
        """This rank's tokens of the rows."""
        context = self._groups.context
        return batch if context is None else piece_of(batch, context.rank(), context.size())

    def _losses(self, batches: Iterable[Batch], divisor: int | None) -> Tensor:
        """The summed loss of this replica's micro-batches; adds the gradients of it over `divisor`, if one is given."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        losses = self._one_by_one if self._pipeline is None else self._through_pipeline
        for loss in losses(batches, divisor):
            total += loss
            self._micro_batches += divisor is not None
        for group in (self._groups.context, self._groups.pipeline):
            if group is not None:
                dist.all_reduce(total, group=group)
        return total

    def _one_by_one(self, batches: Iterable[Batch], divisor: int | None) -> Iterator[Tensor]:
        for batch in batches:
            piece = self._piece(batch)
            if divisor is None:
                yield self._optimizer.loss(self._to_device(piece))
            elif self._graphs is None:
                yield _learn(self._optimizer, self._to_device(piece), divisor)
            else:
                yield self._graphs(piece, len(batch.cu_seqlens) == len(batch.continues) + 1, divisor)

    def _through_pipeline(self, batches: Iterable[Batch], divisor: int | None) -> list[Tensor]:
        """Each loss on the last rank, zeros on the others."""
        assert self._pipeline is not None
        pieces = [self._to_device(self._piece(batch)) for batch in batches]
        losses = self._pipeline(pieces, divisor, next(self.model.parameters()).dtype) if pieces else []
        return losses or [torch.zeros((), device=self.device)] * len(pieces)

    def _to_device(self, batch: Batch) -> Batch:
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return replace(
            batch, **{k: v.to(self.device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)}
        )


def _learn(optimizer: ReplicatedAdamW | ShardedAdamW, piece: Batch, divisor: int | Tensor) -> Tensor:
    """Adds the gradients of the piece's loss over `divisor`; returns the loss, of which nothing else is left."""
    loss = optimizer.loss(piece)
    optimizer.backward(loss / divisor)
    return loss.detach()

"""The engine: one global batch in, one update of the weights out, whatever the ranks and the precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch import Batch
from ..errors import ConfigError
from .context import piece_of
from .dims import ParallelDims
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

    Attributes:
        model: the module itself, its parameters in the engine's precision, usable for evaluation at any time.
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
    ):
        dims.validate(dist.get_world_size() if dist.is_initialized() else 1)
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
        self.dims = dims
        self.precision = precision
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.skipped = 0
        self.shapes = {name: model.backend.logical(name, p).shape for name, p in model.named_parameters()}
        groups = layout_groups(dims)
        self._context = groups.context
        self._loss = LossModule(self.model, groups.context)
        make = ShardedAdamW if dims.zero else ReplicatedAdamW
        self._optimizer = make(self._loss, optimizer, precision, self.device, groups)
        self._micro_batches = 0

    def forward_backward(self, batches: Iterable[Batch], global_tokens: int) -> Tensor:
        """Adds the gradients of this replica's micro-batches and returns their summed loss, fp64, on the device.

        Args:
            batches: the replica's micro-batches of the step, whole rows, the same on each of its ranks.
            global_tokens: valid labels of the whole step, over all ranks.
        """
        assert global_tokens > 0, f"a step of {global_tokens} valid tokens"
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            loss = self._optimizer.loss(self._piece(batch))
            self._optimizer.backward(loss / global_tokens)
            total += loss.detach()
            self._micro_batches += 1
        return self._over_pieces(total)

    def update(self, rate: float) -> float:
        """Takes the update and returns the global gradient norm before clipping.

        Where the norm is not finite nothing changes, on every rank alike, `skipped` grows and inf or NaN comes back.
        """
        assert self._micro_batches, "an update without a micro-batch; give each rank at least a dummy"
        self._micro_batches = 0
        before = self._optimizer.steps
        norm = self._optimizer.step(rate)
        self.skipped += self._optimizer.steps == before
        return norm

    def discard(self) -> None:
        """Drops the gradients of this step; every rank does so or none."""
        self._micro_batches = 0
        self._optimizer.discard()

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """Returns the summed loss of this replica's batches, fp64, on the device; no gradient, evaluation mode."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        with torch.no_grad():
            for batch in batches:
                total += self._loss(self._piece(batch))
        self.model.train()
        return self._over_pieces(total)

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

    def fragments(self) -> list[Fragment]:
        """Returns the parts of every logical tensor that this rank owns, as live fp32 memory."""
        return self._optimizer.fragments()

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every logical tensor, whoever owns it."""
        return {f"{kind}/{name}": shape for kind in KINDS for name, shape in self.shapes.items()}

    def publish(self) -> None:
        """Makes the parameters follow from the fp32 weights, after those were written from outside; collective."""
        self._optimizer.publish()

    def close(self) -> None:
        """Lets go of the process group's collectives; the model keeps its weights and can be given to a new engine."""
        self._optimizer.close()

    def _piece(self, batch: Batch) -> Batch:
        """This rank's tokens of the rows, on the device."""
        if self._context is not None:
            batch = piece_of(batch, self._context.rank(), self._context.size())
        return self._to_device(batch)

    def _over_pieces(self, total: Tensor) -> Tensor:
        """The sum over the ranks that share this rank's rows."""
        if self._context is not None:
            dist.all_reduce(total, group=self._context)
        return total

    def _to_device(self, batch: Batch) -> Batch:
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return replace(
            batch, **{k: v.to(self.device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)}
        )

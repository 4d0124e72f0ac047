"""ZeRO stages 1 to 3, DeepSpeed's: each copy of a parameter keeps an even share of its master and moments.

Stage 2 shards gradients too, stage 3 the parameters themselves. All sum gradients over the copies in fp32, clip by the
global norm and refuse a norm that is not finite. The optimizer state may lie in host memory, where AdamW then runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch import Batch
from ..models.norm import wide
from .deepspeed_setup import forget_groups, wrap, zero_config
from .dims import ParallelDims
from .gradients import is_last_copy, tied_parameter
from .groups import LayoutGroups
from .loss import LossModule
from .optimizer import WEIGHT, FlatAdamW, Fragment, OptimizerOptions, make_adamw, parameter_groups
from .shards import PlainModel, shards_of

if TYPE_CHECKING:
    from ..models import LanguageModel


class ShardedAdamW(FlatAdamW):
    """Steps the model from sharded masters; a norm that is not finite is refused on every rank, without a trace."""

    def __init__(
        self,
        loss: LossModule,
        options: OptimizerOptions,
        precision: str,
        device: torch.device,
        groups: LayoutGroups,
        dims: ParallelDims,
    ):
        assert dist.is_initialized(), f"ZeRO {dims.zero} needs a process group, of one rank too: init_process_group()"
        self.model = model = loss.model
        # On the host, where a copy of the whole model in fp32 is in nobody's way.
        exact = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()} if precision == "bf16" else {}
        # Of the parameters' shapes: stage 3 empties the parameters.
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._shapes = {p: torch.empty_like(p, device="meta") for p in self._names}
        self.optimizer = make_adamw(parameter_groups(model, options), options)
        self._hooks = _describe_gradients(model, groups) if groups.model else []
        self._tied, self._ends = tied_parameter(model, groups), groups.ends
        # Stage 3 averages, whatever it is told.
        self._scale = groups.copies.size() if dims.zero == 3 and groups.copies else 1
        plain = PlainModel(loss) if dims.zero == 3 else None
        config = zero_config(dims.zero, precision, options.clip, dims.offload_optimizer, device)
        self._engine = wrap(loss, self.optimizer, config, device, groups.model)
        self._wrapper = self._engine.optimizer
        self._shards = shards_of(dims.zero, self._wrapper, model, plain)
        self.masters = self._shards.masters
        self.create_state()
        if exact:
            self._restore(exact)

    @torch.no_grad()
    def _restore(self, exact: dict[str, Tensor]) -> None:
        """Sets the masters to the weights the model came with, which DeepSpeed rounded to bf16 first."""
        for fragment in self.fragments():
            kind, _, name = fragment.name.partition("/")
            if kind == WEIGHT:
                fragment.data.copy_(exact[name].flatten().narrow(0, fragment.start, fragment.data.numel()))

    def loss(self, batch: Batch, *chunk: Any) -> Tensor:
        """Returns the summed loss of `batch`, or what `chunk` of the layers makes of it: LossModule's arguments."""
        return self._engine(batch, *chunk)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those of this step."""
        self._engine.backward(loss * self._scale)

    def step(self, rate: float) -> float:
        """Takes the update and returns the global gradient norm before clipping; not finite: nothing but it changed.

        DeepSpeed takes the norm after the gradients are summed over the copies, so every rank decides alike.
        """
        self.set_rate(rate)
        if self._tied is not None and self._tied.requires_grad:
            dist.all_reduce(self._shards.gradient(self._tied), group=self._ends)
        self._engine.step()
        norm = float(self._wrapper._global_grad_norm)
        if not math.isfinite(norm):
            # An offloaded bf16 optimizer would keep the infinities, and refuse every later step for them.
            self.discard()
        return norm

    def discard(self) -> None:
        """Drops the gradients of this step."""
        self._shards.discard()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the parameters, whole ones on all ranks."""
        self._shards.publish()

    def fragments(self) -> list[Fragment]:
        """Returns what this rank owns; padding belongs to nobody."""
        found = []
        for parameter, master, start, begin, count in self._shards.places():
            found += self.fragments_of(master, self._names[parameter], self._shapes[parameter], start, begin, count)
        return found

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the parameters, which keep their values, and forgets its groups; collective."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()
        self._shards.release()
        for parameter in self._names:
            parameter.grad = None
        forget_groups()


def _describe_gradients(model: LanguageModel, groups: LayoutGroups) -> list[Any]:
    """Tells DeepSpeed which parameters its norm counts on this rank, and sums partial gradients over tensor ranks.

    Once a micro-batch, while gradients are made: DeepSpeed gives no later chance before it shards them.
    """
    backend: Any = model.backend
    partial = backend.partial_gradients(model) if groups.tensor else set()
    first = groups.tensor is None or groups.tensor.rank() == 0
    copy = tied_parameter(model, groups) if is_last_copy(groups) else None
    hooks = []
    for name, parameter in model.named_parameters():
        divided = backend.logical(name, parameter).shape != tuple(parameter.shape)
        counted = (divided or first) and parameter is not copy
        # By Megatron's name it counts a parameter on every rank of a model, by its own on none.
        vars(parameter).update(tensor_model_parallel=counted, ds_pipe_replicated=not counted)
        if name in partial:
            hooks.append(parameter.register_hook(lambda grad: _summed(grad, groups.tensor)))
    return hooks


def _summed(grad: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = wide(grad).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(grad.dtype)

"""ZeRO stage 1, DeepSpeed's: each replica keeps one even range of every group's masters and moments.

Under fp32 DeepSpeed's ZeRO optimizer does it, under bf16 its BF16 optimizer, which accumulates gradients in fp32. Both
sum gradients over the replicas, clip by the global norm and refuse a norm that is not finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch import Batch
from ..models.norm import wide
from .deepspeed_setup import forget_groups, wrap, zero_config
from .groups import LayoutGroups
from .loss import LossModule
from .optimizer import WEIGHT, FlatAdamW, Fragment, OptimizerOptions, make_adamw, parameter_groups

if TYPE_CHECKING:
    from ..models import LanguageModel


class ShardedAdamW(FlatAdamW):
    """Steps the model from sharded masters; a norm that is not finite is refused on every rank, without a trace."""

    def __init__(
        self, loss: LossModule, options: OptimizerOptions, precision: str, device: torch.device, groups: LayoutGroups
    ):
        assert dist.is_initialized(), "ZeRO 1 needs a process group, of one rank too: init_process_group()"
        self.model = model = loss.model
        exact = {n: p.detach().clone() for n, p in model.named_parameters()} if precision == "bf16" else {}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = make_adamw(parameter_groups(model, options), options)
        self._hooks = _sum_partial_gradients(model, groups.tensor) if groups.tensor else []
        config = zero_config(1, precision, options.clip)
        self._engine = wrap(loss, self.optimizer, config, device, groups.tensor)
        self._wrapper = self._engine.optimizer
        self.masters = [group["params"][0] for group in self.optimizer.param_groups]
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

    def loss(self, batch: Batch) -> Tensor:
        """Returns the summed loss of `batch`."""
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those of this step."""
        self._engine.backward(loss)

    def step(self, rate: float) -> float:
        """Takes the update and returns the global gradient norm before clipping; not finite: nothing but it changed.

        DeepSpeed takes the norm after the gradients are summed over the replicas, so every rank decides alike.
        """
        self.set_rate(rate)
        self._engine.step()
        return float(self._wrapper._global_grad_norm)

    def discard(self) -> None:
        """Drops the gradients of this step."""
        self._wrapper.zero_grad()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the parameters and gathers them from all replicas."""
        self._wrapper.update_lp_params()

    def fragments(self) -> list[Fragment]:
        """Returns what this replica owns, from DeepSpeed's own map of each parameter into the flat master."""
        found = []
        for parameter, name in self._names.items():
            mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                continue
            master = self.masters[mapping.param_group_index]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            found += self.fragments_of(master, name, parameter, there.start, here.start, here.numel)
        return found

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the parameters, which keep their values, and forgets its groups."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()
        for parameter in self._names:
            parameter.grad = None
        forget_groups()


def _sum_partial_gradients(model: LanguageModel, group: dist.ProcessGroup) -> list[Any]:
    """Tells DeepSpeed which parameters are divided, and sums what it would take for whole gradients over tensor ranks.

    Once a micro-batch, while gradients are made: DeepSpeed gives no later chance before it shards them.
    """
    backend: Any = model.backend
    partial = backend.partial_gradients(model)
    hooks = []
    for name, parameter in model.named_parameters():
        # The name Megatron gave it; DeepSpeed's norm counts other parameters on the first tensor rank only.
        parameter.tensor_model_parallel = backend.logical(name, parameter).shape != tuple(parameter.shape)  # pyright: ignore[reportAttributeAccessIssue]
        if name in partial:
            hooks.append(parameter.register_hook(lambda grad: _summed(grad, group)))
    return hooks


def _summed(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = wide(grad).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(grad.dtype)

"""Where DeepSpeed keeps what a rank owns, stage by stage; the only place that knows its optimizers' insides."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """`count` elements of a parameter from `start`, which lie at `begin` of the flat fp32 tensor `master`."""

    parameter: nn.Parameter
    master: Tensor
    start: int
    begin: int
    count: int


class RangeShards:
    """Stages 1 and 2: an even range of each group's parameters, laid one behind the other.

    Stage 2 adds a micro-batch's gradients to the owner's as soon as they are made, where stage 1 keeps them whole.
    """

    def __init__(self, wrapper: Any, model: nn.Module) -> None:
        self._wrapper, self._model = wrapper, model
        self.masters = [group["params"][0] for group in wrapper.optimizer.param_groups]

    def places(self) -> Iterator[Place]:
        """What this rank owns, from DeepSpeed's own map of each parameter into the flat master."""
        for parameter in self._model.parameters():
            mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Place(parameter, self.masters[mapping.param_group_index], there.start, here.start, here.numel)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Stage 1's whole gradient of this step, before the sum over the copies."""
        if hasattr(self._wrapper, "get_gradient_for_reduction"):
            return self._wrapper.get_gradient_for_reduction(parameter)
        return parameter._hp_grad  # pyright: ignore[reportAttributeAccessIssue]

    def publish(self) -> None:
        """Rounds the masters into the parameters and gathers them from all copies."""
        self._wrapper.update_lp_params()

    def discard(self) -> None:
        """Drops the gradients of this step, whole or already with their owner."""
        self._wrapper.zero_grad()
        for kept in ("averaged_gradients", "all_grad_tensors"):
            getattr(self._wrapper, kept, {}).clear()
        if hasattr(self._wrapper, "micro_step_id"):
            self._wrapper.micro_step_id = -1

    def release(self) -> None:
        """Nothing: the parameters are whole."""


class ParameterShards:
    """Stage 3: an even range of every parameter; the parameters themselves are whole only while a module uses them."""

    def __init__(self, wrapper: Any, model: nn.Module, plain: PlainModel) -> None:
        self._wrapper, self._model, self._plain = wrapper, model, plain
        self.masters = wrapper.fp32_partitioned_groups_flat

    def places(self) -> Iterator[Place]:
        """What this rank owns: DeepSpeed lays a group's ranges, each padded to the same length, behind each other."""
        for master, members in zip(self.masters, self._wrapper.fp16_groups, strict=True):
            begin = 0
            for parameter in members:
                share = parameter.partition_numel()
                start = min(self._wrapper._get_param_partition_rank(parameter) * share, parameter.ds_numel)
                count = min(share, parameter.ds_numel - start)
                if count:
                    yield Place(parameter, master, start, begin, count)
                begin += share

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Never asked for: a pipeline, of which two ranks share a parameter, shards none."""
        raise NotImplementedError(f"a gradient of {tuple(parameter.shape)} that is sharded")

    def publish(self) -> None:
        """Rounds the masters into the shards, and gathers the parameters that are always whole."""
        self._wrapper._partition_all_parameters()
        for group in range(len(self.masters)):
            self._wrapper._reassign_or_swap_out_partitioned_parameters(group)
        if kept := self._wrapper.persistent_parameters:
            kept[0].all_gather(kept)

    def discard(self) -> None:
        """Drops the gradients of this step: the next micro-batch overwrites the owner's."""
        self._wrapper.zero_grad()
        self._wrapper.averaged_gradients.clear()

    def release(self) -> None:
        """Makes every parameter whole and plain again; collective."""
        for parameter in self._model.parameters():
            parameter.all_gather()  # pyright: ignore[reportAttributeAccessIssue]
        self._plain.restore()


class PlainModel:
    """What a module's and its parameters' attributes were before DeepSpeed's stage 3 added its own."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = {module: dict(vars(module)) for module in root.modules()}
        self._parameters = {parameter: dict(vars(parameter)) for parameter in root.parameters()}

    def restore(self) -> None:
        """Puts them back; the values of the parameters stay as they are now."""
        for owner, attributes in (self._modules | self._parameters).items():
            vars(owner).clear()
            vars(owner).update(attributes)
        _forget_modules()


def _forget_modules() -> None:
    """Lets go of the model, and numbers the next one's parts from 0 again, as a process that joins later does."""
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    offload.FWD_MODULE_STACK.clear()
    count: Any = offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0][0] = 0
    offload.Init.param_id = 0


def shards_of(stage: int, wrapper: Any, model: nn.Module, plain: PlainModel | None) -> RangeShards | ParameterShards:
    """Returns the view of `wrapper`, DeepSpeed's optimizer of that stage."""
    if stage < 3:
        return RangeShards(wrapper, model)
    assert plain is not None
    return ParameterShards(wrapper, model, plain)

"""ZeRO stage 0: every rank holds all masters and moments of its parameters, and copies do the same arithmetic.

Plain torch. DeepSpeed's stage 0 has neither fp32 masters nor fp32 accumulation under bf16, and takes a step with
whatever gradient norm it finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..models.norm import wide
from .gradients import Gradients
from .groups import LayoutGroups
from .loss import LossModule
from .optimizer import FlatAdamW, Fragment, OptimizerOptions, make_adamw, parameter_groups


class ReplicatedAdamW(FlatAdamW):
    """Steps the model from whole masters; a norm that is not finite is refused on every rank, without a trace."""

    def __init__(
        self, loss: LossModule, options: OptimizerOptions, precision: str, device: torch.device, ranks: LayoutGroups
    ):
        self._loss, self.model, self._clip = loss, loss.model, options.clip
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = parameter_groups(self.model, options)
        self._gradients = Gradients(self.model, ranks)
        self._members = [self._gradients.arrange(group["params"]) for group in groups]
        self.masters = [_flat_master(members) for members in self._members]
        self._grads = [torch.zeros_like(master) for master in self.masters]
        self._low_precision = precision == "bf16"
        self._hooks = self._attach()
        for group, master in zip(groups, self.masters, strict=True):
            group["params"] = [master]
        self.optimizer = make_adamw(groups, options)
        self.create_state()

    def _attach(self) -> list[Any]:
        """Lays parameters and gradients over the flat buffers; under bf16 gradients are added to them by a hook."""
        hooks = []
        for parameter, weight, grad in self._views():
            if self._low_precision:
                parameter.data = weight.to(torch.bfloat16)
                hooks.append(parameter.register_post_accumulate_grad_hook(_move_gradient(grad)))
            else:
                parameter.data = weight
                parameter.grad = grad
        return hooks

    def _views(self) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """(parameter, its fp32 weight, its fp32 gradient), the last two as views of the flat buffers."""
        for members, master, grad in zip(self._members, self.masters, self._grads, strict=True):
            begin = 0
            for parameter in members:
                count = parameter.numel()
                place = slice(begin, begin + count)
                yield parameter, master[place].view_as(parameter), grad[place].view_as(parameter)
                begin += count

    def loss(self, batch: Batch, *chunk: Any) -> Tensor:
        """Returns the summed loss of `batch`, or what `chunk` of the layers makes of it: LossModule's arguments."""
        return self._loss(batch, *chunk)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those of this step."""
        loss.backward()

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Takes the update and returns the global gradient norm before clipping; not finite: nothing but it changed."""
        self._check_gradients()
        self._gradients.sum_(self._grads)
        norm = self._gradients.norm(self._grads)
        if math.isfinite(norm):
            self._apply(rate, norm)
        self.discard()
        return norm

    def discard(self) -> None:
        """Drops the gradients of this step."""
        for grad in self._grads:
            grad.zero_()

    def _check_gradients(self) -> None:
        """Sees that nobody took away the flat buffer's views that fp32 gradients are added to."""
        if not self._low_precision:
            for parameter, _, grad in self._views():
                kept = parameter.grad is not None and parameter.grad.data_ptr() == grad.data_ptr()
                assert kept, f"the gradient of {self._names[parameter]} was replaced; leave zero_grad to the engine"

    def _apply(self, rate: float, norm: float) -> None:
        shrink = min(1.0, self._clip / (norm + 1e-6)) if self._clip > 0 else 1.0
        for master, grad in zip(self.masters, self._grads, strict=True):
            master.grad = grad if shrink == 1.0 else grad.mul_(shrink)
        self.set_rate(rate)
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the parameters; fp32 parameters are the masters."""
        if self._low_precision:
            for parameter, weight, _ in self._views():
                parameter.copy_(weight)

    def fragments(self) -> list[Fragment]:
        """Returns all this rank holds of every logical tensor: the whole of it, or its tensor rank's box."""
        found = []
        for members, master in zip(self._members, self.masters, strict=True):
            begin = 0
            for parameter in members:
                name, count = self._names[parameter], parameter.numel()
                found += self.fragments_of(master, name, parameter, 0, begin, count)
                begin += count
        return found

    def close(self) -> None:
        """Takes the hooks off the parameters, which keep their values."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._names:
            parameter.grad = None


def _flat_master(members: list[nn.Parameter]) -> Tensor:
    """fp32, and fp64 for an fp64 model."""
    return torch.cat([wide(parameter.detach()).flatten() for parameter in members])


def _move_gradient(target: Tensor):
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        target.add_(parameter.grad)
        parameter.grad = None

    return move

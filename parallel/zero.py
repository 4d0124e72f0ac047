"""Where the fp32 weights and the moments of AdamW live: on every replica (stage 0) or sharded over them (stage 1).

Both classes flatten the parameters of each group into one fp32 master, sum gradients over the replicas in fp32, clip
by the global norm and refuse a step whose norm is not finite, on every rank alike and without a trace. What a rank
holds is told as Fragments of logical tensors, so nobody outside knows how it is laid out.

Stage 0 is plain torch: DeepSpeed's has neither fp32 masters nor fp32 accumulation under bf16, and takes a step with
whatever norm it finds. Stage 1 is DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batch import Batch

from .deepspeed_setup import forget_groups, wrap, zero_config
from .loss import LossModule

if TYPE_CHECKING:
    from ..models import LanguageModel

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and gradient clipping; the rate comes with each update.

    Attributes:
        betas, eps, weight_decay: AdamW's. Weight decay is decoupled and multiplied by the rate.
        clip: the largest global gradient norm; 0 clips nothing.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + data.numel()` of a logical tensor, row-major, as they lie on this rank.

    Attributes:
        name: "weight/<parameter>", "exp_avg/<parameter>" or "exp_avg_sq/<parameter>".
        shape: the whole logical tensor's.
        start: the first element held.
        data: fp32, flat, the live memory: writing into it sets the state.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


def parameter_groups(model: LanguageModel, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Returns AdamW's groups: parameters that decay, then those that do not (`model.no_weight_decay()`)."""
    exempt = set(model.no_weight_decay())
    named = dict(model.named_parameters())
    assert exempt <= named.keys(), f"no_weight_decay() names no parameter: {sorted(exempt - named.keys())}"
    decay = [parameter for name, parameter in named.items() if name not in exempt]
    keep = [parameter for name, parameter in named.items() if name in exempt]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_adamw(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.AdamW:
    """Returns torch's AdamW over `groups`, fused on CUDA, with rate 0 until an update brings one."""
    on_cuda = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(
        groups, lr=0.0, betas=options.betas, eps=options.eps, fused=on_cuda, foreach=False if on_cuda else None
    )


class _FlatAdamW:
    """What both stages share: AdamW over one flat fp32 tensor a group, whose state exists from the start."""

    optimizer: torch.optim.AdamW
    masters: list[Tensor]

    def create_state(self) -> None:
        """Makes the moments, which torch would make at the first step, so that a fresh run can be saved and loaded."""
        for master in self.masters:
            device = master.device if self.optimizer.defaults["fused"] else "cpu"
            self.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate of every group."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def steps(self) -> int:
        """How many updates AdamW has taken; its bias correction follows from it."""
        return int(self.optimizer.state[self.masters[0]]["step"].item())

    @steps.setter
    def steps(self, count: int) -> None:
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(count)

    def _fragments_of(
        self, master: Tensor, name: str, shape: torch.Size, start: int, begin: int, count: int
    ) -> Iterator[Fragment]:
        """The weight and moments of one parameter's elements, which lie at `begin` of `master`."""
        state = self.optimizer.state[master]
        for kind, flat in ((WEIGHT, master.detach()), *((moment, state[moment]) for moment in MOMENTS)):
            yield Fragment(f"{kind}/{name}", tuple(shape), start, flat.narrow(0, begin, count))


class ReplicatedAdamW(_FlatAdamW):
    """Stage 0: every replica holds all of it and does the same arithmetic."""

    def __init__(self, model: LanguageModel, options: OptimizerOptions, precision: str, device: torch.device):
        self._loss = LossModule(model)
        self._clip = options.clip
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, options)
        self._members = [group["params"] for group in groups]
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

    def loss(self, batch: Batch) -> Tensor:
        """Returns the summed loss of `batch`."""
        return self._loss(batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those of this step."""
        loss.backward()

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Takes the update and returns the global gradient norm before clipping; not finite: nothing but it changed."""
        self._check_gradients()
        if dist.is_initialized() and dist.get_world_size() > 1:
            for grad in self._grads:
                dist.all_reduce(grad)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in self._grads])).item()
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
        """Returns every logical tensor, whole."""
        found = []
        for members, master in zip(self._members, self.masters, strict=True):
            begin = 0
            for parameter in members:
                name, count = self._names[parameter], parameter.numel()
                found += self._fragments_of(master, name, parameter.shape, 0, begin, count)
                begin += count
        return found

    def close(self) -> None:
        """Takes the hooks off the parameters, which keep their values."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._names:
            parameter.grad = None


def _flat_master(members: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in members])


def _move_gradient(target: Tensor):
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        target.add_(parameter.grad)
        parameter.grad = None

    return move


class ShardedAdamW(_FlatAdamW):
    """Stage 1, DeepSpeed's: each replica keeps one even range of every group's flat master and its moments."""

    def __init__(self, model: LanguageModel, options: OptimizerOptions, precision: str, device: torch.device):
        exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = make_adamw(parameter_groups(model, options), options)
        self._engine = wrap(LossModule(model), self.optimizer, zero_config(1, precision, options.clip), device)
        self._wrapper = self._engine.optimizer
        self.masters = [group["params"][0] for group in self.optimizer.param_groups]
        self.create_state()
        if precision == "bf16":
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
            found += self._fragments_of(master, name, parameter.shape, there.start, here.start, here.numel)
        return found

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the parameters, which keep their values, and forgets its groups."""
        self._engine.destroy()
        for parameter in self._names:
            parameter.grad = None
        forget_groups()

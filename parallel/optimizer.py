"""AdamW over flat fp32 masters, and the words for what a rank holds of it; what every ZeRO stage shares.

Parameters of a group are flattened into one fp32 master. What a rank holds is told as Fragments of logical tensors, so
nobody outside knows how it is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    """Elements `start` to `start + data.numel()`, row-major, of a box of a logical tensor, as they lie on this rank.

    Attributes:
        name: "weight/<parameter>", "exp_avg/<parameter>" or "exp_avg_sq/<parameter>".
        offsets, sizes: the box of the logical tensor that the rank's parameter is.
        start: the first element held, counted in the box.
        data: fp32, flat, the live memory: writing into it sets the state.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
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


class FlatAdamW:
    """What both stages share: AdamW over one flat fp32 tensor a group, whose state exists from the start."""

    model: LanguageModel
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

    def fragments_of(
        self, master: Tensor, name: str, parameter: Tensor, start: int, begin: int, count: int
    ) -> Iterator[Fragment]:
        """The weight and moments of `count` elements of a parameter from `start`, which lie at `begin` of `master`."""
        state, offsets = self.optimizer.state[master], self.model.backend.logical(name, parameter).offsets
        for kind, flat in ((WEIGHT, master.detach()), *((moment, state[moment]) for moment in MOMENTS)):
            held = flat.narrow(0, begin, count)
            yield Fragment(f"{kind}/{name}", offsets, tuple(parameter.shape), start, held)

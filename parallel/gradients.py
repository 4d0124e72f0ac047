"""What becomes of flat gradients before an update: their sum over the ranks, and the global norm.

A flat buffer holds a tied embedding, of which the first and the last pipeline rank have a copy each, then parameters
divided over tensor ranks, then whole ones, then whole ones of whose gradient each tensor rank has a part. So each sum
and each count is one slice.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .groups import LayoutGroups

if TYPE_CHECKING:
    from ..models import LanguageModel

_TIED, _DIVIDED, _WHOLE, _PARTIAL = range(4)


class Gradients:
    """Sums and measures the flat gradients of `model` over the ranks of `groups`."""

    def __init__(self, model: LanguageModel, groups: LayoutGroups) -> None:
        self._groups = groups
        self._kinds = _kinds(model, groups)
        self._ends: list[tuple[int, ...]] = []

    def arrange(self, members: list[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters of one more flat buffer in the order they must lie in."""
        counts = [sum(p.numel() for p in members if self._kinds[p] == kind) for kind in range(_PARTIAL)]
        self._ends.append(tuple(itertools.accumulate(counts)))
        return sorted(members, key=self._kinds.__getitem__)

    def sum_(self, grads: list[Tensor]) -> None:
        """Makes every buffer, in the order of `arrange`, the sum over the ranks, in place."""
        for grad, (tied, _, whole) in zip(grads, self._ends, strict=True):
            if self._groups.tensor is not None and whole < grad.numel():
                dist.all_reduce(grad[whole:], group=self._groups.tensor)
            if tied:
                dist.all_reduce(grad[:tied], group=self._groups.ends)
            if self._groups.copies is not None:
                dist.all_reduce(grad, group=self._groups.copies)

    def norm(self, grads: list[Tensor]) -> float:
        """Returns the norm of the summed gradients of the whole model; the same bits on every rank.

        fp64: in fp32 the sum over a million elements is off by 1e-4 on a CPU.
        """
        square = _norm([self._counted(grad, ends) for grad, ends in zip(grads, self._ends, strict=True)]).square()
        if self._groups.model is not None:
            dist.all_reduce(square, group=self._groups.model)
        return square.sqrt().item()

    def _counted(self, grad: Tensor, ends: tuple[int, ...]) -> Tensor:
        """What this rank counts of a buffer, so that each element of the model is counted once."""
        tied, divided, _ = ends
        begin = tied if is_last_copy(self._groups) else 0
        return grad[begin:] if self._groups.tensor is None or self._groups.tensor.rank() == 0 else grad[begin:divided]


def is_last_copy(groups: LayoutGroups) -> bool:
    """Whether this rank's tied embedding is the copy of another's: the last pipeline rank's."""
    return groups.ends is not None and groups.ends.rank() > 0


def tied_parameter(model: LanguageModel, groups: LayoutGroups) -> nn.Parameter | None:
    """Returns the tied embedding's weight where the ranks of `groups.ends` share it, else None."""
    tied = groups.ends is not None and model.config.tie_embeddings
    return model.get_parameter("embedding.weight") if tied else None


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]))


def _kinds(model: LanguageModel, groups: LayoutGroups) -> dict[Tensor, int]:
    """Each parameter's place in the order of a flat buffer."""
    backend: Any = model.backend
    partial = backend.partial_gradients(model) if groups.tensor else set()
    kinds: dict[Tensor, int] = {}
    for name, parameter in model.named_parameters():
        divided = groups.tensor is None or backend.logical(name, parameter).shape != tuple(parameter.shape)
        kinds[parameter] = _DIVIDED if divided else _PARTIAL if name in partial else _WHOLE
    tied = tied_parameter(model, groups)
    return kinds if tied is None else kinds | {tied: _TIED}

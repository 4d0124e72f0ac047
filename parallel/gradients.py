"""What becomes of flat gradients before an update: their sum over the ranks, and the global norm.

Under tensor parallelism a flat buffer holds divided parameters, then whole ones, then whole ones of whose gradient each
tensor rank has a part. So each sum and each count is one slice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .groups import LayoutGroups

if TYPE_CHECKING:
    from ..models import LanguageModel

_DIVIDED, _WHOLE, _PARTIAL = range(3)


class Gradients:
    """Sums and measures the flat gradients of `model` over the ranks of `groups`."""

    def __init__(self, model: LanguageModel, groups: LayoutGroups) -> None:
        self._groups = groups
        self._kinds = _kinds(model) if groups.tensor else {}
        self._ends: list[tuple[int, int]] = []

    def arrange(self, members: list[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters of one more flat buffer in the order they must lie in."""
        arranged = sorted(members, key=lambda parameter: self._kinds.get(parameter, _DIVIDED))
        counts = [sum(p.numel() for p in members if self._kinds.get(p, _DIVIDED) == kind) for kind in range(2)]
        self._ends.append((counts[_DIVIDED], counts[_DIVIDED] + counts[_WHOLE]))
        return arranged

    def sum_(self, grads: list[Tensor]) -> None:
        """Makes every buffer, in the order of `arrange`, the sum over the ranks, in place."""
        for grad, (_, partial) in zip(grads, self._ends, strict=True):
            if self._groups.tensor is not None and partial < grad.numel():
                dist.all_reduce(grad[partial:], group=self._groups.tensor)
            if self._groups.copies is not None:
                dist.all_reduce(grad, group=self._groups.copies)

    def norm(self, grads: list[Tensor]) -> float:
        """Returns the norm of the summed gradients of the whole model; the same bits on every rank.

        fp64: in fp32 the sum over a million elements is off by 1e-4 on a CPU.
        """
        if self._groups.tensor is None:
            return _norm(grads).item()
        held = [grad[:divided] for grad, (divided, _) in zip(grads, self._ends, strict=True)]
        if self._groups.tensor.rank() == 0:
            held += [grad[divided:] for grad, (divided, _) in zip(grads, self._ends, strict=True)]
        square = _norm(held).square()
        dist.all_reduce(square, group=self._groups.tensor)
        return square.sqrt().item()


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]))


def _kinds(model: LanguageModel) -> dict[Tensor, int]:
    """Each parameter's place in the order of a flat buffer."""
    backend: Any = model.backend
    partial = backend.partial_gradients(model)
    kinds = {}
    for name, parameter in model.named_parameters():
        divided = backend.logical(name, parameter).shape != tuple(parameter.shape)
        kinds[parameter] = _DIVIDED if divided else _PARTIAL if name in partial else _WHOLE
    return kinds

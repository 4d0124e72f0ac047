"""Low-rank adapters (LoRA, arXiv 2106.09685): `y = W x + scale B A x`, of which A and B alone are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig
from .norm import wide
from .parameters import normal, zeros


class Adapter(nn.Module):
    """`scale B A x`, zero at first.

    Args:
        weight: [outputs, inputs] of the linear beside it, this rank's part of it; none of its values are read.
        config: rank and alpha.
        variance: of A's initial values.
        rows: which of the outputs are computed; all unless given.
    """

    def __init__(self, weight: Tensor, config: LoRAConfig, variance: float, rows: slice = slice(None)) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.empty(config.rank, inputs))
        self.up = nn.Parameter(torch.empty(outputs, config.rank))
        self.scale, self.rows = config.alpha / config.rank, rows
        self.specs = {"down": normal(variance, decay=False), "up": zeros()}

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(self.between(F.linear(x, self.down)), self.up[self.rows]) * self.scale

    def between(self, low: Tensor) -> Tensor:
        """What B reads of A's [..., rank]: all of it."""
        return low

    def product(self) -> Tensor:
        """`scale B A`, fp32 at least: what the weight beside it would have to grow by."""
        return wide(self.up) @ wide(self.down) * self.scale


def add_adapters(
    blocks: Iterable[nn.Module | None], config: LoRAConfig, make: Callable[[nn.Module, LoRAConfig], nn.Module]
) -> None:
    """Gives each linear of the blocks that `config` names what `make` makes for it, as its submodule `adapter`."""
    for block in blocks:
        for name, module in [] if block is None else list(block.named_modules()):
            if name.rpartition(".")[2] in config.linears:
                module.adapter = make(module, config)
                module.register_forward_hook(_add)


def _add(linear: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    return y + linear.adapter(*inputs)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Adds each adapter to the weight beside it and makes it zero: the function stays, up to rounding."""
    for linear in model.modules():
        adapter = getattr(linear, "adapter", None)
        if isinstance(adapter, Adapter):
            weight = linear.get_parameter("weight")
            weight.copy_(wide(weight) + adapter.product())
            adapter.up.zero_()

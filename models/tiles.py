"""The MLP of long rows tile by tile of tokens, forward and backward: its temporaries are those of one tile.

Nothing of it is kept but its input, and each parameter gets one gradient, summed over the tiles in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .norm import wide

# Tokens a tile: enough to fill a GPU, and few beside the rows that need tiles.
TILE = 2**14


class Fed(nn.Module):
    """`x + feed(norm(x))`, its parameters those of `norm` and `mlp`; their own calls and hooks are left out.

    Args:
        norm: before the MLP.
        mlp: the module that holds the parameters of `feed`.
        feed: the MLP's forward pass.
    """

    def __init__(self, norm: nn.Module, mlp: nn.Module, feed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.mlp, self.feed = norm, mlp, feed

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return x + self.feed(self.norm.forward(x))


def in_tiles(fed: Fed, x: Tensor) -> Tensor:
    """`fed(x)` of x [B, T, D], computed in tiles of tokens, and again in the backward pass.

    Two functions, the gradient of the second being taken by the first: x is kept before the outputs are computed, so
    a checkpoint around both, which stops at the last tensor that was kept, does not compute them again.
    """
    return _Outputs.apply(fed, _Gradients.apply(fed, x, *fed.parameters()))


class _Outputs(torch.autograd.Function):
    """The outputs, and the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, fed: Fed, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for tile in _tiles(x):
            y[:, tile] = fed(x[:, tile])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy


class _Gradients(torch.autograd.Function):
    """x, and the gradients of `fed(x)` given that of its outputs."""

    @staticmethod
    def forward(ctx: Any, fed: Fed, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.fed = fed
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # Copies, for the hooks of the parameters themselves are due once, with the whole gradient.
        copies = {n: p.detach().requires_grad_(p.requires_grad) for n, p in ctx.fed.named_parameters()}
        trained = [copy for copy in copies.values() if copy.requires_grad]
        dx, sums = torch.empty_like(x), []
        for tile in _tiles(x):
            part = x[:, tile].detach().requires_grad_()
            with torch.enable_grad():
                y = functional_call(ctx.fed, copies, part)
            dx[:, tile], *gradients = torch.autograd.grad(y, [part, *trained], dy[:, tile])
            sums = _added(sums, gradients)
        found = iter(sums)
        of_parameters = (next(found).to(p.dtype) if p.requires_grad else None for p in copies.values())
        return None, dx, *of_parameters


def _tiles(x: Tensor) -> Iterator[slice]:
    """The tokens of each tile of x [B, T, D], as even as can be."""
    rows, tokens = x.shape[:2]
    count = -(-rows * tokens // TILE)
    length = -(-tokens // count)
    for begin in range(0, tokens, length):
        yield slice(begin, begin + length)


def _added(sums: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Both, in fp32 from the second tile on; of one tile the gradients themselves."""
    if not sums:
        return gradients
    for index, gradient in enumerate(gradients):
        sums[index] = wide(sums[index]).add_(gradient)
    return sums

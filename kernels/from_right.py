"""The backward pass of an op whose piece goes on elsewhere: the mirror of a summary and the state that it brings.

Forward, a piece says what it does to a state (`summarize`), is told the state that enters it, and runs once. Backward,
it says what gradient its outputs alone give the state that entered (the op's adjoint, a light pass from right to left),
is told the gradient of the state that leaves it, and runs once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FromRight = Callable[[Tensor], Tensor]


def with_right(
    y: Tensor, final_state: Tensor, from_right: FromRight, adjoint: Callable[..., Tensor], *needed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, final_state) where `from_right` says the gradient of final_state, which is detached: nobody else may.

    Args:
        y, final_state: an op's outputs.
        from_right: the gradient of final_state, given the gradient of the initial state for y's gradient alone.
        adjoint: the latter, given y's gradient and `needed`.
        needed: the tensors that `adjoint` reads; kept for the backward pass.
    """
    return _FromRight.apply(y, final_state, from_right, adjoint, *needed), final_state.detach()


class _FromRight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, final_state: Tensor, from_right: FromRight, adjoint, *needed: Tensor | None) -> Tensor:
        ctx.from_right, ctx.adjoint = from_right, adjoint
        ctx.save_for_backward(*needed)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,), needed = grads, ctx.saved_tensors
        return dy, ctx.from_right(ctx.adjoint(dy, *needed)), None, None, *(None for _ in needed)

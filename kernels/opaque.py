"""Functions that torch.compile takes as one operator and eager code calls without one.

torch.library's wrappers cost several times what a small op's launches do, on a host that should stay ahead of its GPU.
So an operator is called where something must see it: while torch.compile traces, and under dispatch modes, fake tensors
among them. Elsewhere the same function runs, as a torch.autograd.Function where it has gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Opaque:
    """A function with the gradients that are registered, or none; the decorator `@opaque(name)` makes one.

    Attributes:
        operator: torch.library's, "longscan::<name>".
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self._direct: Callable[..., Any] = function
        self._custom = torch.library.custom_op(f"longscan::{name}", function, mutates_args=())
        self.operator = self._custom._opoverload

    def __call__(self, *inputs: Any) -> Any:
        """What the function returns; new tensors all."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.operator(*inputs)
        if self._direct is self._function and torch.is_grad_enabled():
            # Raises where a derivative is asked for.
            return self.operator(*inputs)
        return self._direct(*inputs)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Says the outputs' shapes and dtypes."""
        self._custom.register_fake(fake)

    def register_autograd(self, gradients: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Adds derivatives, as torch.library does, except that an unused output's gradient is None, not zeros."""

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self._function(*inputs)
            save(ctx, inputs, output)
            return output

        def backward(ctx: Any, *outer: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            if all(gradient is None for gradient in outer):
                return (None,) * len(ctx.needs_input_grad)
            return gradients(ctx, *outer)

        self._custom.register_autograd(backward, setup_context=save)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._direct = type(self._name, (torch.autograd.Function,), methods).apply  # pyright: ignore[reportAttributeAccessIssue]


def opaque(name: str) -> Callable[[Callable[..., Any]], Opaque]:
    """Makes the function that is decorated an Opaque of this name; it returns new tensors and writes to none."""
    return lambda function: Opaque(name, function)

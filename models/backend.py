"""The constructors of parameterised layers that a tensor layout may divide; LocalBackend divides nothing.

Model files ask a Backend for column, row and block-diagonal linears and the vocabulary's tables, and for `local(n)`
where they size a per-channel parameter themselves. A backend that shards gives the same layers over its ranks; model
files do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import linear_cross_entropy
from .adapter import Adapter
from .config import LoRAConfig
from .parameters import Logical, normal, whole, zeros


class Backend(Protocol):
    """Makes layers; `variance` is that of the initial weights, which the layer declares as its ParameterSpec."""

    def local(self, size: int) -> int:
        """How many of `size` channels or heads this rank holds."""
        ...

    def part(self, size: int) -> slice:
        """Which of `size` channels or heads this rank holds."""
        ...

    def logical(self, name: str, parameter: Tensor) -> Logical:
        """Which box of which logical tensor the model's parameter called `name` is."""
        ...

    def residual(self, x: Tensor) -> Tensor:
        """The part of x [B, T, ...] that belongs to the tokens of this rank's residual stream."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Every token's [B, T, D], of the part x of the normed residual stream that this rank holds."""
        ...

    def project(self, x: Tensor, *linears: nn.Module) -> Iterator[Tensor]:
        """What column and head linears of this backend make of x, the normed residual stream, for every token.

        In their order; on a device of its own each when it is asked for, between tensor ranks all at once."""
        ...

    def column_linear(self, inputs: int, outputs: int, bias: bool, variance: float) -> nn.Module:
        """A linear whose outputs are divided."""
        ...

    def row_linear(self, inputs: int, outputs: int, bias: bool, variance: float) -> nn.Module:
        """A linear whose inputs are divided and whose output is whole."""
        ...

    def head_linear(self, inputs: int, heads: int, head_dim: int, variance: float) -> nn.Module:
        """A linear without bias to `heads` heads: divided by heads, or whole on every rank where too few to divide."""
        ...

    def block_diagonal_linear(self, blocks: int, width: int, variance: float) -> nn.Module:
        """A block-diagonal linear with bias whose blocks are divided."""
        ...

    def adapter(self, linear: nn.Module, config: LoRAConfig) -> nn.Module:
        """What adds a low-rank adapter to the output of one of these linears, of its input."""
        ...

    def embedding(self, vocab_size: int, width: int, variance: float) -> nn.Module:
        """A table of `vocab_size` rows, its `weight` divided by rows."""
        ...

    def head(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits [..., V]: `hidden` against the rows of an embedding's weight."""
        ...

    def cross_entropy(self, hidden: Tensor, table: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """`kernels.linear_cross_entropy` of hidden [N, D] against the rows of an embedding's weight."""
        ...


class LocalBackend:
    """Whole layers on one device."""

    def local(self, size: int) -> int:
        """All of it."""
        return size

    def part(self, size: int) -> slice:
        """All of them."""
        return slice(0, size)

    def logical(self, name: str, parameter: Tensor) -> Logical:
        """All of it."""
        return whole(name, parameter)

    def residual(self, x: Tensor) -> Tensor:
        """All of it."""
        return x

    def enter(self, x: Tensor) -> Tensor:
        """All of it."""
        return x

    def project(self, x: Tensor, *linears: nn.Module) -> Iterator[Tensor]:
        """Each linear of x."""
        return (linear(x) for linear in linears)

    def column_linear(self, inputs: int, outputs: int, bias: bool, variance: float) -> nn.Module:
        """A plain linear."""
        return Linear(inputs, outputs, bias, variance)

    def row_linear(self, inputs: int, outputs: int, bias: bool, variance: float) -> nn.Module:
        """A plain linear."""
        return Linear(inputs, outputs, bias, variance)

    def head_linear(self, inputs: int, heads: int, head_dim: int, variance: float) -> nn.Module:
        """A plain linear."""
        return Linear(inputs, heads * head_dim, False, variance)

    def block_diagonal_linear(self, blocks: int, width: int, variance: float) -> nn.Module:
        """Every block."""
        return BlockDiagonalLinear(blocks, width, variance)

    def adapter(self, linear: nn.Module, config: LoRAConfig) -> nn.Module:
        """A plain adapter."""
        weight = linear.get_parameter("weight")
        return Adapter(weight, config, 1 / weight.shape[1])

    def embedding(self, vocab_size: int, width: int, variance: float) -> nn.Module:
        """The whole table."""
        return Embedding(vocab_size, width, variance)

    def head(self, hidden: Tensor, table: Tensor) -> Tensor:
        """All logits."""
        return F.linear(hidden, table)

    def cross_entropy(self, hidden: Tensor, table: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """The kernel's, over the whole vocabulary."""
        return linear_cross_entropy(hidden, table, labels, **options)


class Linear(nn.Module):
    """`x W^T + b`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, variance: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.specs = {"weight": normal(variance), "bias": zeros()}

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight, self.bias)


class BlockDiagonalLinear(nn.Module):
    """Each of `blocks` groups of channels through a square matrix of its own, plus a bias.

    Serves the RG-LRU's gates only, hence never decays: the released models decay no RG-LRU parameter.
    """

    def __init__(self, blocks: int, width: int, variance: float) -> None:
        super().__init__()
        side = width // blocks
        self.weight = nn.Parameter(torch.empty(blocks, side, side))  # [block, input, output]
        self.bias = nn.Parameter(torch.empty(width))
        self.specs = {"weight": normal(variance, decay=False), "bias": zeros()}

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        blocks, side, _ = self.weight.shape
        grouped = x.reshape(-1, blocks, side).transpose(0, 1)
        mixed = torch.bmm(grouped, self.weight).transpose(0, 1).reshape(x.shape)
        return mixed + self.bias


class Embedding(nn.Module):
    """A table of vectors, looked up by token. Decays: as the tied head it is a matrix like the others."""

    def __init__(self, vocab_size: int, width: int, variance: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.specs = {"weight": normal(variance)}

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return lookup(tokens, self.weight)


def lookup(tokens: Tensor, table: Tensor) -> Tensor:
    """`table[tokens]`, [..., D] of tokens [...] and a table [V, D]; the gradient's bits repeat, on a GPU too."""
    return _Lookup.apply(tokens, table)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = len(table)
        return F.embedding(tokens, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        mode = torch.get_deterministic_debug_mode()
        # Else tokens that come often are summed with atomics, in any order. "warn" chooses as "error" does, and another
        # thread may run what has no other way.
        torch.set_deterministic_debug_mode("warn")
        try:
            return None, torch.ops.aten.embedding_dense_backward(grads[0], tokens, ctx.rows, -1, False)
        finally:
            torch.set_deterministic_debug_mode(mode)

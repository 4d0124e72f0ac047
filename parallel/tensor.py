"""Tensor parallelism: Megatron's layers behind the Backend that models are built from, and their loss.

Layers divide channels, heads and vocabulary; a mixer meets no collective. The gradient of a layer's input is summed
once, whatever number of column linears reads it: a row's goes once each way for a mixer or MLP. With sequence_parallel
the residual stream holds T / tensor tokens of each row, column linears gather and row linears scatter; what they
gather is kept for the backward pass whole, where Megatron's column linear would gather again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from ..kernels import loss_from_pieces, vocabulary_pieces
from ..models import LanguageModel, LocalBackend, ModelConfig
from ..models.adapter import Adapter
from ..models.backend import BlockDiagonalLinear, Linear, lookup
from ..models.config import LoRAConfig
from ..models.norm import LayerNorm, RMSNorm
from ..models.parameters import Logical, normal, zeros
from .collectives import gather_tokens, sum_gradients, sum_parts, sum_tokens
from .dims import ParallelDims
from .groups import layout_groups
from .peers import GPUs, PeerCopies
from .products import Exchange, Matrix, project, sum_products

# What exchanges with other ranks: torch.compile leaves it out of its graphs.
eager = cast("Callable[[Any], Any]", torch.compiler.disable)
_projected, _summed = eager(project), eager(sum_products)


class MegatronBackend:
    """A Backend that divides layers over the tensor ranks; `dims` fits `config` (`ParallelDims.validate`).

    Generation token by token is not divided: `step` needs `sequence_parallel` off.
    """

    def __init__(self, config: ModelConfig, dims: ParallelDims) -> None:
        group = layout_groups(dims).tensor
        assert group is not None, f"{dims} divides no layer; use LocalBackend"
        self.group: dist.ProcessGroup = group
        self.rank, self.size = group.rank(), group.size()
        self.sequence_parallel = dims.sequence_parallel
        self.exchange = PeerCopies(group, GPUs(group)) if dims.copy_engines else Exchange(group)
        with torch.device("meta"):
            undivided = LanguageModel(config, LocalBackend())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in undivided.named_parameters()}

    def local(self, size: int) -> int:
        """This rank's even share."""
        assert size % self.size == 0, f"{size} channels or heads over {self.size} tensor ranks"
        return size // self.size

    def part(self, size: int) -> slice:
        """This rank's even share, in rank order."""
        share = self.local(size)
        return slice(self.rank * share, (self.rank + 1) * share)

    def logical(self, name: str, parameter: Tensor) -> Logical:
        """The dim in which the undivided model's parameter is longer is the divided one; the last box may be short."""
        shape = self._shapes[name]
        pairs = zip(shape, parameter.shape, strict=True)
        return Logical(shape, tuple(self.rank * -(-whole // self.size) * (whole != own) for whole, own in pairs))

    def residual(self, x: Tensor) -> Tensor:
        """With sequence_parallel this rank's T / tensor tokens of each row."""
        return x.chunk(self.size, dim=1)[self.rank] if self.sequence_parallel else x

    @eager
    def enter(self, x: Tensor) -> Tensor:
        """A norm's output, [B, T, D] on every rank, its gradients summed over the ranks that read it."""
        return (gather_tokens if self.sequence_parallel else sum_gradients)(x, self.group)

    def project(self, x: Tensor, *linears: nn.Module) -> Iterator[Tensor]:
        """All at once, while x is on its way; one after the other where an adapter or ZeRO 3 hooks into a linear."""
        if any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
            whole = self.enter(x)
            return (linear(whole) for linear in linears)
        matrices = [cast("ColumnLinear | SharedHeadLinear", linear).matrix for linear in linears]
        return iter(_projected(x, matrices, self.exchange, self.sequence_parallel))

    def column_linear(self, inputs: int, outputs: int, bias: bool, variance: float) -> nn.Module:
        """Megatron's, its outputs left divided."""
        return ColumnLinear(inputs, outputs, bias, variance, self)

    def row_linear(self, inputs: int, outputs: int, bias: bool, variance: float) -> nn.Module:
        """Megatron's, its inputs divided already."""
        return RowLinear(inputs, outputs, bias, variance, self)

    def head_linear(self, inputs: int, heads: int, head_dim: int, variance: float) -> nn.Module:
        """Divided where each rank gets whole heads; else whole on every rank, which uses the head its queries share."""
        if heads % self.size == 0:
            return ColumnLinear(inputs, heads * head_dim, False, variance, self)
        return SharedHeadLinear(inputs, heads, head_dim, variance, self)

    def block_diagonal_linear(self, blocks: int, width: int, variance: float) -> nn.Module:
        """This rank's blocks."""
        return BlockDiagonalLinear(self.local(blocks), self.local(width), variance)

    def adapter(self, linear: nn.Module, config: LoRAConfig) -> nn.Module:
        """Divided as the linear is: B of a column linear, A of a row linear."""
        weight = linear.get_parameter("weight")
        if isinstance(linear, RowLinear):
            return RowAdapter(weight, config, self)
        rows = linear.rows if isinstance(linear, SharedHeadLinear) else slice(None)
        return Adapter(weight, config, 1 / weight.shape[1], rows)

    def embedding(self, vocab_size: int, width: int, variance: float) -> nn.Module:
        """Megatron's, divided by rows."""
        return VocabularyEmbedding(vocab_size, width, variance, self)

    def head(self, hidden: Tensor, table: Tensor) -> Tensor:
        """All logits, on every rank; the loss does without (`cross_entropy`)."""
        logits = F.linear(hidden, table)
        vocabulary = self._vocabulary
        padded = F.pad(logits, (0, -(-vocabulary // self.size) - table.shape[0]))
        return gather_from_tensor_model_parallel_region(padded, group=self.group)[..., :vocabulary]

    def cross_entropy(self, hidden: Tensor, table: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """`kernels.linear_cross_entropy`, the same on every rank, from each rank's slice of the vocabulary."""
        return vocabulary_parallel_cross_entropy(hidden, table, labels, self._vocabulary, group=self.group, **options)

    @property
    def _vocabulary(self) -> int:
        return self._shapes["embedding.weight"][0]

    def layer_config(self, sequence_parallel: bool) -> ModelParallelConfig:
        """Megatron's options of a layer, made on the default device like any module and left without values."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=sequence_parallel,
            perform_initialization=False,
            use_cpu_initialization=True,
            params_dtype=torch.get_default_dtype(),
        )

    def partial_gradients(self, model: LanguageModel) -> set[str]:
        """Names of whole parameters whose gradient each rank has a part of, to be summed over the tensor ranks.

        All that lie among the divided layers; and those of the residual stream, where that is divided by tokens.
        """
        found = set()
        for prefix, owner in model.named_modules():
            on_residual = isinstance(owner, RMSNorm | LayerNorm | RowLinear | RowAdapter) and not self.sequence_parallel
            for name, parameter in owner.named_parameters(prefix, recurse=False):
                divided = tuple(parameter.shape) != self._shapes[name]
                if not divided and not on_residual:
                    found.add(name)
        return found


def vocabulary_parallel_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    labels: Tensor,
    vocabulary: int,
    group: dist.ProcessGroup,
    *,
    reduction: str = "sum",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """`kernels.linear_cross_entropy` of a table whose rows lie on the ranks of `group`, the same on every rank.

    Two all-reduces of [N] numbers. The gradient of `hidden` is this rank's part: its sum is the norm's business.

    Args:
        hidden: [N, D], the same on every rank.
        table: [V / size, D], each rank's rows in rank order; all but the last rank hold as many.
        labels: [N] of the whole vocabulary.
        vocabulary: V.
        group: the tensor ranks.
        reduction, ignore_index, z_loss, label_smoothing, soft_cap, implementation: as there.
    """
    start = group.rank() * -(-vocabulary // group.size())
    highest, *sums = vocabulary_pieces(
        hidden, table, labels, vocab_start=start, soft_cap=soft_cap, implementation=implementation
    )
    peak = highest.detach().clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    total, target, spread = sums
    total = total * (highest.detach() - peak).exp()
    total, target, spread = sum_parts(torch.stack([total, target, spread]), group).unbind()
    options = {"ignore_index": ignore_index, "z_loss": z_loss, "label_smoothing": label_smoothing}
    losses = loss_from_pieces((peak, total, target, spread), labels, vocabulary, **options)
    return losses if reduction == "none" else losses.sum()


class ColumnLinear(ColumnParallelLinear):
    """Megatron's column linear; `project` sums the gradient of its input."""

    weight: nn.Parameter

    def __init__(self, inputs: int, outputs: int, bias: bool, variance: float, backend: MegatronBackend) -> None:
        config = backend.layer_config(sequence_parallel=False)
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=_unused,
            bias=bias,
            disable_grad_reduce=True,
            tp_group=backend.group,
        )
        self.specs = {"weight": normal(variance), "bias": zeros()}

    @property
    def matrix(self) -> Matrix:
        """What inputs are multiplied by on this rank, and the bias."""
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[..., inputs] -> [..., outputs / tensor]; nothing is exchanged, and Megatron's way takes the host longer."""
        return F.linear(x, *self.matrix)


class RowLinear(RowParallelLinear):
    """Megatron's row linear, back to the residual stream."""

    def __init__(self, inputs: int, outputs: int, bias: bool, variance: float, backend: MegatronBackend) -> None:
        super().__init__(
            inputs,
            outputs,
            config=backend.layer_config(sequence_parallel=backend.sequence_parallel),
            init_method=_unused,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=backend.group,
        )
        self.specs, self._exchange = {"weight": normal(variance), "bias": zeros()}, backend.exchange

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs / tensor] -> [B, T, outputs], or [B, T / tensor, outputs] with sequence_parallel."""
        y = _summed(x, self.weight, self._exchange, self.sequence_parallel)
        return y if self.bias is None else y + self.bias


class RowAdapter(Adapter):
    """A row linear's adapter: what its A makes of each rank's inputs is summed, its B is whole on every rank."""

    def __init__(self, weight: Tensor, config: LoRAConfig, backend: MegatronBackend) -> None:
        super().__init__(weight, config, 1 / (weight.shape[1] * backend.size))
        self._group, self._scatters = backend.group, backend.sequence_parallel

    def between(self, low: Tensor) -> Tensor:
        """The sum over ranks of [B, T, rank]; of this rank's T / tensor tokens with sequence_parallel."""
        return _reduced(low, self._scatters, self._group)


@eager
def _reduced(parts: Tensor, scatters: bool, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' `parts` [B, T, D], which it may write over; or of this rank's T / tensor tokens of them."""
    if scatters:
        # Megatron scatters the first dim, which is not the tokens'.
        return sum_tokens(parts, group)
    return reduce_from_tensor_model_parallel_region(parts, group=group)


class SharedHeadLinear(Linear):
    """A linear to fewer heads than ranks, whole on every rank: each computes the head that its query heads read."""

    def __init__(self, inputs: int, heads: int, head_dim: int, variance: float, backend: MegatronBackend) -> None:
        assert backend.size % heads == 0, f"{heads} shared heads over {backend.size} tensor ranks"
        super().__init__(inputs, heads * head_dim, False, variance)
        begin = backend.rank * heads // backend.size * head_dim
        self.rows = slice(begin, begin + head_dim)

    @property
    def matrix(self) -> Matrix:
        """What inputs are multiplied by on this rank; no bias."""
        return self.weight[self.rows], None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., head_dim]."""
        return F.linear(x, *self.matrix)


class VocabularyEmbedding(VocabParallelEmbedding):
    """Megatron's embedding for any vocabulary: the last rank's rows are as many as are left."""

    def __init__(self, vocab_size: int, width: int, variance: float, backend: MegatronBackend) -> None:
        config, share = backend.layer_config(sequence_parallel=False), -(-vocab_size // backend.size)
        with torch.device("meta"):
            super().__init__(
                share * backend.size,
                width,
                init_method=_unused,
                reduce_scatter_embeddings=backend.sequence_parallel,
                config=config,
                tp_group=backend.group,
            )
        self.vocab_end_index = min(self.vocab_end_index, vocab_size)
        rows = self.vocab_end_index - self.vocab_start_index
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=config.params_dtype))
        self.specs = {"weight": normal(variance)}

    def forward(self, tokens: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, T] -> [B, T, width], or [B, T / tensor, width] with sequence_parallel."""
        rows = tokens - self.vocab_start_index
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        x = lookup(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0)
        return _reduced(x, self.reduce_scatter_embeddings, self.tp_group)


def _unused(weight: Tensor) -> None:
    raise AssertionError("weights are drawn by LanguageModel.init_weights")

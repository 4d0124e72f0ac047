"""The language model: an embedding, blocks after a pattern, a norm and a head."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import Segments
from .adapter import add_adapters
from .backend import Backend, LocalBackend
from .block import ACTIVATION_CHECKPOINTS, Block
from .config import ModelConfig, validate
from .norm import NORMS
from .offload import HostStore
from .parameters import init_parameters, undecayed
from .positions import sinusoids
from .sequence import Carry, LocalContext, SequenceContext


@dataclass(frozen=True)
class Part:
    """What a model builds of itself where several share its layers; parameters keep the names of the whole model.

    Attributes:
        layers: the blocks, by their number in the whole model.
        first: whether it turns tokens into hidden states.
        last: whether it turns hidden states into logits; it holds the embedding too where that is the head.
    """

    layers: frozenset[int]
    first: bool = True
    last: bool = True


class LanguageModel(nn.Module):
    """Next-token logits of a block pattern given as data.

    Parameters hold no values until `init_weights` or a checkpoint gives them (`device="meta"`, then `to_empty`,
    builds a large model without memory). Computes in the parameters' dtype; norms, softmax, angles and scan states
    in fp32, in fp64 for an fp64 model.

    Args:
        config: the model; `vocab_size` must be set.
        backend: makes the layers; LocalBackend unless tensors are divided.
        implementation: of the kernels: "auto", "reference" or "triton".
        activation_checkpoint: what of each block is computed again in the backward pass (`Block`).
        part: what of the model is built; all of it unless given.

    Attributes:
        frozen: names of the parameters that training leaves as they are; none unless `freeze` says so.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend | None = None,
        implementation: str = "auto",
        activation_checkpoint: str = "none",
        part: Part | None = None,
    ) -> None:
        super().__init__()
        validate(config)
        if config.vocab_size == 0:
            raise ConfigError("model.vocab_size=0 was not filled in; set it to the tokenizer's vocabulary size")
        if activation_checkpoint not in ACTIVATION_CHECKPOINTS:
            known = ", ".join(ACTIVATION_CHECKPOINTS)
            raise ConfigError(f"activation_checkpoint={activation_checkpoint!r} is not one of {known}")
        self.config, self.implementation = config, implementation
        self.backend = backend or LocalBackend()
        self.part = part or Part(frozenset(range(config.layers)))
        self.frozen: set[str] = set()
        self._host = HostStore() if activation_checkpoint == "offload" else None
        if self.part.first or (self.part.last and config.tie_embeddings):
            self.embedding = self.backend.embedding(config.vocab_size, config.width, 1 / config.width)
        if self.part.first and config.embedding_norm:
            self.embedding_norm = NORMS[config.norm](config.width, config.norm_eps)
        # None for the blocks of other parts, so that these keep their numbers.
        blocks: list[Any] = [
            Block(mixer, config, self.backend, implementation, activation_checkpoint)
            if layer in self.part.layers
            else None
            for layer, mixer in enumerate(config.mixers)
        ]
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        if config.lora.rank:
            add_adapters(blocks, config.lora, self.backend.adapter)
        if self.part.last:
            self.norm = NORMS[config.norm](config.width, config.norm_eps)
        if self.part.last and not config.tie_embeddings:
            self.unembedding = self.backend.embedding(config.vocab_size, config.width, 1 / config.width)

    def forward(self, tokens: Tensor, segments: Segments, contexts: Sequence[SequenceContext] | None = None) -> Tensor:
        """Logits [B, T, V] of `tokens` [B, T] in the model's dtype; `contexts` as in `hidden`."""
        return self.head(self.hidden(tokens, segments, contexts))

    def hidden(self, tokens: Tensor, segments: Segments, contexts: Sequence[SequenceContext] | None = None) -> Tensor:
        """The normed hidden states [B, T, D] that `head` turns into logits.

        Args:
            tokens: int64 [B, T].
            segments: the documents of the piece.
            contexts: one SequenceContext a block; None for a piece with nothing on its left.
        """
        x = self.embed(tokens, segments.positions)
        _, hidden = self.chunk(range(self.config.layers), x, segments, contexts)
        assert hidden is not None
        return hidden

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The hidden states [B, T, D] that the first block reads; `positions` are those in the documents."""
        x = self.embedding(tokens)
        if self.config.embedding_scale:
            # Rounded to bf16 as in RecurrentGemma's code, whatever the dtype: 50.5, not 50.596, for its 2560.
            x = x * torch.tensor(self.config.width**0.5, dtype=torch.bfloat16, device="cpu").item()
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        if self.config.position_embedding == "none":
            return x
        return x + sinusoids(self.backend.residual(positions), self.config.width, x.dtype)

    def chunk(
        self, layers: range, x: Tensor, segments: Segments, contexts: Sequence[SequenceContext] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(The hidden states [B, T, D] after the consecutive blocks `layers`, what `cross_entropy` reads of them).

        The second is None short of the last block. `contexts` as in `hidden`.
        """
        x = self.through(layers, x, segments, contexts)
        return x, self.finish(x) if layers.stop == self.config.layers else None

    def through(
        self, layers: Iterable[int], x: Tensor, segments: Segments, contexts: Sequence[SequenceContext] | None = None
    ) -> Tensor:
        """The hidden states [B, T, D] after the blocks `layers`, in that order; `contexts` as in `hidden`."""
        with self._host.keeping() if self._host and torch.is_grad_enabled() else nullcontext():
            for layer in layers:
                seq = LocalContext(segments) if contexts is None else contexts[layer]
                x = self.blocks[layer](x, seq)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The normed hidden states [B, T, D] that `head` reads, of what the last block gives."""
        return self.backend.enter(self.norm(x))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D]."""
        logits = self.backend.head(hidden, self._table)
        cap = self.config.logit_soft_cap
        return torch.tanh(logits / cap) * cap if cap else logits

    def cross_entropy(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """`kernels.linear_cross_entropy` of normed hidden states [..., D], labels [...], a chunk of logits at a time.

        `options` are its reduction (a row is a label, in order), ignore_index, z_loss and label_smoothing.
        """
        fixed = {"soft_cap": self.config.logit_soft_cap, "implementation": self.implementation}
        return self.backend.cross_entropy(hidden.flatten(0, -2), self._table, labels.flatten(), **fixed, **options)

    def extend(self, tokens: Tensor, carry: Carry, segments: Segments | None = None) -> tuple[Tensor, Carry]:
        """The hidden states [B, T, D] of a further piece, and the carry after it.

        Without `segments` the piece goes on with the running documents; a row that has read nothing begins one.
        """
        segments = segments or carry.next_segments(tokens.shape[1])
        contexts = [LocalContext(segments, layer) for layer in carry.layers]
        hidden = self.hidden(tokens, segments, contexts)
        return hidden, Carry([context.leaving for context in contexts], segments.positions[:, -1] + 1)

    def prefill(self, tokens: Tensor, carry: Carry | None = None, chunk: int = 2048) -> tuple[Tensor, Carry]:
        """The logits [B, V] of what follows `tokens` [B, T], and the carry; memory is that of `chunk` tokens."""
        carry = carry or self.init_carry(tokens.shape[0])
        hidden = None
        for piece in tokens.split(chunk, dim=1):
            hidden, carry = self.extend(piece, carry)
        assert hidden is not None, "prefill needs at least one token"
        return self.head(hidden[:, -1]), carry

    def step(self, tokens: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """The logits [B, V] of what follows one more token a row [B], and the carry."""
        x, layers = self.embed(tokens, carry.position), []
        for block, layer in zip(self.blocks, carry.layers, strict=True):
            x, layer = block.step(x, layer, carry.position)
            layers.append(layer)
        return self.head(self.finish(x)), Carry(layers, carry.position + 1)

    def init_carry(self, batch: int) -> Carry:
        """The carry of `batch` rows that have read nothing."""
        weight = self.get_parameter("embedding.weight")
        layers = [block.mixer.init_carry(batch, weight.device, weight.dtype) for block in self.blocks]
        return Carry(layers, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def init_weights(self, seed: int, names: Collection[str] | None = None) -> None:
        """Draws every parameter, or those called `names`, in place from `seed` and its name.

        Build order, device and dtype do not matter.
        """
        init_parameters(self, seed, self.backend.logical, names)

    def use_positions(self, config: ModelConfig) -> None:
        """Goes on with `config`, which differs in rotary bases and ALiBi factors alone (`config.with_positions`)."""
        self.config = config
        for layer in self.part.layers:
            self.blocks[layer].mixer.use_positions(config)

    def freeze(self) -> None:
        """Takes no gradients of the `frozen` parameters. After the optimizer was made: it is to know all of them."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.frozen)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that do not decay: frozen ones, norms, biases, factors, RG-LRU's decays and gates."""
        return undecayed(self) | self.frozen

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of the whole model, whatever part and boxes of it this one holds."""
        with torch.device("meta"):
            whole = LanguageModel(self.config)
        return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}

    @property
    def _table(self) -> Tensor:
        """The head's weight [V, D]."""
        return self.get_parameter("embedding.weight" if self.config.tie_embeddings else "unembedding.weight")

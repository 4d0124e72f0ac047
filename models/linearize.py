"""What turns a pretrained transformer into its linearized twin: matching its attention, and low-rank adapters.

A twin's blocks are its teacher's but for the mixer, `linearized_attention` with the teacher's projections by the same
names, so the teacher need not be held beside it: it is the twin's own weights under softmax attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import Segments
from .adapter import Adapter
from .config import AttentionConfig, LinearizedAttentionConfig, ModelConfig
from .language_model import LanguageModel
from .mixers.attention import Attention
from .mixers.linearized_attention import LinearizedAttention
from .norm import wide
from .sequence import LocalContext, SequenceContext

# Which parameters a stage of training changes.
TRAINS = ("all", "mixers", "lora")
# Keeps the error of a token whose attention output is zero finite.
SMALLEST_POWER = 1e-12


class AttentionTransfer(LanguageModel):
    """A twin that learns to attend as its teacher: its loss in training is how far its mixers' outputs are off.

    Each block reads what it would read in the teacher, whose softmax attention goes on to the next, so an error of one
    block does not reach another. A token's error is |twin - teacher|^2 / |teacher|^2 of what the mixer adds to the
    residual stream; the loss is its mean over the blocks, of which each chunk makes a part. Queries, keys and values
    are projected twice. In evaluation the twin is the language model that it is.

    Attributes:
        errors: fp32 (fp64) [layers], each block's error summed over the valid tokens since `reset_errors`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.errors = torch.zeros(self.config.layers)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As in LanguageModel, in training without gradients."""
        with torch.no_grad() if self.training else nullcontext():
            return super().embed(tokens, positions)

    def chunk(
        self, layers: range, x: Tensor, segments: Segments, contexts: Sequence[SequenceContext] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """In training (the teacher's hidden states after `layers`, the errors [B, T, all layers], zero of the others).

        Errors are fp32 (fp64), of this rank's residual stream. In evaluation as in LanguageModel.
        """
        if not self.training:
            return super().chunk(layers, x, segments, contexts)
        # A gradient of zero for x where one is asked for: whoever sent it waits for that.
        errors = [wide(x[..., :0]).sum(-1)] * self.config.layers
        for layer in layers:
            block = self.blocks[layer]
            assert isinstance(block.mixer, LinearizedAttention), f"block {layer} has no attention to transfer"
            seq = LocalContext(segments) if contexts is None else contexts[layer]
            with torch.no_grad():
                normed = block.mixer_norm(x)
                taught = softmax_attention(block.mixer, normed, copy(seq))
                x = x + taught
                x = x + block.mlp(block.mlp_norm(x))
            errors[layer] = relative_error(block.mixer(normed, seq), taught)
        return x, torch.stack(errors, dim=-1)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, **options: Any) -> Tensor:
        """In training the errors summed over the tokens whose label counts, their mean over the blocks."""
        if not self.training:
            return super().cross_entropy(hidden, labels, ignore_index=ignore_index, **options)
        counts = self.backend.residual(labels).ne(ignore_index)
        errors = (hidden * counts.unsqueeze(-1)).sum((0, 1))
        # Where the ranks divide the tokens, each stands for all in a mean over ranks; its gradient is its own part's.
        ranks = labels.shape[1] // hidden.shape[1]
        # In place: a CUDA graph adds to the same memory each time.
        self.errors = self.errors.to(errors)
        self.errors += errors.detach() * ranks
        own = errors.mean()
        return own + (ranks - 1) * own.detach()

    def reset_errors(self) -> Tensor:
        """Returns the errors so far, and begins anew."""
        errors = self.errors.clone()
        self.errors.zero_()
        return errors


def softmax_attention(mixer: LinearizedAttention, x: Tensor, seq: SequenceContext) -> Tensor:
    """[B, T, D] -> [B, T, D]: softmax attention over the whole document by the projections of `mixer`."""
    teacher = copy(mixer)
    teacher.keys_seen = None
    return Attention.forward(teacher, x, seq)


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """[B, T]: |found - expected|^2 / |expected|^2 of vectors [B, T, D], in fp32 at least."""
    power = wide(expected).square().sum(-1).clamp(min=SMALLEST_POWER)
    return (wide(found) - wide(expected)).square().sum(-1) / power


def twin_config(teacher: ModelConfig) -> ModelConfig:
    """The linearized twin of a transformer: its mixers replaced, what they share taken over.

    Features are learned, half as many dims as the head has and their negatives, so as many features as it has dims.
    """
    options = teacher.attention
    if set(teacher.mixers) != {"attention"} or options.position == "alibi":
        raise ConfigError(
            f"model.pattern={teacher.pattern} with model.attention.position={options.position!r} cannot be linearized; "
            "every mixer must be 'attention', with rotary positions or none"
        )
    shared = {entry.name: getattr(options, entry.name) for entry in fields(AttentionConfig)}
    learned = {"feature_map": "learned", "feature_dim": max(1, options.head_dim // 2)}
    mixer = LinearizedAttentionConfig(**shared | learned)
    return replace(teacher, pattern=["linearized_attention"], linearized_attention=mixer)


def added_parameters(config: ModelConfig) -> set[str]:
    """The names of what a twin has and its teacher has not: its mixers' own parameters, and adapters."""
    with torch.device("meta"):
        whole = LanguageModel(config)
    return mixer_parameters(whole) | adapter_parameters(whole)


def first_values(config: ModelConfig, seed: int, names: Iterable[str]) -> Iterator[Tensor]:
    """Yields the parameters `names` of a model of `config` in fp32, as `seed` draws them; memory holds one."""
    with torch.device("meta"):
        model = LanguageModel(config)
    for name in names:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, own, nn.Parameter(torch.empty_like(module.get_parameter(own), device="cpu")))
        model.init_weights(seed, {name})
        yield module.get_parameter(own).detach()
        module.to_empty(device="meta", recurse=False)


def mixer_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters of linearized attention that softmax attention has not."""
    mixers = ((name, module) for name, module in model.named_modules() if isinstance(module, LinearizedAttention))
    return {f"{name}.{own}" for name, module in mixers for own in module.specs}


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of the adapters' parameters."""
    adapters = ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))
    return {f"{name}.{own}" for name, module in adapters for own, _ in module.named_parameters()}


def frozen_parameters(model: nn.Module, trains: str) -> set[str]:
    """The names of the parameters that stay as they are where `trains` (one of TRAINS) is trained."""
    if trains == "all":
        return adapter_parameters(model)
    trained = mixer_parameters(model) if trains == "mixers" else adapter_parameters(model)
    return {name for name, _ in model.named_parameters()} - trained

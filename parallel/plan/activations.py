"""Bytes of the tensors that modules keep for their backward pass on a GPU, each once, by their shapes.

Tests hold every formula against what autograd keeps of the real modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...kernels.cross_entropy.chunks import aligned, at_once
from ...kernels.linear_attention.cuts import cut_rows
from ...models.mixer_config import (
    AttentionConfig,
    LinearizedAttentionConfig,
    MixerConfig,
    RGLRUConfig,
    ShortConvConfig,
    TaylorAttentionConfig,
    taylor_terms,
)
from .load import Load, local_heads


def activation_bytes(load: Load, stage: int = 0) -> int:
    """Kept for the backward pass by all that a pipeline rank has in flight; the loss has one micro-batch at a time."""
    last = stage == load.dims.pipeline - 1
    blocks = sum(kept_by_block(load, name) for name in load.stage_mixers(stage))
    sent = 0 if last else block_input_bytes(load)
    whole = blocks + sent + batch_bytes(load)
    return math.ceil(in_flight(load, stage) * whole) + (head_bytes(load) if last else 0)


def in_flight(load: Load, stage: int) -> float:
    """Micro-batches that went forward through all of a rank's chunks and not yet back, when most did.

    1F1B: as many as there are ranks from this one on. Interleaved: a chunk's pass for each of the warm-up, twice the
    ranks behind this one and a round of all ranks for each further chunk, and the one at work (arXiv 2104.04473, 2.2).
    """
    ranks, chunks = load.dims.pipeline, load.dims.interleave
    behind = ranks - 1 - stage
    if chunks == 1:
        return min(load.micro_batches, behind + 1)
    return min(load.micro_batches, (2 * behind + (chunks - 1) * ranks + 1) / chunks)


def kept_by_block(load: Load, name: str) -> int:
    """What a block keeps under the checkpointing in force: all, all but MLP and norm, its input, or nothing there."""
    if load.checkpointing == "offload":
        return 0
    if load.checkpointing == "full":
        return block_input_bytes(load)
    if load.checkpointing == "selective":
        return mixed_bytes(load, name) + block_input_bytes(load)
    return block_bytes(load, name)


def batch_bytes(load: Load) -> int:
    """Tokens, labels and positions of 8 bytes, document starts of 4, resets of 1."""
    return 29 * load.tokens


def host_bytes(load: Load, stage: int = 0) -> int:
    """Block inputs in host memory, of all that a pipeline rank has in flight."""
    if load.checkpointing != "offload":
        return 0
    return math.ceil(in_flight(load, stage) * len(load.stage_mixers(stage)) * block_input_bytes(load))


def block_input_bytes(load: Load) -> int:
    """A block's input."""
    return load.residual_tokens * load.model.width * load.element


def head_bytes(load: Load) -> int:
    """The last norm and the loss: without tensor ranks the gradients of the hidden states and, in fp32, of the table.

    In place of the latter a loss of few rows in bf16 keeps the gradient of its logits.
    """
    width, rows = load.model.width, load.tokens
    if load.dims.tensor > 1:
        # The labels counted from the slice, and a dozen numbers a token.
        return _norm_bytes(load) + 8 * rows + 12 * 4 * rows
    if logits_at_once(load):
        kept = 2 * rows * aligned(load.model.vocab_size, 2)
    else:
        kept = 4 * width * load.model.vocab_size
    return _norm_bytes(load) + rows * width * load.element + kept


def logits_at_once(load: Load) -> bool:
    """Whether the loss makes all its logits at once."""
    return load.element == 2 and at_once(load.tokens, load.model.width)


def block_bytes(load: Load, name: str) -> int:
    """What a block keeps whose mixer is `name`."""
    return mixed_bytes(load, name) + _norm_bytes(load) + _mlp_bytes(load)


def mixed_bytes(load: Load, name: str) -> int:
    """What a block keeps of its mixer and the norm before it."""
    return _norm_bytes(load) + mixer_bytes(load, name)


def _norm_bytes(load: Load) -> int:
    """The norm's input, an fp32 number a token, and its output, which the layers after it keep once."""
    kept = load.residual_tokens * (load.model.width * load.element + 4)
    return kept + load.tokens * load.model.width * load.element


def _mlp_bytes(load: Load) -> int:
    """Gate, up and their product; of a plain MLP what its activation reads and gives, ReLU the latter only."""
    mlp = load.model.mlp
    kept = 3 if mlp.gated else 1 if mlp.activation == "relu" else 2
    return kept * load.tokens * (mlp.hidden_size(load.model.width) // load.dims.tensor) * load.element


def mixer_bytes(load: Load, name: str) -> int:
    """What a mixer keeps beyond its input."""
    options = load.model.mixer_config(name)
    return sum(_mixer_parts(load, options))


def _mixer_parts(load: Load, options: MixerConfig) -> Iterator[int]:
    width, tensor, element, tokens = load.model.width, load.dims.tensor, load.element, load.tokens
    wide, divided = 4 * load.micro_rows, load.dims.context > 1
    if isinstance(options, RGLRUConfig):
        channels = options.channels(width) // tensor
        # Both branches, u, two gates, h, gelu and the product.
        yield 8 * tokens * channels * element + (4 * channels if element < 4 else 0)
        yield channels * wide * divided
        yield _halo_rows(load, options.conv_taps - 1) * channels * element
    elif isinstance(options, ShortConvConfig):
        channels = options.channels(width) // tensor
        # Both branches, the convolved one and the product.
        yield 4 * tokens * channels * element
        yield _halo_rows(load, options.taps - 1) * channels * element
    elif isinstance(options, TaylorAttentionConfig):
        heads, terms = options.query_heads(width) // tensor, taylor_terms(options.feature_dim)
        # q, k, v and y; the document of each token and its inverse sum of weights; the state that entered.
        yield tokens * heads * 2 * (options.feature_dim + options.head_dim) * element
        yield 4 * tokens * (1 + heads * options.normalize)
        yield heads * terms * (options.head_dim + options.normalize) * wide * divided
    elif isinstance(options, AttentionConfig):
        yield from _attention_parts(load, options)
    else:
        raise AssertionError(f"no formula for {options}")


def _attention_parts(load: Load, options: AttentionConfig) -> Iterator[int]:
    """Rotated q, k and v with their halo, y, a statistic a token and head, angles; a linearized mixer's three more."""
    tokens, element, heads, key_heads = load.tokens, load.element, *local_heads(load, options)
    keys = tokens + _halo_rows(load, None if options.keys_seen is None else options.keys_seen - 1)
    yield (tokens * heads + 2 * keys * key_heads) * options.head_dim * element
    yield tokens * heads * options.head_dim * element
    yield 4 * tokens * (heads + options.rotary_dims)
    if options.position == "alibi":
        yield 4 * options.query_heads(load.model.width)
    if isinstance(options, LinearizedAttentionConfig):
        yield from _linearized_parts(load, options)


def _linearized_parts(load: Load, options: LinearizedAttentionConfig) -> Iterator[int]:
    """Of the default branches: softmax inside groups, a pointwise feature map of head_dim features.

    Their other choices keep more: relu2 its 2 G weights a head, normed or projected features several fp32 copies.
    """
    tokens, element, heads, key_heads = load.tokens, load.element, *local_heads(load, options)
    width, features = options.head_dim, options.features
    key_heads = heads if options.projected else key_heads
    divided = load.dims.context > 1
    yield tokens * (heads + key_heads) * features * element
    # The global branch, the values repeated for their queries, the sum of all branches; k and v without their halo.
    yield (3 * heads + 2 * key_heads * divided) * tokens * width * element
    # The starts of groups; documents and groups; the inverse sums.
    yield 4 * tokens * (3 + heads * options.normalize)
    # Each head's factor; the states that enter the pieces.
    yield heads * element
    pieces, _ = cut_rows(load.piece, load.micro_rows * heads, width, grouped=True)
    yield pieces * key_heads * 4 * load.micro_rows * features * (width + options.normalize)
    yield _halo_rows(load, options.conv_taps - 1) * heads * width * element


def _halo_rows(load: Load, entries: int | None) -> int:
    """Entries left of a micro-batch's pieces, `entries` a row, or with None all that lie left of the last piece."""
    context = load.dims.context
    return load.micro_rows * ((context - 1) * load.piece if entries is None else entries) if context > 1 else 0

"""BLOOM: an ALiBi transformer with LayerNorm, one of them after the embedding, biases and a plain MLP.

Queries, keys and values are one linear whose outputs go head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import AttentionConfig, MLPConfig, ModelConfig
from .family import Entry, Family, Turn, linear
from .fields import Fields

# How it was trained and computed there; none changes what it computes.
IMPLEMENTATION = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "n_inner",
    "offset_alibi",
    "skip_bias_add",
    "skip_bias_add_qkv",
    "slow_but_exact",
)


def apart(theirs: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    """Queries', keys' and values' part of the one linear's weight or bias."""
    by_head = theirs.unflatten(0, (config.attention.query_heads(config.width), 3, -1))
    return [part.flatten(0, 1) for part in by_head.unbind(1)]


def together(ours: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """The inverse of `apart`."""
    heads = config.attention.query_heads(config.width)
    return torch.stack([part.unflatten(0, (heads, -1)) for part in ours], dim=1).flatten(0, 2)


QUERIES_KEYS_VALUES = Turn(apart, together)


def read(fields: Fields) -> ModelConfig:
    """The ALiBi transformer of these fields."""
    # Each has two names, and files of either.
    width = fields.either("hidden_size", "n_embed")
    heads = fields.either("n_head", "num_attention_heads")
    fields.require("apply_residual_connection_post_layernorm", False)
    for key in IMPLEMENTATION:
        fields.take(key, None)
    return ModelConfig(
        vocab_size=fields.need("vocab_size"),
        width=width,
        layers=fields.either("n_layer", "num_hidden_layers"),
        pattern=["attention"],
        mlp=MLPConfig(hidden=4 * width, gated=False),
        attention=AttentionConfig(
            heads=heads, head_dim=width // heads, position="alibi", qkv_bias=True, output_bias=True
        ),
        norm="layer",
        norm_eps=fields.take("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.take("tie_word_embeddings", True),
        embedding_norm=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that say `config`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "n_layer": config.layers,
        "n_head": config.attention.query_heads(config.width),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


BLOOM = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    read=read,
    write=write,
    base="transformer.",
    layer="transformer.h.{}.",
    outside=(
        Entry("transformer.word_embeddings.weight", "embedding.weight"),
        *linear("transformer.word_embeddings_layernorm", "embedding_norm"),
        *linear("transformer.ln_f", "norm"),
    ),
    block=(
        *linear("input_layernorm", "mixer_norm"),
        *linear("post_attention_layernorm", "mlp_norm"),
        *linear("mlp.dense_h_to_4h", "mlp.up"),
        *linear("mlp.dense_4h_to_h", "mlp.down"),
    ),
    mixers={
        "attention": (
            *(
                Entry(
                    f"self_attention.query_key_value.{kind}",
                    (f"mixer.query.{kind}", f"mixer.key.{kind}", f"mixer.value.{kind}"),
                    QUERIES_KEYS_VALUES,
                )
                for kind in ("weight", "bias")
            ),
            *linear("self_attention.dense", "mixer.output"),
        )
    },
)

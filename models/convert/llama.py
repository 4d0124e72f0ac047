"""Llama: attention with rotary positions, RMSNorm and a gated MLP. Its norms' scales are stored around one."""

from __future__ import annotations

from typing import Any

from ..config import AttentionConfig, MLPConfig, ModelConfig
from .family import AROUND_ONE, Entry, Family, linear
from .fields import Fields


def read(fields: Fields) -> ModelConfig:
    """The transformer of these fields."""
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    base, fraction = fields.rope()
    bias = fields.take("attention_bias", False)
    fields.require("hidden_act", "silu")
    return ModelConfig(
        vocab_size=fields.need("vocab_size"),
        width=width,
        layers=fields.need("num_hidden_layers"),
        pattern=["attention"],
        mlp=MLPConfig(hidden=fields.need("intermediate_size"), activation="silu", bias=fields.take("mlp_bias", False)),
        attention=AttentionConfig(
            heads=heads,
            head_dim=fields.take("head_dim", width // heads),
            kv_heads=fields.take("num_key_value_heads", heads),
            rope_fraction=1.0 if fraction is None else fraction,
            rope_base=base,
            qkv_bias=bias,
            output_bias=bias,
        ),
        norm_eps=fields.take("rms_norm_eps", 1e-6),
        tie_embeddings=fields.take("tie_word_embeddings", False),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that say `config`."""
    attention = config.attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.mlp.hidden_size(config.width),
        "hidden_act": "silu",
        "mlp_bias": config.mlp.bias,
        "num_attention_heads": attention.query_heads(config.width),
        "num_key_value_heads": attention.key_heads(config.width),
        "head_dim": attention.head_dim,
        "attention_bias": attention.output_bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_base},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    base="model.",
    layer="model.layers.{}.",
    outside=(
        Entry("model.embed_tokens.weight", "embedding.weight"),
        Entry("model.norm.weight", "norm.scale", AROUND_ONE),
    ),
    block=(
        Entry("input_layernorm.weight", "mixer_norm.scale", AROUND_ONE),
        Entry("post_attention_layernorm.weight", "mlp_norm.scale", AROUND_ONE),
        *linear("mlp.gate_proj", "mlp.gate"),
        *linear("mlp.up_proj", "mlp.up"),
        *linear("mlp.down_proj", "mlp.down"),
    ),
    mixers={
        "attention": (
            *linear("self_attn.q_proj", "mixer.query"),
            *linear("self_attn.k_proj", "mixer.key"),
            *linear("self_attn.v_proj", "mixer.value"),
            *linear("self_attn.o_proj", "mixer.output"),
        )
    },
    unread=("rotary_emb.inv_freq",),
)

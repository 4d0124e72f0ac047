"""RecurrentGemma, which is Griffin with scaled embeddings and capped logits.

Its Lambda is stored as ours: `recurrent_param` is -Lambda of the paper. Gate blocks are the attention's heads. Its
window counts the query itself, as ours does and as transformers' mask does (the mask of the first released code keeps
one key more). `intermediate_size` counts the gate's and the other half together.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ..config import LocalAttentionConfig, MLPConfig, ModelConfig, RGLRUConfig
from .family import Entry, Family, Turn, linear
from .fields import Fields

BLOCKS = {"recurrent": "rg_lru", "attention": "local_attention"}
# A depthwise convolution's weight has a dim for the one channel it reads; a gate's bias is kept by block.
DEPTHWISE = Turn(lambda theirs, _: [theirs.squeeze(1)], lambda ours, _: ours[0].unsqueeze(1))
BY_BLOCK = Turn(
    lambda theirs, _: [theirs.flatten()],
    lambda ours, config: ours[0].unflatten(0, (config.rg_lru.gate_blocks, -1)),
)


def read(fields: Fields) -> ModelConfig:
    """The Griffin of these fields."""
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    base, fraction = fields.rope()
    cap = fields.take("logits_soft_cap", 30.0)
    if cap <= 0:
        raise ConfigError(f"config.json says logits_soft_cap={cap}; a recurrent_gemma model divides by it")
    fields.require("hidden_activation", "gelu_pytorch_tanh")
    fields.require("embeddings_scale_by_sqrt_dim", True)
    fields.require("head_dim", width // heads)
    blocks = fields.take("_block_types", None)
    blocks = fields.take("block_types", blocks or ["recurrent", "recurrent", "attention"])
    if unknown := set(blocks) - BLOCKS.keys():
        raise ConfigError(f"config.json names the unknown block types {sorted(unknown)}; known: {', '.join(BLOCKS)}")
    return ModelConfig(
        vocab_size=fields.need("vocab_size"),
        width=width,
        layers=fields.need("num_hidden_layers"),
        pattern=[BLOCKS[block] for block in blocks],
        mlp=MLPConfig(hidden=fields.need("intermediate_size") // 2),
        rg_lru=RGLRUConfig(
            width=fields.take("lru_width", width), gate_blocks=heads, conv_taps=fields.take("conv1d_width", 4)
        ),
        local_attention=LocalAttentionConfig(
            heads=heads,
            head_dim=width // heads,
            kv_heads=fields.take("num_key_value_heads", heads),
            window=fields.take("attention_window_size", 2048),
            rope_fraction=0.5 if fraction is None else fraction,
            rope_base=base,
            qkv_bias=fields.take("attention_bias", False),
        ),
        norm_eps=fields.take("rms_norm_eps", 1e-6),
        tie_embeddings=fields.take("tie_word_embeddings", True),
        embedding_scale=True,
        logit_soft_cap=float(cap),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that say `config`."""
    attention = config.local_attention
    with_attention = "local_attention" in config.mixers
    heads = attention.query_heads(config.width) if with_attention else config.rg_lru.gate_blocks
    names = {ours: theirs for theirs, ours in BLOCKS.items()}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "block_types": [names[mixer] for mixer in config.pattern],
        "intermediate_size": 2 * config.mlp.hidden_size(config.width),
        "hidden_activation": "gelu_pytorch_tanh",
        "lru_width": config.rg_lru.channels(config.width) if "rg_lru" in config.mixers else config.width,
        "conv1d_width": config.rg_lru.conv_taps,
        "num_attention_heads": heads,
        "num_key_value_heads": attention.key_heads(config.width) if with_attention else heads,
        "attention_window_size": attention.window,
        "attention_bias": attention.qkv_bias,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_base,
            "partial_rotary_factor": attention.rope_fraction,
        },
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        # It always caps: where ours does not, reading this back tells.
        "logits_soft_cap": config.logit_soft_cap or 30.0,
    }


RECURRENT_GEMMA = Family(
    name="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    read=read,
    write=write,
    base="model.",
    layer="model.layers.{}.",
    outside=(
        Entry("model.embed_tokens.weight", "embedding.weight"),
        Entry("model.final_norm.weight", "norm.scale"),
    ),
    block=(
        Entry("temporal_pre_norm.weight", "mixer_norm.scale"),
        Entry("channel_pre_norm.weight", "mlp_norm.scale"),
        *linear("mlp_block.gate_proj", "mlp.gate"),
        *linear("mlp_block.up_proj", "mlp.up"),
        *linear("mlp_block.down_proj", "mlp.down"),
    ),
    mixers={
        "rg_lru": (
            *linear("temporal_block.linear_x", "mixer.input_x"),
            *linear("temporal_block.linear_y", "mixer.input_y"),
            *linear("temporal_block.linear_out", "mixer.output"),
            Entry("temporal_block.conv_1d.weight", "mixer.conv_weight", DEPTHWISE),
            Entry("temporal_block.conv_1d.bias", "mixer.conv_bias"),
            Entry("temporal_block.rg_lru.recurrent_param", "mixer.a_param"),
            Entry("temporal_block.rg_lru.recurrent_gate_weight", "mixer.gate_a.weight"),
            Entry("temporal_block.rg_lru.recurrent_gate_bias", "mixer.gate_a.bias", BY_BLOCK),
            Entry("temporal_block.rg_lru.input_gate_weight", "mixer.gate_x.weight"),
            Entry("temporal_block.rg_lru.input_gate_bias", "mixer.gate_x.bias", BY_BLOCK),
        ),
        "local_attention": (
            *linear("temporal_block.q_proj", "mixer.query"),
            *linear("temporal_block.k_proj", "mixer.key"),
            *linear("temporal_block.v_proj", "mixer.value"),
            *linear("temporal_block.o_proj", "mixer.output"),
        ),
    },
)

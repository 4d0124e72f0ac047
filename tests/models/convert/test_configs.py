"""Fields of published config.json files, as models here: their sizes, and which of our presets they are."""

import pytest

from longscan.errors import ConfigError
from longscan.models import config_from_mapping, load_preset, num_params
from longscan.models.convert import essence, family_named, family_of

# As the publishers' files say it, with what older and newer versions of transformers wrote.
PUBLISHED = {
    "recurrentgemma-2b": (
        {
            "model_type": "recurrent_gemma",
            "architectures": ["RecurrentGemmaForCausalLM"],
            "_block_types": ["recurrent", "recurrent", "attention"],
            "block_types": ["recurrent", "recurrent", "attention"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attention_window_size": 2048,
            "bos_token_id": 2,
            "conv1d_width": 4,
            "embeddings_scale_by_sqrt_dim": True,
            "eos_token_id": 1,
            "final_w_init_variance_scale": 0.07692307692307693,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2560,
            "intermediate_size": 15360,
            "logits_soft_cap": 30.0,
            "lru_width": 2560,
            "num_attention_heads": 10,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "torch_dtype": "float32",
            "transformers_version": "4.40.0.dev0",
            "use_cache": True,
            "vocab_size": 256000,
            "w_init_variance_scale": 0.01,
        },
        2_682_862_080,
    ),
    "llama-7b": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    "llama-3-8b": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128009],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "bloom-560m": (
        {
            "model_type": "bloom",
            "apply_residual_connection_post_layernorm": False,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "hidden_dropout": 0.0,
            "layer_norm_epsilon": 1e-5,
            "masked_softmax_fusion": True,
            "n_embed": 1024,
            "n_inner": None,
            "n_layer": 24,
            "num_attention_heads": 16,
            "offset_alibi": 100,
            "pad_token_id": 3,
            "pretraining_tp": 1,
            "seq_length": 2048,
            "skip_bias_add": True,
            "skip_bias_add_qkv": False,
            "unk_token_id": 0,
            "vocab_size": 250880,
        },
        559_214_592,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_their_published_sizes(name):
    said, parameters = PUBLISHED[name]
    family = family_named(said, name)
    config = family.config(said)
    assert num_params(config) == parameters
    assert family.problems(config) == []
    assert family_of(config) is family
    assert essence(family.config(family.write(config))) == essence(config)


@pytest.mark.parametrize("name", ["recurrentgemma-2b", "llama-7b"])
def test_presets_are_the_published_configs(name):
    said, _ = PUBLISHED[name]
    found = essence(family_named(said, name).config(said))
    preset = essence(config_from_mapping({**load_preset(name), "vocab_size": said["vocab_size"]}))
    assert {key: (found[key], preset[key]) for key in found if found[key] != preset[key]} == {}


@pytest.mark.parametrize(
    ("preset", "changes", "reason"),
    [
        ("griffin-1.3b", {}, "model.embedding_scale=False would be True"),
        ("griffin-tiny", {"embedding_scale": True}, "model.logit_soft_cap=0.0 would be 30.0"),
        ("based-tiny", {}, "recurrent_gemma: it has no short_conv, it has no taylor_attention"),
        ("alibi-tiny", {}, "llama: model.position_embedding|llama: model.*alibi"),
        ("sinusoidal-tiny", {}, "model.position_embedding=sinusoidal would be none"),
        ("linearized-tiny", {}, "it has no linearized_attention"),
    ],
)
def test_what_no_architecture_says_is_told_by_key(preset, changes, reason):
    config = config_from_mapping({**load_preset(preset), "vocab_size": 64, **changes})
    with pytest.raises(ConfigError, match=reason):
        family_of(config)


@pytest.mark.parametrize("preset", ["llama-tiny", "llama-1.3b"])
def test_presets_that_an_architecture_says(preset):
    assert family_of(config_from_mapping({**load_preset(preset), "vocab_size": 64})).name == "llama"

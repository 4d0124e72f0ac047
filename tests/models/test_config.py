"""Counts against built models, presets, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from longscan.errors import ConfigError
from longscan.kernels import Segments
from longscan.models import LanguageModel, ModelConfig, config_from_mapping, flops_per_token, load_preset, num_params
from longscan.models.config import MIXER_NAMES, validate
from longscan.models.mixer_config import pairs_per_token
from longscan.models.mixers import MIXERS

# For each mixer the values that its fields take below; every other field keeps its default.
HEADS = {"heads": (0, 4, 6), "head_dim": (4, 8)}
SIZES = {
    "mlp": {"hidden": (0, 20), "gated": (True, False), "bias": (True, False)},
    "rg_lru": {"width": (0, 24), "gate_blocks": (1, 2, 4), "conv_taps": (1, 2, 4), "bias": (True, False)},
    "local_attention": HEADS | {"kv_heads": (0, 1, 2), "output_bias": (True, False)},
    "attention": HEADS | {"kv_heads": (0, 1, 2), "position": ("rope", "alibi"), "output_bias": (True, False)},
    "taylor_attention": HEADS | {"feature_dim": (3, 16), "normalize": (True, False)},
    "short_conv": {"width": (0, 24), "taps": (1, 3), "bias": (True, False)},
    "linearized_attention": HEADS
    | {"feature_map": ("elu", "taylor", "learned"), "conv_taps": (1, 7), "qkv_bias": (True, False)},
}


@st.composite
def configs(draw) -> ModelConfig:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    sizes = {name: {key: pick(*values) for key, values in entries.items()} for name, entries in SIZES.items()}
    return config_from_mapping(
        {
            "vocab_size": pick(11, 64),
            "width": pick(16, 32, 48),
            "layers": pick(1, 2, 5),
            "pattern": draw(st.lists(st.sampled_from(MIXER_NAMES), min_size=1, max_size=3)),
            "tie_embeddings": draw(st.booleans()),
            "position_embedding": pick("none", "sinusoidal"),
            "norm": pick("rms", "layer"),
            "embedding_norm": draw(st.booleans()),
            **sizes,
        }
    )


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_num_params_is_exact(config):
    with torch.device("meta"):
        model = LanguageModel(config)
    assert num_params(config) == sum(parameter.numel() for parameter in model.parameters())


@settings(max_examples=8, deadline=None)
@given(config=configs())
def test_flops_agree_with_the_counter(config):
    """Matmuls of parameters, seen by PyTorch's counter, are 6 a parameter and token; attention is counted apart."""
    config.pattern = ["rg_lru"]
    model = LanguageModel(config)
    model.init_weights(0)
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, Segments.whole(2, 6)).sum().backward()
    vectors = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 1 or "conv" in name)
    lookup = 0 if config.tie_embeddings else model.embedding.weight.numel()
    matrices = num_params(config) - vectors - lookup
    assert counter.get_total_flops() == 6 * matrices * tokens.numel()
    assert flops_per_token(config, 6) == 6 * (matrices + vectors)


@pytest.mark.parametrize("seq_len, window", [(1, 1), (7, 3), (3, 7), (64, 64), (65, 64)])
def test_pairs_are_those_of_the_mask(seq_len, window):
    i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)[None, :]
    assert pairs_per_token(seq_len, window) * seq_len == ((j <= i) & (i - j < window)).sum().item()


def test_attention_flops_count_the_pairs():
    config = config_from_mapping(load_preset("griffin-tiny") | {"vocab_size": 50})
    pairs = sum(min(t + 1, 16) for t in range(40)) / 40
    assert flops_per_token(config, 40) == pytest.approx(6 * num_params(config) + 3 * 2 * 2 * 4 * 8 * pairs)


def test_linear_attention_flops_do_not_depend_on_the_length():
    config = config_from_mapping(load_preset("based-tiny") | {"vocab_size": 50, "pattern": ["taylor_attention"]})
    states = 4 * 4 * (1 + 8 + 36) * (8 + 1)
    for seq_len in (7, 100):
        assert flops_per_token(config, seq_len) == 6 * num_params(config) + 3 * 4 * states


def test_grouped_flops_count_the_pairs_inside_groups():
    options = config_from_mapping(load_preset("linearized-tiny")).linearized_attention
    pairs = sum(t % 8 + 1 for t in range(37)) / 37
    state = 8 * (8 + 1)
    expected = 4 * (3 * 4 * 8 * pairs + 3 * 4 * state + 6 * (8 - 1) * 5)
    assert options.mixing_flops(32, 37) == pytest.approx(expected)


def test_omegaconf_can_wrap_the_config():
    structured = OmegaConf.merge(OmegaConf.structured(ModelConfig), load_preset("griffin-tiny"))
    assert OmegaConf.to_object(structured) == config_from_mapping(load_preset("griffin-tiny"))


def test_every_mixer_has_a_config():
    assert set(MIXER_NAMES) == set(MIXERS)
    assert all(isinstance(ModelConfig().mixer_config(name).num_params(64), int) for name in MIXERS)


@pytest.mark.parametrize(
    "mapping, words",
    [
        ({"width": 0}, "model.width=0"),
        ({"layers": -1}, "model.layers=-1"),
        ({"vocab_size": -5}, "model.vocab_size=-5"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
        ({"logit_soft_cap": -1.0}, "model.logit_soft_cap=-1.0"),
        ({"pattern": []}, "names no mixer"),
        ({"pattern": ["rglru"]}, "'rglru'; known: rg_lru"),
        ({"mlp": {"activation": "relu"}}, "activation='relu' is not one of gelu, silu"),
        ({"mlp": {"activation": "tanh", "gated": False}}, "activation='tanh' is not one of gelu, silu, relu"),
        ({"mlp": {"hidden": -1}}, "hidden=-1"),
        ({"local_attention": {"qkv_bias": True}}, "qkv_bias=True needs kv_heads=1 to be heads=6, or 0"),
        ({"rg_lru": {"width": 50, "gate_blocks": 16}}, "width=50 must be a positive multiple of gate_blocks=16"),
        ({"rg_lru": {"gate_blocks": 0}}, "gate_blocks=0"),
        ({"rg_lru": {"conv_taps": 0}}, "conv_taps=0"),
        ({"rg_lru": {"decay_init": "mine"}}, "decay_init='mine' is not one of paper, released"),
        ({"rg_lru": {"decay_range": [0.9, 1.0]}}, r"decay_range=\[0.9, 1.0\]"),
        ({"width": 100}, "heads=0 needs model.width=100 to be a multiple of head_dim=128"),
        ({"local_attention": {"heads": 6, "kv_heads": 4}}, "heads=6 is not a multiple of kv_heads=4"),
        ({"local_attention": {"window": 0}}, "window=0"),
        ({"local_attention": {"head_dim": 10, "heads": 4}}, "rope_fraction=0.5 of head_dim=10 is 5 dims"),
        ({"local_attention": {"rope_base": 0.0}}, "rope_base=0.0"),
        ({"norm": "batch"}, "model.norm='batch' is not one of rms, layer"),
        ({"position_embedding": "learned"}, "position_embedding='learned' is not one of none, sinusoidal"),
        ({"width": 33, "pattern": ["short_conv"], "position_embedding": "sinusoidal"}, "width=33 must be even"),
        ({"pattern": ["attention"], "attention": {"position": "t5"}}, "position='t5' is not one of rope, alibi, none"),
        ({"pattern": ["attention"], "attention": {"kv_heads": -1}}, "attention.kv_heads=-1"),
        ({"pattern": ["attention"], "attention": {"head_dim": 0}}, "attention.head_dim=0"),
        ({"pattern": ["attention"], "attention": {"heads": -2}}, "attention.heads=-2"),
        ({"pattern": ["short_conv"], "short_conv": {"taps": 0}}, "short_conv.taps=0"),
        ({"pattern": ["short_conv"], "short_conv": {"width": -1}}, "short_conv.width=-1"),
        ({"pattern": ["taylor_attention"], "taylor_attention": {"feature_dim": 0}}, "feature_dim=0"),
        ({"pattern": ["taylor_attention"], "taylor_attention": {"scale": -1.0}}, "scale=-1.0"),
        *(
            ({"pattern": ["linearized_attention"], "linearized_attention": fields}, words)
            for fields, words in [
                ({"group": 0}, "group=0"),
                ({"conv_taps": 0}, "conv_taps=0"),
                ({"local": "relu"}, "local='relu' is not one of softmax, relu2"),
                ({"feature_map": "exp"}, "feature_map='exp' is not one of elu, relu"),
                ({"feature_map": "identity"}, "feature_map='identity' has some"),
                ({"position": "alibi"}, "position='alibi' is not one of rope, none"),
            ]
        ),
        ({"widht": 3}, "model.widht; known: width"),
        ({"rg_lru": {"taps": 3}}, "model.rg_lru.taps; known: conv_taps"),
    ],
    ids=str,
)
def test_bad_configs_are_refused_with_their_values(mapping, words):
    with pytest.raises(ConfigError, match=words):
        config_from_mapping(mapping)


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        validate(ModelConfig(layers=0, norm_eps=-1.0))
    assert "layers=0" in str(caught.value) and "norm_eps=-1.0" in str(caught.value)


def test_unused_mixers_are_not_checked():
    validate(config_from_mapping({"width": 100, "pattern": ["rg_lru"], "rg_lru": {"gate_blocks": 4}}))

"""Every mixer, in every configuration that takes another path through it."""

from collections.abc import Callable

import pytest
import torch

from longscan.models import LocalBackend, ModelConfig
from longscan.models.mixers import MIXERS, Mixer
from longscan.models.parameters import init_parameters

VARIANTS = {
    "attention": {
        "default": {},
        "alibi": {"position": "alibi", "kv_heads": 2, "alibi_scale": 0.5},
        "alibi-odd-heads": {"position": "alibi", "heads": 3, "output_bias": True},
        "none": {"position": "none", "kv_heads": 1},
        "half-rope": {"rope_fraction": 0.5},
        "biased": {"position": "alibi", "qkv_bias": True, "output_bias": True},
        "other-base": {"rope_base": 500.0, "heads": 3, "head_dim": 6},
    },
    "rg_lru": {
        "default": {},
        "paper": {"decay_init": "paper"},
        "released": {"decay_init": "released"},
        "one-tap": {"conv_taps": 1},
        "one-block-no-bias": {"gate_blocks": 1, "bias": False},
        "fast-decays": {"decay_range": [0.2, 0.5], "width": 24},
    },
    "local_attention": {
        "default": {},
        "window-1": {"window": 1},
        "window-past-row": {"window": 64},
        "grouped": {"kv_heads": 2, "rope_fraction": 1.0},
        "no-rope-no-bias": {"rope_fraction": 0.0, "output_bias": False},
        "alibi": {"position": "alibi", "kv_heads": 0, "alibi_scale": 0.5},
        "none-biased": {
            "position": "none",
            "kv_heads": 0,
            "qkv_bias": True,
            "rope_base": 500.0,
            "heads": 2,
            "head_dim": 6,
        },
    },
    "linearized_attention": {
        "default": {},
        "released": {"local": "relu2", "feature_map": "identity", "normalize": False, "conv_taps": 9},
        "taylor-shared-keys": {"feature_map": "taylor", "feature_dim": 3, "kv_heads": 2},
        "learned": {"feature_map": "learned", "feature_dim": 5, "conv_taps": 1},
        "relu-shared-keys": {"feature_map": "relu", "local": "relu2", "kv_heads": 1},
        "group-of-one": {"group": 1},
        "group-past-row": {"group": 64, "position": "none", "output_bias": True},
        "elu-sums": {"normalize": False, "qkv_bias": True, "rope_fraction": 0.5, "rope_base": 500.0},
        "taylor-squared": {
            "feature_map": "taylor",
            "feature_dim": 4,
            "local": "relu2",
            "group": 8,
            "heads": 3,
            "head_dim": 6,
        },
    },
    "short_conv": {
        "default": {},
        "one-tap-no-bias": {"taps": 1, "bias": False},
        "narrow": {"width": 24, "taps": 5},
    },
    "taylor_attention": {
        "default": {},
        "plain-sums": {"feature_dim": 5, "normalize": False, "scale": 0.7, "heads": 2, "head_dim": 12},
    },
}
CASES = [(mixer, label) for mixer in sorted(MIXERS) for label in VARIANTS.get(mixer, {"default": {}})]


@pytest.fixture
def variants() -> dict[str, dict[str, dict]]:
    return VARIANTS


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def make_mixer(request, make_config: Callable[..., ModelConfig]) -> Callable[..., Mixer]:
    """Makes the mixer of this case, its parameters away from zero."""
    name, label = request.param

    def make(dtype: torch.dtype = torch.float64) -> Mixer:
        config = make_config(**{name: VARIANTS[name][label]}, pattern=[name])
        mixer = MIXERS[name](config, LocalBackend())
        init_parameters(mixer, seed=3)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return mixer.to(dtype)

    return make

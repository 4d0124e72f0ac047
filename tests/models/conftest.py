"""Small models with values in every parameter, and ragged documents to run them on."""

from collections.abc import Callable

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import LanguageModel, ModelConfig, config_from_mapping, load_preset

SMALL_MIXERS = {
    "attention": {"head_dim": 8},
    "linearized_attention": {"head_dim": 8, "group": 5, "conv_taps": 4},
    "local_attention": {"heads": 4, "head_dim": 8, "kv_heads": 1, "window": 7},
    "rg_lru": {"width": 48, "gate_blocks": 4},
    "short_conv": {},
    "taylor_attention": {"heads": 3, "head_dim": 8, "feature_dim": 8},
}


def small_config(**fields) -> ModelConfig:
    """A Griffin of width 32, changed by `fields`, every mixer's sizes small and its window short enough to matter."""
    mapping = {**load_preset("griffin-tiny"), "vocab_size": 50, **fields}
    for name, sizes in SMALL_MIXERS.items():
        mapping[name] = sizes | fields.get(name, {})
    return config_from_mapping(mapping)


def stir(module: torch.nn.Module, seed: int = 1) -> None:
    """Moves every parameter off its initial value, so that no zero bias hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    return small_config


@pytest.fixture
def make_model() -> Callable[..., LanguageModel]:
    def make(dtype: torch.dtype = torch.float64, options: dict | None = None, **fields) -> LanguageModel:
        model = LanguageModel(small_config(**fields), **(options or {}))
        model.init_weights(0)
        stir(model)
        return model.to(dtype)

    return make


@pytest.fixture
def segments() -> Segments:
    """Two rows of 31 tokens: documents of 1, of several and of all tokens."""
    return Segments.from_lengths([[12, 1, 18], [31]])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 31), generator=torch.Generator().manual_seed(7))

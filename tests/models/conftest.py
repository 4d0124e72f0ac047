"""Small models with values in every parameter, and ragged documents to run them on."""

from collections.abc import Callable

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import LanguageModel, ModelConfig, config_from_mapping, load_preset


def small_config(**fields) -> ModelConfig:
    """griffin-tiny with a vocabulary and a window short enough to matter, changed by `fields`."""
    mapping = {**load_preset("griffin-tiny"), "vocab_size": 50, **fields}
    mapping["local_attention"] = {**load_preset("griffin-tiny")["local_attention"], "window": 7} | fields.get(
        "local_attention", {}
    )
    mapping["rg_lru"] = load_preset("griffin-tiny")["rg_lru"] | fields.get("rg_lru", {})
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

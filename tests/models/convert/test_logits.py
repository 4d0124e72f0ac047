"""Converted random-weight models give transformers' own logits, at prompts longer than the window."""

import pytest
import torch

published = pytest.importorskip("published", reason="transformers is not installed")
from longscan.kernels import Segments  # noqa: E402
from longscan.models import LanguageModel  # noqa: E402
from longscan.models.convert import Weights, check_tensors, family_named, read_json  # noqa: E402

TOKENS = torch.randint(0, published.VOCAB, (2, 45), generator=torch.Generator().manual_seed(1))

CONFIGS = {
    "griffin": lambda: published.griffin(),
    "griffin-wider-state": lambda: published.griffin(lru_width=24, num_key_value_heads=2, conv1d_width=3),
    "griffin-window-1": lambda: published.griffin(attention_window_size=1, block_types=["attention", "recurrent"]),
    # Transformers rounds the embeddings' factor to bf16: sqrt(24) = 4.899 is 4.90625 there.
    "griffin-rounded-scale": lambda: published.griffin(hidden_size=24, intermediate_size=60),
    "griffin-biases": lambda: published.griffin(attention_bias=True, num_key_value_heads=2, logits_soft_cap=3.0),
    "griffin-rope": lambda: published.griffin(
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}
    ),
    "hawk": lambda: published.griffin(block_types=["recurrent"], num_hidden_layers=2),
    "llama": lambda: published.llama(),
    "llama-multi-query-tied": lambda: published.llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama-biases": lambda: published.llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "bloom": lambda: published.bloom(),
    "bloom-6-heads": lambda: published.bloom(hidden_size=24, n_head=6, tie_word_embeddings=False),
    "bloom-8-heads": lambda: published.bloom(hidden_size=64, n_head=8, n_layer=3, layer_norm_epsilon=1e-6),
    "llama-wide-heads": lambda: published.llama(
        head_dim=12, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
}


def ours(folder, dtype):
    said = read_json(folder / "config.json")
    family = family_named(said, "config.json")
    config = family.config(said)
    links, weights = family.links(config), Weights(folder)
    stored = check_tensors(family, links, weights, str(folder))
    model = LanguageModel(config, implementation="reference").to(dtype)
    with torch.no_grad():
        for link in links:
            for name, tensor in zip(link.ours, link.to_ours(weights.read(stored[link.theirs]).to(dtype)), strict=True):
                model.get_parameter(name).copy_(tensor)
        segments = Segments.whole(*TOKENS.shape)
        return model(TOKENS, segments)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_logits_are_transformers_own(tmp_path, name, dtype, tolerance):
    folder = published.save(CONFIGS[name](), tmp_path / "model")
    expected = published.logits(folder, TOKENS, dtype)
    found = ours(folder, dtype)
    assert expected.std() > 0.05
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, error


@pytest.mark.parametrize("heads", [3, 12, 20])
def test_alibi_of_any_number_of_heads(tmp_path, heads):
    """In fp32 alone: most slopes of such numbers of heads are roots, which both sides round."""
    folder = published.save(published.bloom(hidden_size=8 * heads, n_head=heads), tmp_path / "model")
    expected = published.logits(folder, TOKENS)
    assert (ours(folder, torch.float32) - expected).abs().max() < 2e-6 * expected.abs().max()

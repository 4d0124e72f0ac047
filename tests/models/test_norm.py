"""LayerNorm, where a model has it, against its formula; RMSNorm is `kernels.rms_norm`, tested there."""

import pytest
import torch

from longscan.models import LanguageModel
from longscan.models.norm import LayerNorm


def normed(x, norm):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_layer_norm(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    norm = LayerNorm(24, 1e-2).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(24, generator=generator))
    x = torch.randn(3, 5, 24, generator=generator).mul(0.1).add(2).to(dtype)
    ours = norm(x)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), normed(x.double(), norm.double()), rtol=tolerance, atol=tolerance)


def test_a_model_with_layer_norms(make_model, tokens, segments):
    model = make_model(norm="layer", embedding_norm=True, norm_eps=1e-3)
    names = {name for name, module in model.named_modules() if isinstance(module, LayerNorm)}
    blocks = {f"blocks.{layer}.{name}_norm" for layer in range(3) for name in ("mixer", "mlp")}
    assert names == blocks | {"norm", "embedding_norm"}
    embedded = normed(model.embedding.weight[tokens], model.embedding_norm)
    torch.testing.assert_close(model.embed(tokens, segments.positions), embedded)
    assert {f"{name}.{part}" for name in names for part in ("weight", "bias")} <= model.no_weight_decay()


def test_layer_norms_begin_as_the_identity(make_config):
    model = LanguageModel(make_config(norm="layer"))
    model.init_weights(0)
    assert torch.equal(model.norm.weight, torch.ones(32))
    assert torch.equal(model.norm.bias, torch.zeros(32))

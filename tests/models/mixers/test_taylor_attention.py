"""Based's linear attention against its weights written out."""

import math

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import LocalBackend, LocalContext
from longscan.models.mixers import TaylorAttention
from longscan.models.parameters import init_parameters


def full_features(x: torch.Tensor) -> torch.Tensor:
    """The 1 + K + K^2 features of the paper's equation, with the released code's scaling; x [..., K]."""
    dims = x.shape[-1]
    second = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x / dims**0.25, second / dims**0.5], dim=-1)


@pytest.mark.parametrize("normalize", [True, False])
def test_outputs_are_the_papers(make_config, normalize):
    options = {"heads": 2, "head_dim": 12, "feature_dim": 16, "normalize": normalize}
    config = make_config(pattern=["taylor_attention"], taylor_attention=options)
    mixer = TaylorAttention(config, LocalBackend())
    init_parameters(mixer, seed=0)
    mixer.double()
    lengths = [4, 9]
    x = torch.randn(1, 13, 32, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    ours = mixer(x, LocalContext(Segments.from_lengths([lengths])))[0]
    rows = []
    for document in x[0].split(lengths):
        q, k, v = ((document @ layer.weight.T).unflatten(1, (2, -1)) for layer in (mixer.query, mixer.key, mixer.value))
        weights = torch.einsum("ihf,jhf->hij", full_features(q), full_features(k)).tril()
        assert full_features(q).shape[-1] == 273
        sums = torch.einsum("hij,jhv->ihv", weights, v)
        rows.append(sums / (weights.sum(-1).T[..., None] + 1e-6) if normalize else sums)
    by_hand = torch.cat(rows).flatten(1) @ mixer.output.weight.T
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)
    wanted = [x, *mixer.parameters()]
    expected, actual = (torch.autograd.grad(y.square().sum(), wanted) for y in (by_hand, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_the_scale_reaches_the_scores(make_config):
    """At scale s, queries times 1 / s give what they give at scale 1."""
    outputs = []
    for scale in (0.5, 1.0):
        config = make_config(pattern=["taylor_attention"], taylor_attention={"scale": scale})
        mixer = TaylorAttention(config, LocalBackend())
        init_parameters(mixer, seed=0)
        mixer.double()
        with torch.no_grad():
            mixer.query.weight.mul_(1 / scale)
        x = torch.randn(1, 13, 32, generator=torch.Generator().manual_seed(2)).double()
        outputs.append(mixer(x, LocalContext(Segments.whole(1, 13))))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)

"""The recurrences of the mixers against the naive references of flash-linear-attention, where that is installed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.kernels import Segments
from longscan.models import LocalBackend, LocalContext
from longscan.models.mixers import MIXERS, Mixer
from longscan.models.parameters import init_parameters

TOKENS = 96


def reference(module: str, name: str):
    """A naive reference of fla; what fla does not find on the machine may be an ImportError of any kind."""
    return getattr(pytest.importorskip(f"fla.ops.{module}.naive", exc_type=ImportError), name)


def made(make_config, name: str, dtype: torch.dtype, **options) -> tuple[Mixer, Tensor]:
    """A mixer with values in every parameter, and inputs [2, T, 32]."""
    mixer = MIXERS[name](make_config(pattern=[name], **{name: options}), LocalBackend())
    init_parameters(mixer, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, TOKENS, 32, generator=generator).to(dtype)
    return mixer.to(dtype), x.requires_grad_()


def assert_same(mixer: Mixer, x: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Outputs, and gradients of the inputs and parameters, within `tolerance` of the norm."""
    ours, found = mixer(x, LocalContext(Segments.whole(2, TOKENS))), []
    wanted = [x, *mixer.parameters()]
    for y in (ours, theirs):
        found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for name, actual, expected in zip(("y", "x", *dict(mixer.named_parameters())), *found, strict=True):
        error = ((actual - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_taylor_attention(make_config, scale, normalize):
    naive = reference("based", "naive_parallel_based")
    options = {"heads": 2, "head_dim": 12, "feature_dim": 16, "scale": scale, "normalize": normalize}
    mixer, x = made(make_config, "taylor_attention", torch.float64, **options)
    q, k, v = (layer(x).unflatten(2, (2, -1)).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    y = naive(q, k, v, scale=scale or None, use_norm=normalize)
    assert_same(mixer, x, mixer.output(y.transpose(1, 2).flatten(2)), 1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_linearized_attention_across_groups_of_one(make_config, normalize):
    """Groups of one token: the local branch is the token's own value, the global all before it."""
    naive = reference("linear_attn", "naive_recurrent_linear_attn")
    options = {"head_dim": 8, "group": 1, "conv_taps": 1, "position": "none", "normalize": normalize}
    mixer, x = made(make_config, "linearized_attention", torch.float32, **options)
    q, k, v = (layer(x).unflatten(2, (4, 8)) for layer in (mixer.query, mixer.key, mixer.value))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    # Theirs counts the token itself: a first token of zeros moves the others' keys and values one back.
    before = [F.pad(t[:, :-1], (0, 0, 0, 0, 1, 0)) for t in (k, v)]
    across = naive(q, *before, scale=1.0, normalize=normalize)[0]
    y = v + (1 + mixer.global_scale)[:, None] * across + mixer.conv_weight * v
    assert_same(mixer, x, mixer.output(y.flatten(2)), 1e-5)


def test_rg_lru(make_config):
    """Their recurrence, given the gates and the normaliser of arXiv 2402.19427, 2.4."""
    naive = reference("hgrn", "naive_recurrent_hgrn")
    mixer, x = made(make_config, "rg_lru", torch.float32, width=48, gate_blocks=4)
    p = dict(mixer.named_parameters())
    left = x @ p["input_x.weight"].T + p["input_x.bias"]
    right = F.gelu(x @ p["input_y.weight"].T + p["input_y.bias"], approximate="tanh")
    weight = p["conv_weight"][:, None]
    u = F.conv1d(F.pad(left.mT, (weight.shape[2] - 1, 0)), weight, p["conv_bias"], groups=48).mT
    r, i = (torch.sigmoid(u @ torch.block_diag(*p[f"{g}.weight"]) + p[f"{g}.bias"]) for g in ("gate_a", "gate_x"))
    log_a = -8 * r * F.softplus(p["a_param"])
    scaled = torch.cat([torch.ones_like(u[:, :1]), torch.sqrt(-torch.expm1(2 * log_a[:, 1:]))], 1)
    h = naive(scaled * i * u, log_a)[0]
    assert_same(mixer, x, (h * right) @ p["output.weight"].T + p["output.bias"], 1e-5)

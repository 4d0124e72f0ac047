"""The recurrent block against its equations, and the two initialisations of its decays."""

import math

import pytest
import torch
import torch.nn.functional as F

from longscan.kernels import Segments
from longscan.models import LocalBackend, LocalContext, RGLRUConfig
from longscan.models.mixers import RGLRU
from longscan.models.mixers.rg_lru import decay_spec
from longscan.models.parameters import init_parameters


def block_by_hand(mixer: RGLRU, x: torch.Tensor, documents: list[int]) -> torch.Tensor:
    """Griffin 2.4 token by token on one row [T, D], in the parameters' precision."""
    p = dict(mixer.named_parameters())
    taps = p["conv_weight"].shape[1]
    outputs = []
    for document in x.split(documents):
        left = document @ p["input_x.weight"].T + p["input_x.bias"]
        right = F.gelu(document @ p["input_y.weight"].T + p["input_y.bias"], approximate="tanh")
        h = torch.zeros_like(left[0])
        for t in range(len(document)):
            u = p["conv_bias"].clone()
            for s in range(min(taps, t + 1)):
                u = u + p["conv_weight"][:, taps - 1 - s] * left[t - s]
            r = torch.sigmoid(u @ torch.block_diag(*p["gate_a.weight"]) + p["gate_a.bias"])
            i = torch.sigmoid(u @ torch.block_diag(*p["gate_x.weight"]) + p["gate_x.bias"])
            a = torch.exp(-8 * r * torch.log1p(torch.exp(p["a_param"])))
            h = i * u if t == 0 else a * h + torch.sqrt(1 - a**2) * i * u
            outputs.append((h * right[t]) @ p["output.weight"].T + p["output.bias"])
    return torch.stack(outputs)


@pytest.mark.parametrize("decay_init", ["paper", "released"])
def test_block_is_the_papers(make_config, decay_init):
    config = make_config(pattern=["rg_lru"], rg_lru={"decay_init": decay_init})
    mixer = RGLRU(config, LocalBackend())
    init_parameters(mixer, seed=0)
    mixer.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    x = torch.randn(20, config.width, generator=generator).double().requires_grad_()
    by_hand = block_by_hand(mixer, x, [9, 11])
    ours = mixer(x[None], LocalContext(Segments.from_lengths([[9, 11]])))[0]
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)
    wanted = [x, *mixer.parameters()]
    expected, actual = (torch.autograd.grad(y.square().sum(), wanted) for y in (by_hand, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay_init", ["paper", "released"])
def test_decays_have_the_stated_distribution(decay_init):
    """Kolmogorov-Smirnov distance of 20000 draws from the uniform law that each initialisation states."""
    options = RGLRUConfig(decay_init=decay_init, decay_range=[0.9, 0.999])
    a_param = decay_spec(options).init((20000,), torch.Generator().manual_seed(0)).double()
    a = torch.exp(-F.softplus(a_param))
    if decay_init == "paper":
        uniform = (a**8 - 0.9) / (0.999 - 0.9)
    else:
        uniform = (a**2 - 0.9**2) / (0.999**2 - 0.9**2)
    drawn = uniform.sort().values
    assert drawn[0] > -1e-4 and drawn[-1] < 1 + 1e-4
    distance = (drawn - torch.linspace(0, 1, len(drawn), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / math.sqrt(len(drawn)), f"distance {distance} would occur once in a thousand times"


def test_initial_variances(make_config):
    config = make_config(width=128, layers=4, pattern=["rg_lru"], rg_lru={"width": 192, "gate_blocks": 4})
    mixer = RGLRU(config, LocalBackend())
    init_parameters(mixer, seed=0)
    expected = {
        "input_x.weight": 1 / 128,
        "input_y.weight": 1 / 128,
        "conv_weight": 0.01 / 4,
        "gate_a.weight": 4 / 192,
        "gate_x.weight": 4 / 192,
        "output.weight": 2 / (4 * 192),
    }
    parameters = dict(mixer.named_parameters())
    for name, variance in expected.items():
        assert abs(parameters.pop(name).var().item() / variance - 1) < 0.15, name
    del parameters["a_param"]
    assert all(not parameter.any() for parameter in parameters.values()), "biases begin at zero"

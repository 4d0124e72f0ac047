"""Softmax attention, whole and windowed, against softmax written out."""

import math

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import LocalBackend, LocalContext
from longscan.models.mixers import MIXERS
from longscan.models.parameters import init_parameters

SLOPES = {3: [1 / 16, 1 / 256, 1 / 4], 4: [1 / 4, 1 / 16, 1 / 64, 1 / 256]}


def turned(vector: torch.Tensor, position: int, dims: int, base: float) -> torch.Tensor:
    """`vector` [K] with its first `dims` dims rotated as complex numbers."""
    half = dims // 2
    frequencies = torch.tensor([base ** (-2 * i / dims) for i in range(half)], dtype=torch.float64)
    z = torch.complex(vector[:half], vector[half:dims]) * torch.polar(
        torch.ones_like(frequencies), position * frequencies
    )
    return torch.cat([z.real, z.imag, vector[dims:]])


CASES = [
    ("local_attention", {"heads": 4, "kv_heads": 1, "window": 5}),
    ("local_attention", {"heads": 4, "kv_heads": 2, "window": 5, "position": "alibi"}),
    ("attention", {"heads": 4, "kv_heads": 0}),
    ("attention", {"heads": 4, "kv_heads": 2, "rope_fraction": 0.5, "output_bias": True}),
    ("attention", {"heads": 3, "kv_heads": 1, "position": "alibi"}),
    ("attention", {"heads": 4, "kv_heads": 4, "position": "none"}),
    ("attention", {"heads": 4, "kv_heads": 0, "qkv_bias": True}),
]


@pytest.mark.parametrize("name, fields", CASES, ids=str)
def test_attention_is_the_softmax_over_what_it_sees(make_config, name, fields):
    config = make_config(pattern=[name], **{name: {"head_dim": 8, **fields}})
    options, mixer = config.mixer_config(name), MIXERS[name](config, LocalBackend())
    init_parameters(mixer, seed=0)
    mixer.double()
    bias = torch.zeros(32, dtype=torch.float64)
    if options.output_bias:
        bias = mixer.output.bias.detach().normal_(generator=torch.Generator().manual_seed(1))
    inputs = (mixer.query, mixer.key, mixer.value)
    for layer in inputs if options.qkv_bias else ():
        layer.bias.detach().normal_(generator=torch.Generator().manual_seed(3))
    lengths, heads, dims = [4, 9], options.heads, 8
    kv_heads, window = options.kv_heads or heads, fields.get("window", 99)
    x = torch.randn(1, 13, 32, generator=torch.Generator().manual_seed(2)).double()
    ours = mixer(x, LocalContext(Segments.from_lengths([lengths])))[0]
    expected = []
    for document in x[0].split(lengths):
        q, k, v = (torch.nn.functional.linear(document, layer.weight, layer.bias) for layer in inputs)
        for i in range(len(document)):
            first, row = max(0, i - window + 1), []
            for h in range(heads):
                own, shared = slice(h * dims, (h + 1) * dims), h // (heads // kv_heads)
                theirs = slice(shared * dims, (shared + 1) * dims)
                rotated = options.rotary_dims
                query = turned(q[i, own], i, rotated, 10000.0)
                keys = torch.stack([turned(k[j, theirs], j, rotated, 10000.0) for j in range(first, i + 1)])
                scores = keys @ query / math.sqrt(dims)
                if options.position == "alibi":
                    scores = scores - SLOPES[heads][h] * torch.arange(i - first, -1, -1)
                row.append(scores.softmax(0) @ v[first : i + 1, theirs])
            expected.append(torch.cat(row) @ mixer.output.weight.T + bias)
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-10, atol=1e-12)

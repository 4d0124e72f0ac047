"""Local attention against softmax written out, and its rotary positions."""

import math

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import LocalBackend, LocalContext
from longscan.models.mixers import LocalAttention
from longscan.models.mixers.local_attention import rotary_table, rotate
from longscan.models.parameters import init_parameters


def turned(vector: torch.Tensor, position: int, dims: int, base: float) -> torch.Tensor:
    """`vector` [K] with its first `dims` dims rotated as complex numbers."""
    half = dims // 2
    frequencies = torch.tensor([base ** (-2 * i / dims) for i in range(half)], dtype=torch.float64)
    z = torch.complex(vector[:half], vector[half:dims]) * torch.polar(
        torch.ones_like(frequencies), position * frequencies
    )
    return torch.cat([z.real, z.imag, vector[dims:]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_softmax_over_the_window(make_config, kv_heads):
    config = make_config(pattern=["local_attention"], local_attention={"kv_heads": kv_heads, "window": 5})
    mixer = LocalAttention(config, LocalBackend())
    init_parameters(mixer, seed=0)
    mixer.double()
    with torch.no_grad():
        mixer.output.bias.normal_(generator=torch.Generator().manual_seed(1))
    lengths = [4, 9]
    x = torch.randn(1, 13, 32, generator=torch.Generator().manual_seed(2)).double()
    ours = mixer(x, LocalContext(Segments.from_lengths([lengths])))[0]
    expected, heads, dims = [], 4, 8
    for document in x[0].split(lengths):
        q, k, v = (document @ layer.weight.T for layer in (mixer.query, mixer.key, mixer.value))
        for i in range(len(document)):
            first, row = max(0, i - 4), []
            for h in range(heads):
                own, shared = slice(h * dims, (h + 1) * dims), h // (heads // kv_heads)
                theirs = slice(shared * dims, (shared + 1) * dims)
                query = turned(q[i, own], i, 4, 10000.0)
                keys = torch.stack([turned(k[j, theirs], j, 4, 10000.0) for j in range(first, i + 1)])
                row.append((keys @ query / math.sqrt(dims)).softmax(0) @ v[first : i + 1, theirs])
            expected.append(torch.cat(row) @ mixer.output.weight.T + mixer.output.bias)
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_scores_depend_on_distance_alone_however_far():
    """fp32 scores at position a million are those at position 0: angles are formed in fp64."""
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(position: int) -> float:
        tables = [rotary_table(torch.tensor([[p]]), 64, 10000.0, torch.float32) for p in (position + 37, position)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum().item()

    assert abs(score(1_000_000) - score(0)) < 1e-4

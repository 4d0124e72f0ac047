"""The ops in one graph: torch.compile finds no break in them, and activation checkpointing repeats their bits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longscan.kernels import (
    Segments,
    attention,
    linear_scan,
    linear_scan_summarize,
    rg_lru,
    rg_lru_summarize,
    short_conv,
)

DOCUMENTS = [([[30, 40], [5, 65]], [3, 0]), ([[30, 40], [5, 5, 60]], [0, 3])]


def make() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 70, 8)] * 3 + [(8,), (8, 4), (2, 8)]
    return [torch.randn(s, generator=rng).requires_grad_() for s in shapes]


def every_op(x, gate_a, gate_x, a_param, weight, state, segments):
    x, tail = short_conv(x, weight, None, None, segments, activation="silu")
    h, final = rg_lru(x, gate_a, gate_x, a_param, state, segments)
    q = h.view(2, 70, 2, 4)
    y = attention(q, q[:, :, :1], q[:, :, 1:], segments, window=16)
    scanned, _ = linear_scan(h, -gate_a.exp(), final, segments)
    summaries = linear_scan_summarize(h, -gate_x.exp(), segments) + rg_lru_summarize(
        x, gate_a, gate_x, a_param, segments
    )
    return y.square().sum() + scanned.sum() + tail.sum() + sum(s.sum() for s in summaries)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend):
    inputs = make()
    compiled = torch.compile(every_op, fullgraph=True, backend=backend)
    for lengths, earlier in DOCUMENTS:
        expected = torch.autograd.grad(every_op(*inputs, Segments.from_lengths(lengths, earlier)), inputs)
        actual = torch.autograd.grad(compiled(*inputs, Segments.from_lengths(lengths, earlier)), inputs)
        for one, other in zip(expected, actual, strict=True):
            torch.testing.assert_close(other, one)


def test_activation_checkpointing():
    inputs, segments = make(), Segments.from_lengths(*DOCUMENTS[0])
    plain = torch.autograd.grad(every_op(*inputs, segments), inputs)
    recomputed = torch.autograd.grad(checkpoint(every_op, *inputs, segments, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))

"""What names say, and which figure of a kind stands."""

import pytest

from longscan.benchmarks.figures import is_sweep, newest, op_of, peer, series, timings
from longscan.benchmarks.kernels import versioned
from longscan.benchmarks.targets import Target


@pytest.mark.parametrize(
    ("work", "name", "tokens"),
    [
        ("linear_scan (1, 8192, 2560) bf16", "linear_scan (1, T, 2560) bf16", 8192),
        ("gates (1, 32768, 16x160) bf16", "gates (1, T, 16x160) bf16", 32768),
        ("attention window 64 B 1 T 2048 H 16/1 K 64 bf16", "attention window 64 B 1 T T H 16/1 K 64 bf16", 2048),
        ("taylor_attention (B, H, T) = (8, 16, 2048) K 16", "taylor_attention (B, H, T) = (8, 16, T) K 16", 2048),
        ("linear_cross_entropy 16384 x 2560 x 32000 bf16", "linear_cross_entropy T x 2560 x 32000 bf16", 16384),
    ],
)
def test_a_work_is_part_of_a_series(work, name, tokens):
    assert series(work) == (name, tokens)


@pytest.mark.parametrize("work", ["matmul 8192^3 bf16", "rotary (32768, 16, 128), 64 dims rotated, bf16"])
def test_a_rate_and_a_shape_without_batch_are_no_series(work):
    assert series(work) is None


def test_an_op_is_the_first_word():
    assert op_of("gates + rg_lru (1, 2, 16x160)") == "gates"


@pytest.mark.parametrize(
    ("work", "swept"),
    [
        ("linear_scan (1, 8192, 2560) bf16", True),
        ("linear_scan (1, 32768, 2560) bf16", False),
        ("linear_scan (8, 2048, 2560) bf16", False),
        ("attention causal B 1 T 131072 H 16/16 K 128", True),
        ("attention causal B 8 T 2048 H 16/16 K 128", False),
        ("taylor_attention (B, H, T) = (1, 16, 2048) K 16", True),
        ("taylor_attention_step B 1 H 16", False),
        ("linear_cross_entropy 131072 x 2560 x 32000 bf16", True),
        ("linear_cross_entropy 16384 x 2560 x 32000 bf16", False),
        ("linear_cross_entropy 8192 x 4096 x 128256 bf16", False),
    ],
)
def test_quick_leaves_the_growth_with_t_out(work, swept):
    assert is_sweep(work) == swept


@pytest.mark.parametrize(
    ("impl", "name"),
    [
        ("longscan, vocabulary slice", "longscan, vocabulary slice"),
        ("fla-core 0.6.0 parallel", "fla-core parallel"),
        ("SDPA flash, no bias, torch 2.11.0+cu130", "SDPA flash, no bias"),
        ("accelerated-scan 0.3.1 (B, D, T)", "accelerated-scan (B, D, T)"),
        ("torch bmm from (B, T, D)", "torch bmm from (B, T, D)"),
    ],
)
def test_a_peer_is_the_same_in_every_version(impl, name):
    assert peer(impl) == name


def test_versions_come_from_the_distribution():
    import torch

    version = torch.__version__.split("+")[0]
    assert versioned("longscan, vocabulary slice") == "longscan, vocabulary slice"
    assert versioned("SDPA flash").startswith(f"SDPA flash, torch {version}")
    assert versioned("torch bmm").startswith(f"torch {version}")
    assert peer(versioned("torch bmm")) == "torch bmm"
    assert peer(versioned("SDPA flash")) == "SDPA flash"
    assert versioned("nobody knows it") == "nobody knows it"


def test_a_newer_version_supersedes(results):
    results(
        {"work": "w", "impl": "Liger fused", "metric": "fwd", "value": 3.0},
        {"work": "w", "impl": "Liger fused, liger-kernel 0.8.5", "metric": "fwd", "value": 2.0},
        {"work": "w", "impl": "longscan", "metric": "fwd", "value": 1.0},
    )
    assert [figure["value"] for figure in newest("kernels")] == [2.0, 1.0]
    assert newest("prepare") == []


def test_timings_put_ours_first_and_fast_peers_before_slow_ones(results):
    def figure(impl, metric, value, floor=0.5):
        return {"work": "w", "impl": impl, "metric": metric, "value": value, "floor": floor}

    results(
        figure("slow", "fwd+bwd", 9.0),
        figure("fast", "fwd+bwd", 2.0),
        figure("longscan", "fwd", 1.0),
        figure("longscan", "fwd+bwd", 4.0),
        figure("longscan", "fwd+bwd peak above inputs", 77.0, None),
        figure("large", "does not fit in", 80.0, None),
    )
    found = timings()
    assert [t.impl for t in found] == ["longscan", "large", "fast", "slow"]
    assert (found[0].forward, found[0].both, found[0].both_floor, found[0].peak) == (1.0, 4.0, 0.5, 77.0)
    assert (found[1].both, found[1].memory_gib) == (None, 80.0)


def test_what_fits_now_is_no_longer_too_large(results):
    results(
        {"work": "w", "impl": "p", "metric": "does not fit in", "value": 80.0},
        {"work": "w", "impl": "p", "metric": "fwd+bwd", "value": 1.0},
    )
    assert timings()[0].memory_gib is None


def test_targets_by_floor_and_by_peer(results):
    def figure(impl, forward, both):
        line = {"work": "attention causal", "impl": impl, "floor": 1.0}
        return {**line, "metric": "fwd", "value": forward}, {**line, "metric": "fwd+bwd", "value": both}

    results(*figure("longscan", 2.0, 6.0), *figure("SDPA flash", 4.0, 9.0), *figure("SDPA cudnn", 2.5, 5.0))
    by_peer = Target("^attention", 1.0, 1.25, "SDPA").reached(timings())
    assert (by_peer.forward, by_peer.both, by_peer.met) == (0.8, 1.2, True)
    by_floor = Target("^attention", 2.0, 5.9).reached(timings())
    assert (by_floor.forward, by_floor.both, by_floor.met) == (2.0, 6.0, False)
    assert Target("^short_conv", 1.0, 1.0).reached(timings()) is None

"""What a rank computes for a micro-batch: the FLOPs and bytes of each op, and the time they take at best and in fact.

An op's floor is the larger of FLOPs over the rate of a large product and bytes over the rate of a copy, each input read
once and each output written once: the floor of the kernels' benchmarks. Its time is that floor times the ratio that was
measured, and never less than its kernels' launches. `both` is forward and backward together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...models.mixer_config import (
    AttentionConfig,
    LinearizedAttentionConfig,
    MixerConfig,
    RGLRUConfig,
    ShortConvConfig,
    TaylorAttentionConfig,
    pairs_per_token,
    taylor_terms,
)
from .load import Load, local_heads
from .machine import Cluster

MIXING, PRODUCTS, AROUND, LOSS, SUMMARIES = (
    "mixers",
    "matrix products",
    "norms, gates, residuals",
    "head and loss",
    "context summaries",
)


@dataclass(frozen=True)
class Ratio:
    """How many times its floor an op takes, forward and both; `work` and `impl` find it among recorded figures."""

    forward: float
    both: float
    work: str = ""
    impl: str = "longscan"


# As measured on one H100 in bf16; those without a work are assumed. `measured_ratios` reads the newest.
RATIOS = {
    "product": Ratio(1.15, 1.15),
    "pointwise": Ratio(1.1, 1.1),
    "norm": Ratio(1.05, 1.07, r"rms_norm \(32768, 2560\) bf16"),
    "gated": Ratio(0.99, 0.99, r"geglu \(32768, 7680\) bf16"),
    "rotary": Ratio(1.11, 1.10, r"rotary \(32768, 16, 128\), 128 dims rotated, bf16"),
    "scan": Ratio(1.16, 1.19, r"rg_lru \(1, 32768, 2560\) bf16"),
    "gates": Ratio(1.51, 1.84, r"gates \(1, 32768, 16x160\) bf16"),
    "conv": Ratio(1.05, 1.11, r"short_conv \(4, 8192, 2560\) 4 taps bf16"),
    "window": Ratio(1.32, 2.51, r"attention window 1024 B 1 T 32768 H 10/1 K 256 bf16"),
    "attention": Ratio(1.19, 1.38, r"attention causal B 1 T 32768 H 16/16 K 128 bf16"),
    "narrow window": Ratio(1.69, 2.09, r"attention window 64 B 1 T 32768 H 16/1 K 64 bf16"),
    "alibi": Ratio(0.29, 0.38, r"attention causal ALiBi B 1 T 32768 H 16/16 K 128 bf16"),
    "taylor": Ratio(4.71, 5.96, r"taylor_attention \(B, H, T\) = \(1, 16, 32768\) K 16 V 64 bf16"),
    "linear attention": Ratio(2.60, 3.13, r"linear_attention group 64 \(B, H, T\) = \(1, 16, 32768\) K 128 V 128 bf16"),
    "loss": Ratio(1.15, 1.11, r"linear_cross_entropy 16384 x 2560 x 32000 bf16"),
    "loss of a slice": Ratio(
        1.15, 1.52, r"linear_cross_entropy 16384 x 2560 x 32000 bf16", "longscan, vocabulary slice"
    ),
}


def measured_ratios(file: Path) -> dict[str, Ratio]:
    """RATIOS with what the newest rows of a results file (`benchmarks/results/*.jsonl`) say of them."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} holds no results that can be read: {error}") from error
    return {name: _newest(ratio, rows) for name, ratio in RATIOS.items()}


def _newest(ratio: Ratio, rows: list[dict[str, Any]]) -> Ratio:
    """`ratio` with the newest times over their floors; a file is appended to, so the last rows are the newest."""
    found = {
        row["metric"]: row["value"] / row["floor"]
        for row in rows
        if row["floor"] and re.fullmatch(ratio.work, row["work"]) and re.fullmatch(ratio.impl, row["impl"])
    }
    return replace(ratio, forward=found.get("fwd", ratio.forward), both=found.get("fwd+bwd", ratio.both))


@dataclass(frozen=True)
class Op:
    """One op of a micro-batch on a rank; pairs are (forward, both).

    Attributes:
        term: what its time is counted under.
        ratio: its entry of RATIOS.
        flops, bytes: its floor's.
        kernels: how many are launched.
    """

    term: str
    ratio: str
    flops: tuple[float, float] = (0.0, 0.0)
    bytes: tuple[float, float] = (0.0, 0.0)
    kernels: tuple[int, int] = (1, 3)

    def seconds(self, cluster: Cluster, ratios: Mapping[str, Ratio]) -> tuple[float, float]:
        """(forward, both)."""
        ratio = ratios[self.ratio]
        floors = (
            max(flops / cluster.gpu.matmul, moved / cluster.gpu.copy)
            for flops, moved in zip(self.flops, self.bytes, strict=True)
        )
        forward, both = (
            max(factor * floor, count * cluster.launch)
            for factor, floor, count in zip((ratio.forward, ratio.both), floors, self.kernels, strict=True)
        )
        return forward, both


def mixer_ops(load: Load, name: str) -> Iterator[Op]:
    """The mixer's ops with its norm and residual sum."""
    yield from _around(load)
    options = load.model.mixer_config(name)
    if isinstance(options, RGLRUConfig):
        yield from _recurrent(load, options)
    elif isinstance(options, ShortConvConfig):
        channels = options.channels(load.model.width) // load.dims.tensor
        yield _products(load, 3 * load.model.width * channels, 3)
        yield from _biases(load, 2 * channels + load.model.width, options.bias)
        yield _moved(load, "conv", channels, 2, 5)
        yield _moved(load, "pointwise", channels, 3, 8)
    elif isinstance(options, TaylorAttentionConfig):
        yield from _taylor(load, options)
    elif isinstance(options, AttentionConfig):
        yield from _attention(load, options)


def mlp_ops(load: Load) -> Iterator[Op]:
    """The MLP's ops with its norm and residual sum."""
    hidden, gated = load.model.mlp.hidden_size(load.model.width) // load.dims.tensor, load.model.mlp.gated
    yield from _around(load)
    yield _products(load, (2 + gated) * load.model.width * hidden, 2 + gated)
    yield from _biases(load, (1 + gated) * hidden + load.model.width, load.model.mlp.bias)
    yield _moved(load, "gated" if gated else "pointwise", hidden, 2 + gated, 5 + 3 * gated, AROUND)


def loss_ops(load: Load) -> Iterator[Op]:
    """The last norm and the loss: three products; of a vocabulary's slice four, of which the floor counts three."""
    model, tokens = load.model, load.tokens
    entries = -(-model.vocab_size // load.dims.tensor) * model.width
    kind = "loss" if load.dims.tensor == 1 else "loss of a slice"
    flops = 2.0 * tokens * entries
    # Its gradient is made, summed over chunks in fp32, rounded and added to that of the step.
    yield Op(LOSS, kind, (0 if load.dims.tensor == 1 else flops, 3 * flops), (0, 18.0 * entries), (2, 8))
    yield _moved(load, "norm", model.width, 2, 5, LOSS)


def _around(load: Load) -> Iterator[Op]:
    """A norm reads and writes the residual stream; the sum reads two and writes one, of gradients too."""
    width = load.model.width * load.residual_tokens / load.tokens
    yield _moved(load, "norm", width, 2, 5, AROUND)
    yield _moved(load, "pointwise", width, 3, 6, AROUND)


def _products(load: Load, entries: int, count: int, term: str = PRODUCTS) -> Op:
    """Linears of so many weights; each weight is read three times, its gradient added to that of the step in fp32."""
    flops = 2.0 * load.tokens * entries
    moved = load.element * entries
    return Op(term, "product", (flops, 3 * flops), (moved, 3 * moved + 10.0 * entries), (count, 4 * count))


def _biases(load: Load, width: float, biased: bool) -> Iterator[Op]:
    """The gradients of biases read those of the linears' outputs, of `width` channels together, once more."""
    if biased:
        yield Op(PRODUCTS, "pointwise", bytes=(0, load.tokens * width * load.element), kernels=(0, 3))


def _moved(load: Load, ratio: str, width: float, forward: int, both: int, term: str = MIXING) -> Op:
    """An op that reads and writes so many tensors of `width` channels a token."""
    size = load.tokens * width * load.element
    return Op(term, ratio, bytes=(forward * size, both * size))


def _recurrent(load: Load, options: RGLRUConfig) -> Iterator[Op]:
    channels = options.channels(load.model.width) // load.dims.tensor
    side = options.channels(load.model.width) // options.gate_blocks
    flops, size = 4.0 * load.tokens * channels * side, load.tokens * channels * load.element
    yield _products(load, 3 * load.model.width * channels, 3)
    yield from _biases(load, 2 * channels + load.model.width, options.bias)
    yield _moved(load, "conv", channels, 2, 5)
    yield Op(MIXING, "gates", (flops, 3 * flops), (3 * size, 7 * size), (1, 3))
    yield _moved(load, "scan", channels, 4, 12)
    # GeLU of one branch, and its product with the other.
    yield _moved(load, "pointwise", channels, 5, 13)
    if load.dims.context > 1:
        # Reads x and the gates; backward one gate and the gradient of h.
        yield _moved(load, "scan", channels, 3, 5, SUMMARIES)


def _taylor(load: Load, options: TaylorAttentionConfig) -> Iterator[Op]:
    heads = options.query_heads(load.model.width) // load.dims.tensor
    yield _products(load, 2 * load.model.width * heads * (options.feature_dim + options.head_dim), 4)
    flops = load.tokens * options.mixing_flops(load.model.width, load.seq_len) / load.dims.tensor
    size = load.tokens * heads * 2 * (options.feature_dim + options.head_dim) * load.element
    yield Op(MIXING, "taylor", (flops / 3, flops), (size, 3 * size), (3, 9))
    if load.dims.context > 1:
        flops = 2.0 * load.tokens * heads * taylor_terms(options.feature_dim) * (options.head_dim + options.normalize)
        # Reads k and v; backward q, y and its gradient.
        yield Op(SUMMARIES, "taylor", (flops, 2 * flops), (size / 2, 1.5 * size), (2, 4))


def _attention(load: Load, options: AttentionConfig) -> Iterator[Op]:
    """Softmax attention; under context parallelism the last rank's, whose queries see the most keys."""
    width, (heads, key_heads) = load.model.width, local_heads(load, options)
    yield _products(load, 2 * width * (heads + key_heads) * options.head_dim, 4)
    size = load.tokens * (heads + key_heads) * options.head_dim * load.element
    if options.rotary_dims:
        yield Op(MIXING, "rotary", bytes=(2.0 * size, 4.0 * size), kernels=(12, 14))
    if isinstance(options, LinearizedAttentionConfig):
        yield from _linearized(load, options, heads, key_heads)
        return
    pairs = pairs_per_token(load.seq_len, options.keys_seen or load.seq_len)
    if options.keys_seen is None:
        pairs = load.seq_len - (load.piece - 1) / 2
    flops = 4.0 * load.tokens * heads * options.head_dim * pairs
    kind = "window" if options.keys_seen else "alibi" if options.position == "alibi" else "attention"
    yield Op(MIXING, kind, (flops, 3.5 * flops), (2 * size, 6 * size), (1, 4))


def _linearized(load: Load, options: LinearizedAttentionConfig, heads: int, key_heads: int) -> Iterator[Op]:
    """Attention inside groups, linear attention across them, the filter, and what stands between."""
    width, features, size = options.head_dim, options.features, load.tokens * load.element
    flops = 4.0 * load.tokens * heads * width * (options.group + 1) / 2
    moved = 2 * size * (heads + key_heads) * width
    yield Op(MIXING, "narrow window", (flops, 3.5 * flops), (moved, 3 * moved), (1, 4))
    key_heads = heads if options.projected else key_heads
    flops = 2.0 * load.tokens * heads * features * (width + options.normalize)
    queries, keys, outputs = size * heads * features, size * key_heads * (features + width), size * heads * width
    moved = (queries + keys + outputs, 3 * (queries + keys) + 2 * outputs)
    yield Op(MIXING, "linear attention", (2 * flops, 6 * flops), moved, (5, 14))
    yield _moved(load, "conv", heads * width, 2, 5)
    # Feature maps, branches and their sum.
    yield _moved(load, "pointwise", heads * width, 18, 42)
    if load.dims.context > 1:
        # Reads k and v; backward q, y and its gradient.
        yield Op(SUMMARIES, "linear attention", (flops, 2 * flops), (keys, keys + queries + 2 * outputs), (4, 8))


def state_elements(load: Load, options: MixerConfig) -> tuple[int, int]:
    """fp32 numbers a row of (the state, the transition) that a mixer hands to the next piece; (0, 0) if it has none."""
    width, tensor = load.model.width, load.dims.tensor
    if isinstance(options, RGLRUConfig):
        channels = options.channels(width) // tensor
        return channels, channels
    if isinstance(options, TaylorAttentionConfig):
        heads = options.query_heads(width) // tensor
        return heads * taylor_terms(options.feature_dim) * (options.head_dim + options.normalize), 1
    if isinstance(options, LinearizedAttentionConfig):
        heads, key_heads = local_heads(load, options)
        slots = 2 * (heads if options.projected else key_heads)
        return slots * options.features * (options.head_dim + options.normalize), slots
    return 0, 0


def halo_elements(load: Load, options: MixerConfig) -> list[tuple[int, int]]:
    """(entries a row, elements an entry) of each halo that a mixer asks for."""
    width, tensor = load.model.width, load.dims.tensor
    if isinstance(options, RGLRUConfig):
        return [(options.conv_taps - 1, options.channels(width) // tensor)]
    if isinstance(options, ShortConvConfig):
        return [(options.taps - 1, options.channels(width) // tensor)]
    if not isinstance(options, AttentionConfig):
        return []
    entry = local_heads(load, options)[1] * options.head_dim
    behind = (load.dims.context - 1) * load.piece
    reach = behind if options.keys_seen is None else min(options.keys_seen - 1, behind)
    return [(reach, 2 * entry)]

"""Works of the attention op, with FlexAttention and scaled_dot_product_attention beside it; `--tune` times tiles.

Inputs are [B, T, H, K] for every implementation; the peers get transposed views, as a model would hand them over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longscan.kernels import Segments, attention
from longscan.kernels.attention import kernel, reference
from longscan.kernels.attention.scoring import Scoring

from .gpu_timing import Work, milliseconds


class Case(NamedTuple):
    """A shape of the table: no window means all earlier keys, `document` is the length of each of a row's documents.

    Slopes are ALiBi's, 2^(-8 / H) to 2^-8 ("geometric"), or so small that no key is out of reach ("flat").
    """

    batch: int
    tokens: int
    heads: int
    key_heads: int
    dim: int
    window: int | None = None
    slopes: str | None = None
    document: int | None = None
    peers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the table prints it."""
        kind = "causal" if self.window is None else f"window {self.window}"
        bias = {None: "", "geometric": " ALiBi", "flat": " flat ALiBi"}[self.slopes]
        documents = f" documents {self.document}" if self.document else ""
        sizes = f"B {self.batch} T {self.tokens} H {self.heads}/{self.key_heads} K {self.dim}"
        return f"attention {kind}{bias}{documents} {sizes} bf16"

    @property
    def pairs(self) -> int:
        """Query-key pairs of one row and head."""
        length = self.document or self.tokens
        reach = min(self.window or length, length)
        return self.tokens // length * (reach * (reach + 1) // 2 + (length - reach) * reach)

    @property
    def flops(self) -> int:
        """Of one matrix product over all pairs and heads."""
        return 2 * self.batch * self.heads * self.pairs * self.dim

    def alibi_slopes(self) -> Tensor | None:
        """fp32 [H] or None."""
        exponents = torch.arange(1, self.heads + 1, device="cuda") * (-8 / self.heads)
        return {None: None, "geometric": exponents.exp2(), "flat": (exponents - 40).exp2()}[self.slopes]

    def segments(self) -> Segments | None:
        """Documents of equal length, or None."""
        if self.document is None:
            return None
        return Segments.from_lengths([[self.document] * (self.tokens // self.document)] * self.batch, device="cuda")


LONG, LENGTHS = (1, 32768, 16, 16, 128), (2048, 8192, 131072)
# FlexAttention compiles for 10 to 20 s a case, so not all have it.
CASES = (
    Case(1, 32768, 10, 1, 256, 1024, peers=("flex",)),
    Case(8, 2048, 10, 1, 256, 1024),
    Case(1, 32768, 16, 1, 128, 2048, peers=("flex",)),
    Case(1, 32768, 16, 1, 64, 64, peers=("flex",)),
    Case(*LONG, slopes="geometric", peers=("flex", "cudnn, no bias")),
    Case(*LONG, slopes="flat", peers=("cudnn, no bias",)),
    Case(8, 2048, 16, 16, 128, slopes="geometric", peers=("cudnn, no bias",)),
    Case(*LONG, document=4096, peers=("flex",)),
    Case(*LONG, peers=("triton", "flash", "cudnn")),
    Case(8, 2048, 16, 16, 128, peers=("triton", "cudnn")),
    Case(1, 32768, 16, 1, 128, peers=("triton", "cudnn")),
    Case(1, 32768, 16, 16, 64, peers=("triton", "cudnn")),
    *(Case(1, tokens, 16, 1, 128, 2048, peers=("flex",)) for tokens in LENGTHS),
    *(Case(1, tokens, 16, 16, 128, slopes="geometric", peers=("flex", "cudnn, no bias")) for tokens in LENGTHS),
    *(Case(1, tokens, 16, 16, 128, peers=("triton", "flash", "cudnn")) for tokens in LENGTHS),
)


def inputs_of(case: Case) -> list[Tensor]:
    """q, k and v with unit variance."""
    shapes = [(case.batch, case.tokens, h, case.dim) for h in (case.heads, case.key_heads, case.key_heads)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]


def works(cases: Iterable[Case] = CASES) -> Iterable[Work]:
    """Ours and each peer of each case; lazily, since the inputs of all do not need to exist at once."""
    for case in cases:
        inputs = inputs_of(case)
        moved = sum(t.nbytes for t in inputs)
        make = partial(
            Work,
            case.name,
            inputs,
            forward_bytes=moved + inputs[0].nbytes,
            both_bytes=3 * moved + 3 * inputs[0].nbytes,
            forward_flops=2 * case.flops,
            both_flops=7 * case.flops,
        )
        ours = partial(attention, segments=case.segments(), window=case.window, alibi_slopes=case.alibi_slopes())
        yield make(ours)
        for peer in case.peers:
            if peer == "flex":
                yield make(flex(case), impl="FlexAttention")
            elif peer == "triton":
                yield make(partial(ours, implementation="triton"), impl="longscan, implementation=triton")
            else:
                yield make(partial(dense, backend=BACKENDS[peer.split(",")[0]]), impl=f"SDPA {peer}")


BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """Causal attention by one of PyTorch's own kernels."""
    with sdpa_kernel(backend):
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        shared = q.shape[2] != k.shape[2]
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
    return y.transpose(1, 2)


def flex(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The case by FlexAttention, compiled for it; its block mask is made by the first call, which is not timed."""
    bias = case.alibi_slopes()
    window, document = case.window or case.tokens, case.document or case.tokens
    # Past a few shapes PyTorch would run it uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def keep(b, h, i, j):
        return (i >= j) & (i - j < window) & (i // document == j // document)

    def penalise(score, b, h, i, j):
        return score if bias is None else score - bias[h] * (i - j)

    @cache
    def mask() -> BlockMask:
        # Uncompiled it holds a number for each pair of tokens.
        make = torch.compile(create_block_mask) if case.tokens > LONG[1] else create_block_mask
        return make(keep, None, None, case.tokens, case.tokens, device="cuda")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = compiled(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=None if bias is None else penalise,
            block_mask=mask(),
            enable_gqa=case.heads != case.key_heads,
        )
        return y.transpose(1, 2)

    return call


# The cases whose tiles are compared, and for each pass of them the tiles, the likeliest first.
T = kernel.Tile
SINGLE = {
    "forward": [
        T(64, 64, 4, 3),
        T(128, 64, 8, 3),
        T(128, 128, 8, 2),
        T(64, 64, 4, 2),
        T(64, 64, 4, 4),
        T(64, 128, 4, 2),
    ],
    "dq": [T(128, 64, 8, 3), T(64, 64, 4, 2), T(64, 64, 4, 3), T(128, 64, 8, 2)],
    "dkv": [T(64, 128, 8, 3), T(64, 128, 8, 2), T(32, 128, 8, 3), T(64, 64, 4, 2), T(64, 64, 4, 3)],
}
CANDIDATES: dict[Case, dict[str, list[kernel.Tile]]] = {
    Case(1, 32768, 10, 1, 256, 1024): {
        "dk": [T(32, 128, 8, 2), T(32, 128, 8, 3), T(64, 128, 8, 1)],
        "dv": [T(64, 128, 8, 2), T(32, 128, 8, 3), T(32, 128, 8, 2)],
        "dq": [T(128, 32, 8, 2), T(64, 32, 4, 2), T(128, 64, 8, 1)],
    },
    Case(1, 32768, 16, 1, 128, 2048): {
        "dkv": [T(64, 128, 8, 3), T(64, 128, 8, 2), T(64, 64, 4, 2), T(32, 128, 8, 3), T(32, 128, 8, 4)],
        "dq": [T(64, 64, 4, 2), T(128, 64, 8, 3), T(64, 128, 4, 2), T(128, 128, 8, 2), T(64, 64, 4, 3)],
        "forward": [T(64, 64, 4, 3), T(128, 64, 8, 3), T(64, 128, 4, 2)],
    },
    Case(1, 32768, 16, 1, 64, 64): {
        "forward": [T(64, 128, 4, 1), T(64, 64, 4, 2), T(64, 32, 4, 3), T(128, 128, 8, 1), T(128, 64, 4, 3)],
        "dq": [T(64, 64, 4, 2), T(64, 32, 4, 3), T(64, 128, 4, 1), T(128, 32, 4, 2), T(128, 64, 4, 3)],
        "dkv": [T(64, 64, 4, 3), T(64, 64, 4, 2), T(32, 64, 4, 3), T(64, 128, 8, 2), T(128, 64, 4, 2)],
    },
    Case(*LONG, slopes="flat"): SINGLE,
    Case(8, 2048, 16, 16, 128, slopes="geometric"): SINGLE,
}


def scoring_of(case: Case) -> Scoring:
    """What the passes take of the case beside its tensors."""
    return Scoring(None, case.alibi_slopes(), case.window, 0, case.dim**-0.5)


class Pass(NamedTuple):
    """A pass by itself: its call, and the tensors it should give."""

    run: Callable[[], Iterable[Tensor]]
    exact: tuple[Tensor, ...]


def passes_of(case: Case) -> dict[str, Pass]:
    """The passes on random inputs, with what the reference gives in fp32."""
    torch.manual_seed(0)
    inputs, scoring = [t.detach() for t in inputs_of(case)], scoring_of(case)
    dy = torch.randn_like(inputs[0])
    wide = [t.float() for t in inputs]
    y, lse = reference.forward(*wide, scoring)
    dq, dk, dv = reference.backward(dy.float(), *wide, y, lse, scoring)
    delta = (dy * y).sum(-1).unflatten(2, (case.key_heads, -1)).transpose(1, 2).flatten(2).contiguous()
    q, k, v = inputs
    norms = kernel.largest_norms(q, k, scoring)
    both = partial(kernel.backward_keys, dy, q, k, v, lse, delta, norms, scoring)
    return {
        "forward": Pass(partial(kernel.forward, q, k, v, scoring), (y,)),
        "dq": Pass(partial(kernel.backward_queries, dy, q, k, v, y.to(q.dtype), lse, norms, scoring), (dq,)),
        "dkv": Pass(both, (dk, dv)),
        "dk": Pass(both, (dk, dv)),
        "dv": Pass(both, (dk, dv)),
    }


def use(case: Case, work: str, tile: kernel.Tile) -> None:
    """Makes the op take that tile for that pass of the case, and no kernel but Triton's."""
    kernel.LEAST_TOKENS = sys.maxsize
    narrow = case.window is not None and case.window <= kernel.NARROW
    tiles = kernel.SINGLE_TILES if case.heads == case.key_heads else kernel.NARROW_TILES if narrow else kernel.TILES
    tiles.setdefault(work, {})[case.dim] = tile


def compile_one(case: Case, work: str, tile: kernel.Tile) -> None:
    """Leaves the compiled pass in Triton's cache on disk."""
    use(case, work, tile)
    measured(passes_of(case)[work], 1)


def candidates(cases: Iterable[Case]) -> None:
    """Prints time and error of each pass with each tile; compiles them all first, many at a time.

    "dk" and "dv" are timed together, the other with its own tile.
    """
    # Compiled for fewer tokens, but more than a window has; cases that differ in batch, tokens or slopes share kernels.
    small = [(c, c._replace(batch=1, tokens=4096, slopes=c.slopes and "flat")) for c in cases]
    tried = {(s, w, t): None for c, s in small for w, tiles in CANDIDATES[c].items() for t in tiles}
    with ProcessPoolExecutor(16, get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*tried, strict=True)))
    for case in cases:
        passes = passes_of(case)
        for work, tiles in CANDIDATES[case].items():
            for tile in tiles:
                use(case, work, tile)
                print(f"{case.name}: {work} {tuple(tile)} {measured(passes[work])}", flush=True)
            use(case, work, tiles[0])


def measured(one: Pass, repeat: int = 7) -> str:
    """Its milliseconds and its largest error relative to the reference, or why it does not run."""
    try:
        found = zip(one.run(), one.exact, strict=False)
        error = max(float((a.float() - b).norm() / b.norm()) for a, b in found)
        return f"{milliseconds(one.run, repeat, 1):.3f} ms, error {error:.1e}"
    except Exception as error:  # a tile beyond the machine's shared memory is an answer here
        return f"{type(error).__name__}: {str(error)[:80]}"


def main() -> None:
    """`--tune` prints the candidates; `--case` picks some by index."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--case", type=int, nargs="*", default=range(len(CANDIDATES)))
    cases = list(CANDIDATES)
    candidates([cases[i] for i in parser.parse_args().case])


if __name__ == "__main__":
    main()

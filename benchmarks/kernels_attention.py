"""Works of the attention op, with FlexAttention and scaled_dot_product_attention beside it; `--tune` times tiles.

Inputs are [B, T, H, K] for every implementation; the peers get transposed views, as a model would hand them over.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longscan.kernels import attention
from longscan.kernels.attention import kernel

from .gpu_timing import Work, milliseconds


class Case(NamedTuple):
    """A shape of the table: key heads are `key_heads`; no window means all earlier keys."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    dim: int
    window: int | None = None
    alibi: bool = False

    @property
    def name(self) -> str:
        """As the table prints it."""
        kind = "causal" if self.window is None else f"window {self.window}"
        bias = " ALiBi" if self.alibi else ""
        return (
            f"attention {kind}{bias} B {self.batch} T {self.tokens} H {self.heads}/{self.key_heads} K {self.dim} bf16"
        )

    @property
    def pairs(self) -> int:
        """Query-key pairs of one row and head."""
        reach = min(self.window or self.tokens, self.tokens)
        return reach * (reach + 1) // 2 + (self.tokens - reach) * reach

    @property
    def flops(self) -> int:
        """Of one matrix product over all pairs and heads."""
        return 2 * self.batch * self.heads * self.pairs * self.dim


CASES = (
    Case(1, 32768, 10, 1, 256, 1024),
    Case(8, 2048, 10, 1, 256, 1024),
    Case(1, 32768, 16, 1, 128, 2048),
    Case(1, 32768, 16, 1, 64, 64),
    Case(1, 32768, 16, 16, 128, None, True),
    Case(8, 2048, 16, 16, 128, None, True),
    Case(1, 32768, 16, 16, 128),
)


def slopes(heads: int) -> Tensor:
    """ALiBi's geometric slopes, 2^(-8 / H) to 2^-8."""
    return torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device="cuda")


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
        bias = slopes(case.heads) if case.alibi else None
        yield make(partial(attention, window=case.window, alibi_slopes=bias, implementation="triton"))
        yield make(flex(case), impl="FlexAttention")
        if case.window is None:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                note = ", no bias" if case.alibi else ""
                yield make(partial(dense, backend=backend), impl=f"SDPA {backend.name.split('_')[0].lower()}{note}")


def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """Causal attention by one of PyTorch's own kernels."""
    with sdpa_kernel(backend):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    return y.transpose(1, 2)


@lru_cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def flex(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The case by FlexAttention, compiled for it; its block mask is made here and not timed."""
    bias = slopes(case.heads) if case.alibi else None
    window = case.window or case.tokens

    def keep(b, h, i, j):
        return (i >= j) & (i - j < window)

    def penalise(score, b, h, i, j):
        return score if bias is None else score - bias[h] * (i - j)

    mask = create_block_mask(keep, None, None, case.tokens, case.tokens, device="cuda")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = _compiled()(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=None if bias is None else penalise,
            block_mask=mask,
            enable_gqa=case.heads != case.key_heads,
        )
        return y.transpose(1, 2)

    return call


# Per work and padded head dim, tiles to compare.
T = kernel.Tile
CANDIDATES = {
    ("forward", 256): [T(128, 64, 8, 2), T(128, 32, 8, 3), T(64, 64, 4, 2), T(128, 64, 8, 1)],
    ("forward", 128): [T(128, 128, 8, 2), T(128, 64, 8, 3), T(128, 64, 4, 3), T(128, 64, 4, 2), T(64, 64, 4, 3)],
    ("forward", 64): [T(128, 64, 4, 3), T(128, 32, 4, 3), T(64, 64, 4, 2), T(256, 64, 8, 2), T(128, 128, 8, 2)],
    ("dq", 256): [T(64, 32, 4, 2), T(64, 64, 4, 1), T(128, 64, 8, 1), T(128, 32, 8, 2), T(64, 64, 8, 1)],
    ("dq", 128): [T(128, 64, 8, 2), T(128, 64, 8, 3), T(64, 64, 4, 2), T(64, 128, 8, 2), T(128, 128, 8, 1)],
    ("dq", 64): [T(128, 64, 4, 3), T(128, 64, 8, 2), T(64, 64, 4, 2), T(128, 32, 4, 2)],
    ("dkv", 256): [T(64, 64, 8, 2), T(32, 64, 8, 2), T(64, 64, 8, 1), T(64, 64, 4, 1), T(32, 64, 4, 2)],
    ("dkv", 128): [T(64, 128, 8, 2), T(64, 64, 4, 2), T(64, 128, 8, 3), T(128, 128, 8, 1), T(32, 128, 8, 2)],
    ("dkv", 64): [T(64, 64, 4, 2), T(64, 128, 8, 2), T(128, 64, 4, 2), T(128, 128, 8, 2), T(64, 32, 4, 2)],
}


def runs_of(case: Case) -> dict[str, Callable[[], object]]:
    """The three passes, each by itself."""
    q, k, v = (t.detach() for t in inputs_of(case))
    options = (None, slopes(case.heads) if case.alibi else None, case.window, 0, case.dim**-0.5)
    y, lse = torch.empty_like(q), torch.zeros(q.shape[:3], device="cuda")
    dy = torch.randn_like(q)
    return {
        "forward": partial(kernel.forward, q, k, v, *options),
        "dq": partial(kernel.backward_queries, dy, q, k, v, y, lse, *options),
        "dkv": partial(kernel.backward_keys, dy, q, k, v, lse, torch.zeros_like(lse), *options),
    }


def use(case: Case, work: str, tile: kernel.Tile) -> None:
    """Makes the op take that tile for that pass of the case."""
    tiles = kernel.SINGLE_TILES if case.heads == case.key_heads else kernel.TILES
    tiles[work][case.dim] = tile


def compile_one(case: Case, work: str, tile: kernel.Tile) -> None:
    """Leaves the compiled pass in Triton's cache on disk."""
    use(case, work, tile)
    timed(runs_of(case._replace(tokens=2048))[work], 1)


def candidates(cases: Iterable[Case]) -> None:
    """Prints the time of each pass with each tile; compiles them all first, many at a time."""
    tried = [(c, w, t) for c in cases for w in kernel.TILES for t in CANDIDATES[w, c.dim]]
    with ProcessPoolExecutor(12, get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*tried, strict=True)))
    for case in cases:
        runs = runs_of(case)
        for _, work, tile in (t for t in tried if t[0] == case):
            use(case, work, tile)
            print(f"{case.name}: {work} {tuple(tile)} {timed(runs[work])}", flush=True)


def timed(run: Callable[[], object], repeat: int = 7) -> str:
    """Its milliseconds, or why it does not run."""
    try:
        return f"{milliseconds(run, repeat, 1):.3f} ms"
    except Exception as error:  # a tile beyond the machine's shared memory is an answer here
        return f"{type(error).__name__}: {str(error)[:80]}"


def main() -> None:
    """`--tune` prints the candidates; `--case` picks some by index."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--case", type=int, nargs="*", default=[0, 2, 3, 4, 6])
    candidates([CASES[i] for i in parser.parse_args().case])


if __name__ == "__main__":
    main()

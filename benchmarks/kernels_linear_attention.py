"""linear_attention for benchmarks.kernels: plain, normalised, with decays and over groups; `--tune` times other cuts.

python -m benchmarks.kernels_linear_attention --tune
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.kernels import linear_attention
from longscan.kernels.linear_attention import cuts, kernel

from .gpu_timing import Work, milliseconds


class Case(NamedTuple):
    """One shape, K = V, and what the op is asked for."""

    batch: int
    heads: int
    tokens: int
    dim: int
    mode: str = "sums"

    @property
    def name(self) -> str:
        """The same string for every implementation."""
        shape = (self.batch, self.heads, self.tokens)
        return f"linear_attention {self.mode} (B, H, T) = {shape} K {self.dim} V {self.dim} bf16"

    @property
    def options(self) -> dict[str, Any]:
        """The op's."""
        group = 64 if self.mode == "group 64" else None
        return {"group": group, "normalize": self.mode in ("normalized", "group 64")}


LONG, SHORT = (1, 16, 32768), (8, 16, 2048)
CASES = (
    *(Case(*shape, dim) for dim in (64, 128) for shape in (LONG, SHORT)),
    *(Case(*LONG, 64, mode) for mode in ("normalized", "decays", "group 64")),
    Case(*SHORT, 64, "group 64"),
    Case(*LONG, 128, "group 64"),
    *(Case(1, 16, tokens, 64) for tokens in (2048, 8192, 131072)),
)


def make(case: Case) -> list[Tensor]:
    """q, k and v in bf16 with positive features, and log_a with memories of 10 to 1000 tokens."""
    shape = (case.batch, case.tokens, case.heads)
    q, k, v = (torch.randn(*shape, case.dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [q.abs(), k.abs(), v]
    if case.mode == "decays":
        inputs.append(-(0.1 ** (1 + 2 * torch.rand(shape, device="cuda"))))
    return [t.requires_grad_() for t in inputs]


def peers(case: Case) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """The names and calls of those that are installed and do the same."""
    if importlib.util.find_spec("fla") is None or case.mode == "group 64":
        return
    from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

    version = importlib.metadata.version("fla-core")
    if case.mode == "decays":
        yield f"fla-core {version} simple_gla", lambda q, k, v, a: chunk_simple_gla(q, k, v, g=a, scale=1.0)[0]
        return
    for name, op in (("chunk", chunk_linear_attn), ("fused_chunk", fused_chunk_linear_attn)):
        call = partial(op, scale=1.0, normalize=case.mode == "normalized")
        yield f"fla-core {version} {name}", lambda *a, call=call: call(*a)[0]
    if case.mode == "sums" and (case.batch, case.heads, case.tokens) in (LONG, SHORT):
        yield f"fla-core {version} retention", lambda *a: chunk_retention(*a)[0]


def works() -> Iterator[Work]:
    """Ours of each case, then each peer of each, since fla's kernels tune themselves for 90 s at a width; lazily.

    Forward reads q, k, v and log_a and writes y; backward reads those and dy and writes the gradients. FLOPs by the
    state alone: twice 2 K V a token and head, and twice that again in the backward pass.
    """
    for case in CASES:
        yield _work(case, partial(_ours, case), "longscan")
    for case in CASES:
        for impl, call in peers(case):
            yield _work(case, call, impl)


def _work(case: Case, call: Callable[..., Tensor], impl: str) -> Work:
    inputs = make(case)
    moved = sum(t.nbytes for t in inputs)
    flops = 4 * case.dim**2 * case.batch * case.heads * case.tokens
    sizes = (moved + inputs[2].nbytes, 3 * moved + 2 * inputs[2].nbytes, flops, 3 * flops)
    return Work(case.name, inputs, call, *sizes, impl)


def _ours(case: Case, *inputs: Tensor, implementation: str = "triton") -> Tensor:
    return linear_attention(*inputs, **case.options, implementation=implementation)[0]


# What `--tune` changes in cuts.py and kernel.py; for every width, the tile.
T = kernel.Tile
CANDIDATES: tuple[dict[str, Any], ...] = (
    {},
    {"tile": T(64, 4, 2)},
    {"PROGRAMS": 396},
    {"PROGRAMS": 792, "ENOUGH": 2**30},
    {"PROGRAMS": 264, "ENOUGH": 2**30},
    {"tile": T(64, 8, 2), "CHUNK": 128},
    {"tile": T(32, 4, 3)},
    {"tile": T(64, 4, 4)},
    {"tile": T(128, 8, 1), "CHUNK": 128},
)
TUNED = (*CASES[:3], Case(*LONG, 128, "group 64"))


def use(changed: dict[str, Any]) -> None:
    """Makes the kernel take those settings."""
    for name, value in changed.items():
        if name == "tile":
            kernel.TILES = dict.fromkeys(kernel.TILES, value)
        else:
            setattr(cuts if hasattr(cuts, name) else kernel, name, value)


def compile_one(case: Case, changed: dict[str, Any]) -> None:
    """Leaves the compiled passes in Triton's cache on disk; what fails here fails again where it is told."""
    use(changed)
    inputs = make(case)
    try:
        torch.autograd.grad(_ours(case, *inputs).sum(), inputs)
    except Exception:
        return


def candidates() -> None:
    """Prints a line for each case and cut: both times, and errors of y and the gradients against the reference."""
    before = {"PROGRAMS": cuts.PROGRAMS, "ENOUGH": cuts.ENOUGH, "CHUNK": kernel.CHUNK, "TILES": kernel.TILES}
    tried = [(case, changed) for case in TUNED for changed in CANDIDATES]
    begin = time.perf_counter()
    with ProcessPoolExecutor(12, get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*tried, strict=True)))
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    for case in TUNED:
        inputs = make(case)
        grad = torch.randn_like(inputs[2])
        exact = outputs(case, [t.detach().float().requires_grad_() for t in inputs], grad.float(), "reference")
        for changed in CANDIDATES:
            use(changed)
            print(f"{case.name}: {changed or 'as is'} {_candidate(case, inputs, grad, exact)}", flush=True)
            use(before)


def outputs(case: Case, inputs: list[Tensor], grad: Tensor, implementation: str = "triton") -> list[Tensor]:
    """y and the gradients."""
    y = _ours(case, *inputs, implementation=implementation)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def _candidate(case: Case, inputs: list[Tensor], grad: Tensor, exact: list[Tensor]) -> str:
    def forward() -> None:
        with torch.no_grad():
            _ours(case, *inputs)

    def both() -> list[Tensor]:
        return outputs(case, inputs, grad)

    try:
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(both(), exact, strict=True)]
        told = " ".join(f"{error:.1e}" for error in errors)
        return f"{milliseconds(forward, 10, 1):.3f} / {milliseconds(both, 10, 1):.3f} ms; errors {told}"
    except Exception as error:  # a cut that does not build says so among the others
        return f"{type(error).__name__}: {str(error)[:120]}"


if __name__ == "__main__":
    if "--tune" not in sys.argv:
        sys.exit("benchmarks.kernels measures this op; here only --tune")
    candidates()

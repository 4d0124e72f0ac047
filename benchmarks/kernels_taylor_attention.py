"""taylor_attention of Based (K 16, V 64) for benchmarks.kernels; `--tune` times each kernel under other cuts.

python -m benchmarks.kernels_taylor_attention --tune
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longscan.kernels import taylor_attention, taylor_attention_step

from .gpu_timing import Work, milliseconds

KEY_DIM, VALUE_DIM, TERMS = 16, 64, 153
SHAPES = ((1, 16, 32768), (8, 16, 2048))
GROWTH = ((1, 16, 2048), (1, 16, 8192), (1, 16, 131072))
STEP_BATCHES = (1, 8, 64)
# What `--tune` changes in kernel.py; it starts no candidate later than so many seconds after the first.
CANDIDATES: tuple[dict[str, Any], ...] = (
    {},
    {"STAGES": 3, "STATE_STAGES": 3},
    {"REGISTERS": None, "STATE_REGISTERS": 168},
    {"BLOCK": 64, "STAGES": 3, "REGISTERS": None, "STATE_PART": 128},
    {"PART": 128, "PROGRAMS": 1536},
    {"CHUNK": 64, "PROGRAMS": 384},
)
TUNE_S = 45.0


def make(batch: int, heads: int, tokens: int) -> list[Tensor]:
    """q, k and v in bf16."""
    widths = (KEY_DIM, KEY_DIM, VALUE_DIM)
    shape = (batch, tokens, heads)
    return [torch.randn(*shape, w, device="cuda", dtype=torch.bfloat16).requires_grad_() for w in widths]


def peers() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """The names and calls of those that are installed."""
    if importlib.util.find_spec("fla") is None:
        return
    from fla.ops.based import fused_chunk_based, parallel_based

    version = importlib.metadata.version("fla-core")
    yield f"fla-core {version} parallel", lambda q, k, v: parallel_based(q, k, v, use_norm=True)
    yield f"fla-core {version} fused_chunk", lambda q, k, v: fused_chunk_based(q, k, v, use_norm=True)


def works() -> list[Work]:
    """Ours and the peers at every shape; then decoding, one token a row.

    Forward reads q, k, v and writes y; backward reads those and dy and writes three gradients. FLOPs by the 153 packed
    terms: twice 2 F (V + 1) a token, and twice that again in the backward pass.
    """
    found = []
    for shape in (*SHAPES, *GROWTH):
        batch, heads, tokens = shape
        inputs = make(*shape)
        moved = sum(t.nbytes for t in inputs) + inputs[2].nbytes
        flops = 4 * TERMS * (VALUE_DIM + 1) * batch * heads * tokens
        calls = [("longscan", lambda *a: taylor_attention(*a)[0]), *peers()]
        name = f"taylor_attention (B, H, T) = {shape} K {KEY_DIM} V {VALUE_DIM} bf16"
        found += [Work(name, inputs, call, moved, 3 * moved, flops, 3 * flops, impl) for impl, call in calls]
    return found + [_step(batch) for batch in STEP_BATCHES]


def _step(batch: int) -> Work:
    """A token of `batch` rows: reads the state and writes the next."""
    *inputs, v = (t[:, 0].detach() for t in make(batch, 16, 1))
    state = torch.zeros(batch, 16, TERMS, VALUE_DIM + 1, device="cuda")
    moved = 2 * state.nbytes + sum(t.nbytes for t in inputs) + 2 * v.nbytes
    name = f"taylor_attention_step (B, H) = ({batch}, 16) K {KEY_DIM} V {VALUE_DIM} bf16"
    return Work(name, [*inputs, v, state], lambda *a: taylor_attention_step(*a)[0], moved, 0)


def candidates() -> None:
    """Prints a line for each cut and shape: both times, errors against fp32, and each kernel's own milliseconds.

    Settings of the states and of the kernels over chunks vary together, since the kernels' own times tell them apart.
    """
    from longscan.kernels.taylor_attention import kernel

    wanted = [(shape, inputs, torch.randn_like(inputs[2])) for shape in SHAPES for inputs in [make(*shape)]]
    exact = [_outputs([t.detach().float().requires_grad_() for t in i], g.float(), "reference") for _, i, g in wanted]
    begin = time.perf_counter()
    for changed in CANDIDATES:
        if time.perf_counter() - begin > TUNE_S:
            break
        before = {name: getattr(kernel, name) for name in changed}
        vars(kernel).update(changed)
        for (shape, inputs, grad), reference in zip(wanted, exact, strict=True):
            print(f"{changed or 'as is'} {shape}: {_candidate(inputs, grad, reference)}", flush=True)
        vars(kernel).update(before)


def _candidate(inputs: list[Tensor], grad: Tensor, reference: list[Tensor]) -> str:
    def forward() -> None:
        with torch.no_grad():
            taylor_attention(*inputs)

    def both() -> list[Tensor]:
        return _outputs(inputs, grad, "triton")

    try:
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(both(), reference, strict=True)]
        told = " ".join(f"{error:.1e}" for error in errors)
        times = f"{milliseconds(forward, 20):.3f} / {milliseconds(both, 20):.3f} ms"
        return f"{times}; errors {told}; {_kernels(both)}"
    except Exception as error:  # a cut that does not build says so among the others
        return f"{type(error).__name__}: {str(error)[:200]}"


def _outputs(inputs: list[Tensor], grad: Tensor, implementation: str) -> list[Tensor]:
    """y and the three gradients."""
    y, _ = taylor_attention(*inputs, implementation=implementation)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def _kernels(run: Callable[[], None]) -> str:
    """The mean milliseconds of each kernel in a call of `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    spent = [(e.key.split("(")[0][:28], e.device_time_total / 5e3, e.count / 5) for e in profile.key_averages()]
    return ", ".join(f"{name} x{count:g} {time:.3f}" for name, time, count in sorted(spent, key=lambda s: -s[1])[:9])


if __name__ == "__main__":
    if "--tune" not in sys.argv:
        sys.exit("benchmarks.kernels measures this op; here only --tune")
    candidates()

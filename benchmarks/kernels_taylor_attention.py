"""taylor_attention of Based (K 16, V 64) for benchmarks.kernels; `--tune` times each kernel under other cuts.

python -m benchmarks.kernels_taylor_attention --tune
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longscan.kernels import taylor_attention

from .gpu_timing import Work, milliseconds

KEY_DIM, VALUE_DIM = 16, 64
SHAPES = ((1, 16, 32768), (8, 16, 2048))
GROWTH = ((1, 16, 2048), (1, 16, 8192), (1, 16, 131072))


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
    """Ours at every shape; peers at the two of the target.

    Forward reads q, k, v and writes y; backward reads those and dy and writes three gradients. FLOPs by the 153 packed
    terms: twice 2 F (V + 1) a token, and twice that again in the backward pass.
    """
    found = []
    for shape in (*SHAPES, *GROWTH):
        batch, heads, tokens = shape
        inputs = make(*shape)
        moved = sum(t.nbytes for t in inputs) + inputs[2].nbytes
        flops = 4 * 153 * (VALUE_DIM + 1) * batch * heads * tokens
        calls = [("longscan", lambda *a: taylor_attention(*a)[0]), *(peers() if shape in SHAPES else ())]
        name = f"taylor_attention (B, H, T) = {shape} K {KEY_DIM} V {VALUE_DIM} bf16"
        found += [Work(name, inputs, call, moved, 3 * moved, flops, 3 * flops, impl) for impl, call in calls]
    return found


def candidates() -> None:
    """Prints a line for each cut and shape: forward, forward and backward, and each kernel's own milliseconds."""
    from longscan.kernels.taylor_attention import kernel

    for chunk, block, states in ((128, 64, 4), (64, 64, 4), (128, 32, 4), (64, 32, 4)):
        kernel.CHUNK, kernel.BLOCK, kernel.WIDE_BLOCK, kernel.STATE_WARPS = chunk, block, block, states
        for shape in SHAPES:
            inputs = make(*shape)
            grad = torch.randn_like(inputs[2])

            def forward(inputs: list[Tensor] = inputs) -> None:
                with torch.no_grad():
                    taylor_attention(*inputs)

            def both(inputs: list[Tensor] = inputs, grad: Tensor = grad) -> None:
                torch.autograd.grad(taylor_attention(*inputs)[0], inputs, grad)

            times = f"{milliseconds(forward, 20):.3f} / {milliseconds(both, 20):.3f} ms"
            print(f"chunk {chunk} block {block} warps {states} {shape}: {times}; {_kernels(both)}", flush=True)


def _kernels(run: Callable[[], None]) -> str:
    """The mean milliseconds of each kernel in a call of `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    spent = [(e.key.split("(")[0][:28], e.device_time_total / 5e3, e.count / 5) for e in profile.key_averages()]
    return ", ".join(f"{name} x{count:g} {time:.3f}" for name, time, count in sorted(spent, key=lambda s: -s[1])[:7])


if __name__ == "__main__":
    if "--tune" not in sys.argv:
        sys.exit("benchmarks.kernels measures this op; here only --tune")
    candidates()

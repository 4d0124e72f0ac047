"""Time and peak memory of each op on one GPU beside the machine's floor: `python -m benchmarks.kernels`.

The floor is the larger of bytes over the measured copy rate and FLOPs over the measured matmul rate, each input read
once and each output written once. Times are medians over many runs of CUDA events; inputs exceed the L2 cache or are
marked. Forward and backward together are one figure, since training pays both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.kernels import linear_scan, rg_lru

from .record import record

SHAPES = ((1, 32768, 2560), (8, 2048, 2560))


@dataclass(frozen=True)
class Work:
    """One op at one shape: its inputs, the call, and the bytes it must move forward and forward plus backward."""

    name: str
    inputs: list[Tensor]
    call: Callable[..., Tensor]
    forward_bytes: int
    both_bytes: int


def scan_work(batch: int, tokens: int, width: int) -> Work:
    """linear_scan: reads x and log_a, writes h; backward reads dh, log_a and h, writes dx and dlog_a."""
    x, log_a = (torch.randn(batch, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    inputs = [x.requires_grad_(), (-log_a.exp()).detach().requires_grad_()]
    size = x.nbytes
    return Work(
        f"linear_scan ({batch}, {tokens}, {width}) bf16", inputs, lambda *a: linear_scan(*a)[0], 3 * size, 8 * size
    )


def rg_lru_work(batch: int, tokens: int, width: int) -> Work:
    """rg_lru: reads x and both gates, writes h; backward reads those, h and dh, writes three gradients."""
    inputs = [torch.randn(batch, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    inputs.append(torch.full((width,), -4.0, device="cuda"))
    size = inputs[0].nbytes
    leaves = [tensor.requires_grad_() for tensor in inputs]
    return Work(f"rg_lru ({batch}, {tokens}, {width}) bf16", leaves, lambda *a: rg_lru(*a)[0], 4 * size, 12 * size)


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    """The median time of `run`."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second of a device copy, read and written bytes counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), 20) / 1e3)


def measure(work: Work, rate: float, repeat: int) -> None:
    """Records forward and forward plus backward of one work."""
    grad = torch.randn_like(work.call(*work.inputs))

    def forward() -> None:
        with torch.no_grad():
            work.call(*work.inputs)

    def both() -> None:
        torch.autograd.grad(work.call(*work.inputs), work.inputs, grad)

    for name, run, moved in (("fwd", forward, work.forward_bytes), ("fwd+bwd", both, work.both_bytes)):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        floor = moved / rate * 1e3
        time = milliseconds(run, repeat)
        record("kernels", work.name, "longscan", name, time, "ms", floor)
        record("kernels", work.name, "longscan", f"{name} x floor", time / floor, "x")
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
        record("kernels", work.name, "longscan", f"{name} peak above inputs", peak, "MiB")


def main() -> None:
    """Measures every op at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a GPU; an absolute time holds only there.")
    torch.manual_seed(0)
    rate = copy_rate()
    record("kernels", "device copy 1 GiB", "torch", "rate", rate / 1e9, "GB/s")
    for make in (scan_work, rg_lru_work):
        for shape in SHAPES:
            measure(make(*shape), rate, options.repeat)


if __name__ == "__main__":
    main()

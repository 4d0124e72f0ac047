"""Times and rates of one GPU: the works that benchmarks.kernels measures, and the ceilings they are held to."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The GPU idles so long, about 4 ms, before a timed span: more than the host takes to launch any op of ours.
QUEUE_CYCLES = 7_000_000


@dataclass(frozen=True)
class Work:
    """One op at one shape by one implementation: its inputs, the call, and what it must at least move and compute.

    A peer is a further Work of the same `name` and another `impl`; its inputs may be laid out as it likes them.
    `call` returns one tensor, differentiable in those inputs that require a gradient.
    """

    name: str
    inputs: list[Tensor]
    call: Callable[..., Tensor]
    forward_bytes: int
    both_bytes: int
    forward_flops: int = 0
    both_flops: int = 0
    impl: str = "longscan"

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs whose gradients the backward pass gives."""
        return [tensor for tensor in self.inputs if tensor.requires_grad]


def milliseconds(run: Callable[[], object], repeat: int, warm: int = 3) -> float:
    """The median time the GPU spends on `run`, whose launches are queued while it idles, from a cold L2 cache.

    Args:
        run: queues the work.
        repeat: how many times are taken.
        warm: how many runs go before them.
    """
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(QUEUE_CYCLES)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def seconds(run: Callable[[], object]) -> float:
    """The time of one call of `run` on the clock of the host, the GPU's work included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Fills the list it gives with the names of the Triton kernels launched inside, in order."""
    from triton import knobs

    names: list[str] = []

    def note(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        yield names
    finally:
        knobs.runtime.launch_enter_hook.remove(note)


def time_or_error(run: Callable[[], object], repeat: int = 15) -> str:
    """The milliseconds of `run` to print, or why it does not run: among tiles that is an answer."""
    try:
        return f"{milliseconds(run, repeat):.4f} ms"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"


def copy_rate() -> float:
    """Bytes a second of a device copy, read and written bytes counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), 20) / 1e3)


def matmul_rate(size: int = 8192) -> float:
    """FLOPs a second of a square bf16 matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b, 20) / 1e3)

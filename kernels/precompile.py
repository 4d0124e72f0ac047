"""Compiles the kernels of some work all at once, on all cores, instead of one after the other as the work meets them.

The work is rehearsed first: where it would launch a kernel that is not compiled yet, the kernel is noted and nothing
is launched, so that what it would have written stays as memory was. That does no harm: kernels hand each other numbers
to compute with, never an index, and no count that the reader does not bound. What was noted is compiled by threads:
Triton's passes, the assembler and the C compiler that builds launchers run side by side, the reading of kernels, which
is Python, in turn.

Not a cache: what is compiled lies where Triton keeps it, in memory and on disk, and the work finds it there. Gluon's
kernels are noted and compiled alike, tensor descriptors and all, but none may have a layout as a parameter, which
Triton cannot write down: rehearsing it raises TypeError. Layouts stand in a descriptor or in the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Missing:
    """A kernel that is not compiled yet: Triton's function, and what a launch would specialise it for.

    Attributes:
        function: a triton.JITFunction.
        specialization: as its `preload` takes it.
    """

    function: Any
    specialization: str

    def prepare(self, device: int) -> None:
        """Compiles it, or finds it on disk, and makes it ready to launch on GPU number `device`."""
        with torch.cuda.device(device):
            kernel = self.function.preload(self.specialization)
            _ = kernel.run  # builds its launcher and loads it


def rehearse(work: Callable[[], object]) -> list[Missing]:
    """Does the work without the kernels that are not compiled yet, and returns those.

    Args:
        work: what it computes is undefined; it must leave nothing of it behind.
    """
    # Triton settles at its import whether it interprets kernels; importing this module does not import it.
    from triton import knobs

    found: dict[tuple[int, str], Missing] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        key = id(fn.jit_function), compile["key"]
        found.setdefault(key, Missing(fn.jit_function, compile["specialization_data"]))
        return True

    runtime: Any = knobs.runtime
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, note
    try:
        work()
    finally:
        runtime.jit_cache_hook = before
    return list(found.values())


def prepare(kernels: list[Missing]) -> None:
    """Makes the kernels ready to launch on the current GPU, all at once; raises what compiling one raises."""
    if not kernels:
        return
    device, cores = torch.cuda.current_device(), len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(min(cores, len(kernels)), "compiler") as pool:
        # Backward passes are the last to be noted and take longest.
        jobs = [pool.submit(kernel.prepare, device) for kernel in reversed(kernels)]
    for job in jobs:
        job.result()

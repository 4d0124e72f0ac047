"""Time and peak memory of each op on one GPU beside the machine's floor: `python -m benchmarks.kernels [op ...]`.

The floor is the larger of bytes over the measured copy rate and FLOPs over the measured matmul rate, each input read
once and each output written once. Times are medians of what the GPU spends between two events, from a cold L2 cache
and with the host's work queued ahead. Forward and backward together are one figure, since training pays both.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from .gpu_timing import Work, copy_rate, matmul_rate, milliseconds
from .record import record

# The modules benchmarks/kernels_<name>.py, each of which has works().
GROUPS = sorted(path.stem.removeprefix("kernels_") for path in Path(__file__).parent.glob("kernels_*.py"))


def measure(work: Work, copied: float, multiplied: float, repeat: int) -> None:
    """Records forward and forward plus backward of one work."""
    grad = torch.randn_like(work.call(*work.inputs))

    def forward() -> None:
        with torch.no_grad():
            work.call(*work.inputs)

    def both() -> None:
        torch.autograd.grad(work.call(*work.inputs), work.leaves, grad)

    for name, run, moved, flops in (
        ("fwd", forward, work.forward_bytes, work.forward_flops),
        ("fwd+bwd", both, work.both_bytes, work.both_flops),
    ):
        run()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
        floor = max(moved / copied, flops / multiplied) * 1e3
        time = milliseconds(run, repeat)
        record("kernels", work.name, work.impl, name, time, "ms", floor)
        record("kernels", work.name, work.impl, f"{name} x floor", time / floor, "x")
        record("kernels", work.name, work.impl, f"{name} peak above inputs", peak, "MiB")


def main() -> None:
    """Measures the works of the groups named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="op", help=f"of {', '.join(GROUPS)}; all where none is named")
    parser.add_argument("--repeat", type=int, default=30)
    options = parser.parse_args()
    unknown = [name for name in options.groups if name not in GROUPS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}, expected one of {', '.join(GROUPS)}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a GPU; an absolute time holds only there.")
    torch.manual_seed(0)
    copied, multiplied = copy_rate(), matmul_rate()
    record("kernels", "device copy 1 GiB", "torch", "rate", copied / 1e9, "GB/s")
    record("kernels", "matmul 8192^3 bf16", "torch", "rate", multiplied / 1e12, "TFLOP/s")
    failed = 0
    for name in options.groups or GROUPS:
        for work in importlib.import_module(f".kernels_{name}", __package__).works():
            try:
                measure(work, copied, multiplied, options.repeat)
            except Exception as error:  # a peer may not run here; the other figures still stand
                if work.impl == "longscan":
                    failed += 1
                print(f"{work.name} | {work.impl} | {type(error).__name__}: {error}", file=sys.stderr)
            del work
            torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""How long the host takes to issue each op and each mixer's block, forward and backward: below it no GPU is kept busy.

    python -m benchmarks.host_time [--profile] [name ...]

Some calls are issued without waiting for the GPU, of so few tokens that it is never what is waited for. On a machine
without one the kernels are neither compiled nor launched, which leaves what Python, torch and Triton's launches cost.
`--profile` prints the functions whose own time is most, and records nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import importlib
import os
import pstats
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longscan.kernels import (
    Segments,
    attention,
    gate_projections,
    linear_attention,
    linear_scan,
    rg_lru,
    rms_norm,
    rotary,
    short_conv,
    taylor_attention,
)
from longscan.kernels.dispatch import KERNELS
from longscan.models import LocalBackend, config_from_mapping, fused, load_preset, norm
from longscan.models.block import Block
from longscan.models.sequence import LocalContext

from .record import record

CUDA = torch.cuda.is_available()
PLACE = torch.device("cuda" if CUDA else "cpu")
# Without a GPU fp32: there its products are the cheapest, and the kernels refuse bf16.
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOKENS, CALLS, ROUNDS = 32, 20, 10
# Mixers, and a preset that has each.
BLOCKS = {
    "rg_lru": "griffin-tiny",
    "local_attention": "griffin-tiny",
    "short_conv": "based-tiny",
    "taylor_attention": "based-tiny",
    "linearized_attention": "linearized-tiny",
    "attention": "llama-tiny",
}

Call = Callable[[], Tensor]


def tensor(*shape: int, dtype: torch.dtype = DTYPE, trained: bool = True) -> Tensor:
    """Small random numbers."""
    return torch.rand(shape, device=PLACE, dtype=dtype).mul_(0.1).requires_grad_(trained)


def rows(*shape: int, **options: Any) -> Tensor:
    """The same, [1, TOKENS, ...]."""
    return tensor(1, TOKENS, *shape, **options)


def ops(segments: Segments) -> dict[str, tuple[Call, list[Tensor]]]:
    """For each op a call and what it is differentiated by."""
    x, a, b, side = rows(256), rows(256), rows(256), tensor(2, 128, 128)
    vector, wide, taps = tensor(256), tensor(256, dtype=torch.float32), tensor(256, 4)
    q, k, v = rows(2, 64), rows(2, 64), rows(2, 64)
    small_q, small_k = rows(2, 16), rows(2, 16)
    angles = rows(32, dtype=torch.float32, trained=False)
    log_a = rows(256).detach().neg().requires_grad_()
    run: dict[str, Any] = {"implementation": "triton"}
    return {
        "attention": (lambda: attention(q, k, v, segments, window=16, **run), [q, k, v]),
        "gate_projections": (
            lambda: gate_projections(x, side, vector, side, vector, **run)[0],
            [x, side, vector],
        ),
        "linear_attention": (lambda: linear_attention(q, k, v, None, None, segments, group=16, **run)[0], [q, k, v]),
        "linear_scan": (lambda: linear_scan(x, log_a, None, segments, **run)[0], [x, log_a]),
        "rg_lru": (lambda: rg_lru(x, a, b, wide, None, segments, **run)[0], [x, a, b, wide]),
        "rms_norm": (lambda: rms_norm(x, vector, 1e-6, **run), [x, vector]),
        "rotary": (lambda: rotary(q, angles, angles, **run), [q]),
        "short_conv": (lambda: short_conv(x, taps, vector, None, segments, **run)[0], [x, taps, vector]),
        "taylor_attention": (
            lambda: taylor_attention(small_q, small_k, v, None, segments, **run)[0],
            [small_q, small_k, v],
        ),
    }


def block(mixer: str, segments: Segments) -> tuple[Call, list[Tensor]]:
    """The block of a mixer."""
    config = config_from_mapping(load_preset(BLOCKS[mixer]) | {"vocab_size": 256})
    with PLACE:
        made = Block(mixer, config, LocalBackend(), "triton").to(DTYPE)
        x = tensor(1, TOKENS, config.width)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    context = LocalContext(segments)
    return lambda: made(x, context), [x, *made.parameters()]


def measure(call: Call, inputs: list[Tensor]) -> tuple[float, float]:
    """Microseconds of the host to issue the call and its backward pass, of the fastest of ROUNDS rounds."""
    # On a GPU the backward pass has a thread of its own; without one the thread's time leaves out other processes.
    clock = time.perf_counter if CUDA else time.thread_time
    gradient = torch.ones_like(call())
    forwards, backwards = [], []
    for _ in range(1 + ROUNDS):
        gc.collect()
        if CUDA:
            torch.cuda.synchronize()
        begun = clock()
        outputs = [call() for _ in range(CALLS)]
        between = clock()
        for output in outputs:
            torch.autograd.grad(output, inputs, gradient)
        forwards.append(between - begun)
        backwards.append(clock() - between)
    return min(forwards[1:]) / CALLS * 1e6, min(backwards[1:]) / CALLS * 1e6


def profile(call: Call, inputs: list[Tensor]) -> None:
    """Prints where the time of CALLS calls goes, and that of their backward passes."""
    gradient, outputs = torch.ones_like(call()), []

    def forward() -> None:
        outputs[:] = [call() for _ in range(CALLS)]

    def backward() -> None:
        for output in outputs:
            torch.autograd.grad(output, inputs, gradient)

    # Without a thread of its own the backward pass is seen too. The first time something is made that lasts.
    with torch.autograd.set_multithreading_enabled(False):
        forward()
        backward()
        for part in (forward, backward):
            watched = cProfile.Profile()
            watched.runcall(part)
            pstats.Stats(watched, stream=sys.stderr).sort_stats("tottime").print_stats(25)


class _Driver:
    """What Triton asks of a GPU's driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


class _Compiled:
    """A kernel whose launches do nothing."""

    function = packed_metadata = None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def launch_metadata(self, *_: Any) -> None:
        """None."""

    def run(self, *_: Any) -> None:
        """Nothing."""


def leave_launches_out() -> None:
    """From now on Triton's kernels, on CPU tensors, do all but compile and launch."""
    os.environ.pop("TRITON_INTERPRET", None)
    for op in ("block_diagonal", *KERNELS.keys() - {"gate_projections"}):
        importlib.import_module(f"longscan.kernels.{op}.kernel")
    for op in ("geglu", "swiglu"):
        importlib.import_module(f"liger_kernel.ops.{op}")
    compiler: Any = importlib.import_module("triton.compiler")
    compiler.compile = _Compiled
    importlib.import_module("triton.runtime.driver").driver.set_active(_Driver())
    fused.runs = lambda x: True
    norm.rms_norm = partial(rms_norm, implementation="triton")
    # Set after the kernels are defined it changes nothing but that ops take CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


def main() -> None:
    """Measures all, or what is named, and records the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    segments = Segments.from_lengths([[TOKENS // 4, TOKENS - TOKENS // 4]], device=PLACE)
    if not CUDA:
        leave_launches_out()
    calls = ops(segments) | {f"block of {mixer}": block(mixer, segments) for mixer in BLOCKS}
    unknown = set(options.names) - calls.keys()
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: expected some of {', '.join(calls)}")
    for name in options.names or calls:
        if options.profile:
            print(name, file=sys.stderr)
            profile(*calls[name])
            continue
        work = f"{name}, {TOKENS} tokens{'' if CUDA else ', without launches'}"
        for metric, value in zip(("forward", "backward"), measure(*calls[name]), strict=True):
            record("host_time", work, "longscan", metric, value, "us")


if __name__ == "__main__":
    main()

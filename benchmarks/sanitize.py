"""Runs each op forward and backward under NVIDIA's compute-sanitizer and records what it finds, kernel by kernel.

    python -m benchmarks.sanitize [op ...] [--tool memcheck|racecheck|initcheck|synccheck] [--logs FOLDER]

Small odd shapes with documents, so that every edge of every tile is met. PyTorch's caching allocator would hide an
overrun inside its blocks; it is off here. A packing in a dtype is a process of its own, several at once; an op is
recorded when its last one ends. Compiling the many variants of an op takes longer than running them, so before that a
process an op, which is not watched, compiles them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from longscan import kernels
from longscan.kernels import Segments

from .gpu_timing import launches
from .record import ROOT, record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Bytes the sanitizer leaves unusable behind each allocation, so that a long step over the end meets no other tensor.
PADDING = 1 << 20
# Processes at once; each starts Python and PyTorch, which under the sanitizer takes longer than the kernels.
AT_ONCE = min(16, os.cpu_count() or 1)
LONGEST_S = 240
# (rows, lengths of the documents in each); the last one ends inside a tile.
PACKED = ((2, [[5, 60, 12], [77]]), (1, [[1]]), (1, [[100, 1, 156]]))
DTYPES = (torch.float32, torch.bfloat16)

# Where an error of the sanitizer's log lies: `at kernel(...)+0x40`, or in other releases `at 0x40 in kernel(...)`.
_PLACE = re.compile(r"^=+\s+(?:at|.*?Race reported between \w+ access at) (?:0x\w+ in )?([A-Za-z_]\w*)", re.M)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf of random numbers that wants a gradient."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def differentiate(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """Runs the backward pass of all outputs that have one, from random gradients."""
    whole = (outputs,) if isinstance(outputs, Tensor) else outputs
    tensors = [t for t in whole if t.requires_grad]
    torch.autograd.backward(tensors, [torch.randn_like(t) for t in tensors])


# A whole row, and a piece of one whose state's gradient comes from the right.
FROM_RIGHT = (None, torch.ones_like)

Run = Callable[[int, int, Segments, torch.dtype], None]


class Case(NamedTuple):
    """What one process runs: of an op, what of OPS[op], PACKED and DTYPES, by their numbers."""

    op: str
    part: int
    packing: int
    dtype: int

    def __str__(self) -> str:
        return f"{self.op}-{self.part}-{self.packing}-{str(DTYPES[self.dtype]).removeprefix('torch.')}"


def linear_scan(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """Both entry points, from a state, at a width that fills no tile and at one that fills some."""
    for width in (37, 128):
        x, state = draw(rows, tokens, width, dtype=dtype), draw(rows, width)
        log_a = torch.rand_like(x).neg().requires_grad_()
        for documents in (segments, None):
            for right in FROM_RIGHT:
                differentiate(kernels.linear_scan(x, log_a, state, documents, from_right=right))
            differentiate(kernels.linear_scan_summarize(x, log_a, documents))


def rg_lru(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """As linear_scan."""
    for width in (37, 128):
        gated = [draw(rows, tokens, width, dtype=dtype) for _ in range(3)]
        a_param, state = draw(width), draw(rows, width)
        for documents in (segments, None):
            for right in FROM_RIGHT:
                differentiate(kernels.rg_lru(*gated, a_param, state, documents, from_right=right))
            differentiate(kernels.rg_lru_summarize(*gated, a_param, documents))


def short_conv(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """Few and many taps, with tail, bias and activation."""
    for width, taps in ((37, 4), (128, 3), (37, 33)):
        x, weight, bias = (draw(*s, dtype=dtype) for s in ((rows, tokens, width), (width, taps), (width,)))
        tail = draw(rows, taps - 1, width, dtype=dtype)
        differentiate(kernels.short_conv(x, weight, bias, tail, segments, activation="silu"))
        differentiate(kernels.short_conv(x, weight))


def attention(
    heads: int, key_heads: int, dim: int, rows: int, tokens: int, segments: Segments, dtype: torch.dtype
) -> None:
    """Window, ALiBi and a halo.

    Where hopper.py takes such heads it runs again, by that on a Hopper GPU, which of itself takes longer rows.
    """
    q = draw(rows, tokens, heads, dim, dtype=dtype)
    k, v = (draw(rows, tokens + 9, key_heads, dim, dtype=dtype) for _ in range(2))

    def run() -> None:
        for option in ({"window": 33}, {"window": 150}, {"alibi_slopes": torch.rand(heads, device=DEVICE)}, {}):
            differentiate(kernels.attention(q, k, v, segments, key_offset=-9, implementation=FORCED, **option))

    run()
    if DEVICE == "cuda" and dtype != torch.float32:
        from longscan.kernels.attention import kernel

        if dim in kernel.HOPPER_DIMS:
            with patch.object(kernel, "LEAST_TOKENS", 1):
                run()


def linear_attention(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """Both entry points from a state, with decays and with groups, and a step."""
    for heads, key_heads, dim, group in ((4, 2, 64, None), (3, 3, 24, 33), (4, 2, 64, 70)):
        q, k = (torch.rand(rows, tokens, n, dim, device=DEVICE, dtype=dtype) for n in (heads, key_heads))
        v = draw(rows, tokens, key_heads, dim, dtype=dtype)
        log_a = None if group else torch.rand(rows, tokens, key_heads, device=DEVICE, dtype=dtype).neg()
        leaves = [t if t is None else t.requires_grad_() for t in (q, k, v, log_a)]
        state = kernels.linear_attention(*leaves, group=group)[1].detach().requires_grad_()
        for right in FROM_RIGHT:
            differentiate(kernels.linear_attention(*leaves, state, segments, group=group, from_right=right))
        differentiate(kernels.linear_attention_summarize(*leaves[1:], segments, group=group))
        with torch.no_grad():
            token = [t if t is None else t[:, 0] for t in leaves]
            kernels.linear_attention_step(*token, state, segments.positions[:, 0], group=group)


def taylor_attention(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """Both entry points from a state, and a step."""
    for key_dim, value_dim in ((16, 64), (8, 24)):
        q, k = (draw(rows, tokens, 3, key_dim, dtype=dtype) for _ in range(2))
        v = draw(rows, tokens, 3, value_dim, dtype=dtype)
        state = kernels.taylor_attention(q, k, v)[1].detach().requires_grad_()
        for right in FROM_RIGHT:
            differentiate(kernels.taylor_attention(q, k, v, state, segments, from_right=right))
        differentiate(kernels.taylor_attention_summarize(k, v, segments))
        with torch.no_grad():
            kernels.taylor_attention_step(q[:, 0], k[:, 0], v[:, 0], state)


def cross_entropy(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """The fused loss and a slice's pieces, by whole rows and not, at a vocabulary that fills no tile."""
    from longscan.kernels.cross_entropy import kernel

    hidden, weight = draw(rows * tokens, 72, dtype=dtype), draw(1003, 72, dtype=dtype)
    labels = torch.randint(1003, (rows * tokens,), device=DEVICE)
    labels[::5] = -100
    options = {"z_loss": 1e-3, "label_smoothing": 0.1}
    for whole in (kernel.WHOLE, 0):
        with patch.object(kernel, "WHOLE", whole):
            differentiate(kernels.linear_cross_entropy(hidden, weight, labels, soft_cap=30.0, **options))
            pieces = kernels.vocabulary_pieces(hidden, weight, labels, soft_cap=30.0)
            differentiate(kernels.loss_from_pieces(pieces, labels, 1003, **options))


def gate_projections(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """Blocks whose side fills no tile, is kept whole, and is cut in groups, the last of them short."""
    for side in (13, 160, 200):
        shapes = ((rows, tokens, 2 * side), (2, side, side), (2 * side,), (2, side, side), (2 * side,))
        inputs = [draw(*shape, dtype=dtype) for shape in shapes]
        differentiate(kernels.gate_projections(*inputs, implementation=FORCED))


def rms_norm(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """Rows that share a tile, rows in one block and in two, all of odd widths, the scale trained or not."""
    for width in (1, 33, 2047, 2500):
        scale = draw(width)
        for each in (scale, scale.detach()):
            differentiate(kernels.rms_norm(draw(rows, tokens, width, dtype=dtype), each, 1e-6))


def rotary(rows: int, tokens: int, segments: Segments, dtype: torch.dtype) -> None:
    """Heads rotated whole, in part, and more of them than a tile."""
    for heads, dim, angles in ((4, 16, 8), (5, 11, 3), (40, 64, 32)):
        cos, sin = torch.rand(2, rows, tokens, angles, device=DEVICE)
        differentiate(kernels.rotary(draw(rows, tokens, heads, dim, dtype=dtype), cos, sin))


# The kernel itself where auto might take a maintained one.
FORCED = "triton" if DEVICE == "cuda" else "auto"
# (heads, key heads, head dim): shared key heads, and a head dim that is no power of two; what takes longest first.
HEADS = ((2, 1, 256), (3, 3, 128), (4, 1, 80), (6, 2, 64))
# By op, what a process runs: of attention, whose kernels are the most and the longest, heads of one kind.
OPS: dict[str, list[Run]] = {
    "attention": [partial(attention, *heads) for heads in HEADS],
    "cross_entropy": [cross_entropy],
    "gate_projections": [gate_projections],
    "linear_attention": [linear_attention],
    "linear_scan": [linear_scan],
    "rg_lru": [rg_lru],
    "rms_norm": [rms_norm],
    "rotary": [rotary],
    "short_conv": [short_conv],
    "taylor_attention": [taylor_attention],
}


def cases_of(name: str) -> list[Case]:
    """All cases of an op; first those in fp32, whose kernels, without tensor cores, take the sanitizer longest."""
    numbers = product(range(len(DTYPES)), range(len(OPS[name])), range(len(PACKED)))
    return [Case(name, part, packing, dtype) for dtype, part, packing in numbers]


def run_case(case: Case) -> list[str]:
    """Runs a case, half the rows going on with a document, and returns the names of the kernels launched."""
    torch.manual_seed(0)
    rows, lengths = PACKED[case.packing]
    segments = Segments.from_lengths(lengths, [7 * (row % 2 == 0) for row in range(rows)], DEVICE)
    run = partial(OPS[case.op][case.part], rows, sum(lengths[0]), segments, DTYPES[case.dtype])
    if DEVICE == "cpu":
        run()
        return []
    with launches() as names:
        run()
        torch.cuda.synchronize()
    return sorted(set(names))


@dataclass(frozen=True)
class Finding:
    """What the sanitizer said of an op: errors by kernel, `kernels` those that ran, or why it said nothing."""

    op: str
    kernels: set[str]
    errors: Counter[str]
    failure: str = ""

    def __or__(self, other: Finding) -> Finding:
        """What was said of both."""
        failure = "; ".join(filter(None, (self.failure, other.failure)))
        return Finding(self.op, self.kernels | other.kernels, self.errors + other.errors, failure)


def errors_in(log: str) -> Counter[str]:
    """Errors by kernel in a log of compute-sanitizer; those that name no kernel count under "".

    The total is the log's own; a log without one raises ValueError.
    """
    totals = re.findall(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed.*)$", log, re.M)
    if not totals:
        raise ValueError("the log holds no summary")
    total = sum(int(errors or hazards) for errors, hazards in totals)
    found = Counter(_PLACE.findall(log))
    found[""] = max(0, total - found.total())
    return +found


def compile_kernels(name: str) -> None:
    """Compiles what the cases of an op launch, for processes to find on disk."""
    from longscan.kernels.precompile import prepare, rehearse

    prepare(rehearse(lambda: [run_case(case) for case in cases_of(name)]))


def sanitize(case: Case, tool: str, logs: Path) -> Finding:
    """Runs a case under the tool in a process of its own; its log is left in `logs`."""
    name, *numbers = case
    log, told = logs / f"{tool}-{case}.log", logs / f"{case}.json"
    for of_an_earlier_run in (log, told):
        of_an_earlier_run.unlink(missing_ok=True)
    command = ["compute-sanitizer", "--tool", tool, "--log-file", str(log), *_padding(tool)]
    command += [sys.executable, "-m", "benchmarks.sanitize", name, "--case", *map(str, numbers), "--names", str(told)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        return Finding(name, set(), Counter(), f"{case} was not done after {LONGEST_S} s")
    try:
        return Finding(name, set(json.loads(told.read_text())), errors_in(log.read_text()))
    except (OSError, ValueError) as error:
        said = (done.stderr.strip() or done.stdout.strip() or str(error)).splitlines()[-1]
        return Finding(name, set(), Counter(), f"{case}: exit {done.returncode}: {said}")


def _padding(tool: str) -> list[str]:
    """The option that keeps allocations apart, where this release has it."""
    if tool != "memcheck":
        return []
    told = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True)
    return ["--padding", str(PADDING)] if "--padding" in told.stdout + told.stderr else []


def note(finding: Finding, tool: str) -> bool:
    """Records a finding, a figure a kernel, and returns whether it is clean."""
    if finding.failure or not finding.kernels:
        print(f"{finding.op}: {finding.failure or 'launched no kernel of ours'}", file=sys.stderr)
        return False
    counted = {name: finding.errors[name] for name in sorted(finding.kernels)}
    counted["all other kernels and calls"] = finding.errors.total() - sum(counted.values())
    for name, errors in counted.items():
        record("sanitize", f"{finding.op}: {name}", "longscan", f"{tool} errors", errors, "errors", 0)
    return not finding.errors


def note_each(findings: Iterable[Finding], tool: str) -> bool:
    """Records each op when the last of its cases has been found out, and returns whether all are clean."""
    whole: dict[str, Finding] = {}
    left = {name: len(cases_of(name)) for name in OPS}
    clean = True
    for finding in findings:
        name = finding.op
        whole[name] = whole[name] | finding if name in whole else finding
        left[name] -= 1
        if not left[name]:
            clean &= note(whole[name], tool)
    return clean


def main() -> None:
    """Sanitizes the ops named, or all, or is one such process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; all where none is named")
    parser.add_argument("--tool", default="memcheck", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--logs", type=Path, help="keep the tool's logs here")
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.ops:
        if name not in OPS:
            parser.error(f"no op {name!r}, expected some of {', '.join(OPS)}")
    if options.case:
        options.names.write_text(json.dumps(run_case(Case(*options.ops, *options.case))))
        return
    if DEVICE == "cpu" or shutil.which("compute-sanitizer") is None:
        sys.exit("benchmarks.sanitize needs a CUDA GPU and compute-sanitizer (of the CUDA toolkit) on the path")
    names = list(dict.fromkeys(options.ops or OPS))
    if options.compile:
        compile_kernels(*options.ops)
        return
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(AT_ONCE) as pool:
        compiling = [[sys.executable, "-m", "benchmarks.sanitize", name, "--compile"] for name in names]
        list(pool.map(partial(subprocess.run, cwd=ROOT, check=True), compiling))
        logs: Any = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        run = partial(sanitize, tool=options.tool, logs=logs)
        jobs = [pool.submit(run, case) for name in names for case in cases_of(name)]
        clean = note_each((job.result() for job in as_completed(jobs)), options.tool)
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()

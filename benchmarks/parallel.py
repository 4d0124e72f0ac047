"""Measures what several GPUs of one host bring, each figure beside one GPU's of the same run.

    python -m benchmarks.parallel [cp exchanges tp zero steps curves longest] --gpus 0,1

Each work has processes of its own, so one that fails takes none with it, and works on other GPUs may run beside.

- cp: forward and backward of a stack of blocks, one row over the GPUs, eagerly and as one CUDA graph of the stack on
  either side; gradients of weights are not summed.
- exchanges: the bytes a block receives under context parallelism, and the share of a step that exchanges cost: the
  step less one whose exchanges return at once.
- tp: the same as cp with tensor and sequence parallelism, and as a graph with rows that travel by copy engines, which
  is promised: in short rows the host is slower than the GPU.
- zero: whole steps, update included, of replicas under ZeRO 1, against ZeRO 0 on one GPU.
- steps: whole steps under context and under tensor parallelism, these eagerly, and with CUDA graphs and copy engines.
  With those of zero the simulator is compared.
- curves: losses of 50 steps by every axis, within the band of one GPU's under other orders of micro-batches; of some
  `--families` alone.
- longest: the longest row that trains.

Without GPUs there are no CUDA graphs: only what runs eagerly is recorded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import ParallelDims
from longscan.parallel.graphs import CudaRecorder, Recorder, Work
from longscan.parallel.plan.recorded import GRAPHED

from . import curves, longest, steps
from . import record as recording
from .ranks import Place, mean_over_ranks, over_ranks, run_ranks, seconds
from .stacks import Shape, Stack, Traffic, silent_group, zeros_received
from .steps import load_of, tokens_of

ALONE = ParallelDims(zero=0)
# How often each of two measurements is taken; the fastest counts.
TURNS = 3


@dataclass(frozen=True)
class Scale:
    """What is measured.

    Attributes:
        stacks: presets and how many of their first blocks; the mix of mixers is that of the whole.
        rows: tokens of a row, and what is computed again.
        tensor_rows: rows and their tokens under tensor parallelism.
        preset: of whole steps.
        zero, context, tensor: tokens of a row, rows of a micro-batch, micro-batches of a step, what is computed again.
    """

    stacks: dict[str, int]
    rows: tuple[tuple[int, str], ...]
    tensor_rows: tuple[tuple[int, int], ...]
    preset: str
    zero: tuple[int, int, int, str]
    context: tuple[int, int, int, str]
    tensor: tuple[int, int, int, str]


FULL = Scale(
    {"griffin-1.3b": 6, "based-1.4b": 5},
    ((32768, "none"), (131072, "selective")),
    ((1, 8192), (4, 8192)),
    "griffin-1.3b",
    (8192, 2, 8, "none"),
    (32768, 1, 4, "selective"),
    (8192, 2, 4, "none"),
)
TINY = Scale(
    {"griffin-tiny": 3, "based-tiny": 3},
    ((64, "none"), (128, "selective")),
    ((2, 64),),
    "griffin-tiny",
    (32, 2, 2, "none"),
    (64, 1, 2, "selective"),
    (32, 1, 2, "none"),
)


def cp(place: Place, scale: Scale) -> None:
    """Stacks of blocks with one row over all ranks."""
    dims = ParallelDims(context=place.size, zero=0)
    with place.together("cp"):
        for preset, depth in scale.stacks.items():
            for tokens, recompute in scale.rows:
                shape = Shape(preset, range(depth), 1, tokens, recompute)
                compare_stacks(place, shape, dims, "context", 1.9, recorder_of(place))


def tp(place: Place, scale: Scale) -> None:
    """A stack of blocks with its layers over all ranks."""
    dims = ParallelDims(tensor=place.size, sequence_parallel=True, zero=0)
    with place.together("tp"):
        for rows, tokens in scale.tensor_rows:
            shape = Shape(scale.preset, range(scale.stacks[scale.preset]), rows, tokens)
            compare_stacks(place, shape, dims, "tensor", 1.7, recorder_of(place))


def recorder_of(place: Place) -> Recorder | None:
    """What records CUDA graphs, where they are measured."""
    return CudaRecorder(place.device) if has_graphs(place) else None


def has_graphs(place: Place) -> bool:
    """Whether CUDA graphs are measured; a CPU has none."""
    return place.device.type == "cuda"


def has_copy_engines(place: Place, dims: ParallelDims) -> bool:
    """Whether the ranks' rows can travel by copy engines."""
    return place.device.type == "cuda" and dims.sequence_parallel


def compare_stacks(
    place: Place, shape: Shape, dims: ParallelDims, axis: str, floor: float, recorder: Recorder | None = None
) -> None:
    """Records forward and backward on one GPU, the mean of what each takes by itself, and on all; the fastest turns.

    With a recorder eagerly, as CUDA graphs, and as graphs with copy engines where there are any; the floor is promised
    of the last.
    """
    alone, shared = Stack(shape, ALONE, place.device), Stack(shape, dims, place.device)
    layout = f"{axis}={place.size}"
    ways = [("", layout, alone.step, shared.step)]
    if recorder is not None:
        one, many = record_all(recorder, alone.step, shared.step)
        ways.append(("CUDA graph", layout, one, many))
        if has_copy_engines(place, dims):
            copied = Stack(shape, replace(dims, copy_engines=True), place.device)
            ways.append(("CUDA graph", f"{layout} copy_engines", one, *record_all(recorder, copied.step)))
    # In turns, for a GPU's clock changes as it warms.
    turns = [
        [(seconds(one, place.device, together=False), seconds(many, place.device)) for _, _, one, many in ways]
        for _ in range(TURNS)
    ]
    for number, ((way, layout, *_), taken) in enumerate(zip(ways, zip(*turns, strict=True), strict=True), 1):
        one, many = (min(times) for times in zip(*taken, strict=True))
        promised = place.size == 2 and number == len(ways)
        place.note(shape.name, named("fwd+bwd", way, "one GPU"), one * 1e3, "ms")
        place.note(shape.name, named("fwd+bwd", way, layout), many * 1e3, "ms")
        place.note(shape.name, named("speed-up", way, layout), one / many, "x one GPU", floor if promised else None)


def record_all(recorder: Recorder, *works: Work) -> list[Work]:
    """Graphs that share one pool, for each is done with its memory before another begins."""
    for work in works:
        recorder.run(work)
    return [recorder.record(work) for work in works]


def named(*parts: str) -> str:
    """A metric of its parts, without those that are empty."""
    return ", ".join(filter(None, parts))


def exchanges(place: Place, scale: Scale) -> None:
    """What context parallelism sends, and what of it is not hidden."""
    dims = ParallelDims(context=place.size, zero=0)
    with place.together("exchanges"):
        silent = silent_group(place.size)
        for preset, depth in scale.stacks.items():
            for tokens, recompute in scale.rows:
                expose(place, Shape(preset, range(depth), 1, tokens, recompute), dims, silent)
        for preset in scale.stacks:
            for layer in kinds_of(preset):
                for tokens, _ in scale.rows:
                    weigh(place, Shape(preset, range(layer, layer + 1), 1, tokens), dims)


def kinds_of(preset: str) -> list[int]:
    """The first block of each mixer."""
    mixers = config_from_mapping(load_preset(preset)).mixers
    return [mixers.index(mixer) for mixer in dict.fromkeys(mixers)]


def expose(place: Place, shape: Shape, dims: ParallelDims, silent: dist.ProcessGroup) -> None:
    """Records the share of forward and backward that goes when nothing is exchanged."""
    stack = Stack(shape, dims, place.device)
    group, times = stack.loss.context, {}
    # In turns, for a GPU's clock changes as it warms.
    with zeros_received():
        for _ in range(TURNS):
            for context in (group, silent):
                stack.loss.context = context
                times[context] = min(seconds(stack.step, place.device), times.get(context, float("inf")))
    exposed = 100 * (1 - times[silent] / times[group])
    place.note(shape.name, f"exchanges not hidden, context={place.size}", exposed, "% of fwd+bwd", 3.0)


def weigh(place: Place, shape: Shape, dims: ParallelDims) -> None:
    """Records the bytes that the rank with the most receives for one block, each way."""
    stack = Stack(shape, dims, place.device)
    stack.step()
    with Traffic() as forward:
        y = stack.forward()
    with Traffic() as backward:
        y.backward(stack.gradient)
    for way, traffic in (("forward", forward), ("backward", backward)):
        kinds = ("states", "halos", "other")
        counts = over_ranks([traffic.bytes[kind] for kind in kinds], dist.ReduceOp.MAX, place.device)
        for kind, count in zip(kinds, counts, strict=True):
            if count:
                place.note(shape.name, f"{kind} received {way}, context={place.size}", count, "bytes")


def zero(place: Place, scale: Scale) -> None:
    """Replicas, whose optimizer state is shared."""
    compare_steps(place, scale.preset, scale.zero, ParallelDims(data=place.size, zero=1), "data", 1.95)


def whole_steps(place: Place, scale: Scale) -> None:
    """One replica over all ranks."""
    compare_steps(place, scale.preset, scale.context, ParallelDims(context=place.size, zero=1), "context")
    dims = ParallelDims(tensor=place.size, sequence_parallel=True, zero=0)
    compare_steps(place, scale.preset, scale.tensor, dims, "tensor")


def compare_steps(
    place: Place,
    preset: str,
    sizes: tuple[int, int, int, str],
    dims: ParallelDims,
    axis: str,
    floor: float | None = None,
) -> None:
    """Records tokens a second on one GPU and on all; every GPU takes the first measurement, its mean counts.

    Eagerly and, without ZeRO, with CUDA graphs and copy engines.
    """
    one = load_of(preset, ALONE, *sizes)
    rows = f"{preset}, whole steps of {one.micro_batches} x {one.micro_rows} x {one.seq_len} tokens a replica"
    floor = floor if place.size == 2 else None
    for graphs in (False, True) if dims.zero == 0 and has_graphs(place) else (False,):
        copied = graphs and has_copy_engines(place, dims)
        many = load_of(preset, replace(dims, copy_engines=copied), *sizes)
        with place.alone():
            taken, peak = steps.train(replace(one, cuda_graphs=graphs), place.device)
        with place.together(f"steps {axis} graphs={graphs}"):
            taken = mean_over_ranks(taken, place.device)
            shared = steps.train(replace(many, cuda_graphs=graphs), place.device)
        if place.rank == 0:
            impl = GRAPHED if graphs else "longscan"
            steps.note(preset, one, taken, peak, impl)
            steps.note(preset, many, *shared, impl)
        gain = tokens_of(many) / shared[0] / (tokens_of(one) / taken)
        layout = f"{axis}={place.size} zero={dims.zero}" + (" copy_engines" if copied else "")
        metric = named("speed-up", "CUDA graph" if graphs else "", layout)
        place.note(rows, metric, gain, "x one GPU", floor)


WORKS: dict[str, Callable[[Place, Scale], None]] = {
    "cp": cp,
    "exchanges": exchanges,
    "tp": tp,
    "zero": zero,
    "steps": whole_steps,
}
NAMES = (*WORKS, "curves", "longest")


def run_rank(options: argparse.Namespace) -> None:
    """Does a work as one of its ranks."""
    rank, size, folder = options.place.split(":", 2)
    place = Place(int(rank), int(size), Path(folder))
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    recording.RESULTS = Path(options.results)
    (work,) = options.works
    if work == "curves":
        curves.train_all(place, curves.scale_of(options.tiny, options.families))
    elif work == "longest":
        longest.climb(place, longest.TINY if options.tiny else longest.FULL, options)
    else:
        WORKS[work](place, TINY if options.tiny else FULL)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", default=list(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--gpus", default="0,1", help="numbers of the GPUs; without any two ranks run on the CPU")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which a work is given up")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that all works run")
    parser.add_argument("--results", default=str(recording.RESULTS), help="where figures are recorded")
    curves.add_options(parser)
    longest.add_options(parser)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.works) - set(NAMES):
        parser.error(f"unknown works {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    if unknown := set(options.families) - set(families := curves.scale_of(options.tiny).families):
        parser.error(f"unknown families {', '.join(sorted(unknown))}; known: {', '.join(families)}")
    return options


def main() -> None:
    """Runs each work in processes of its own, or is one of them."""
    options = parse()
    if options.place:
        run_rank(options)
        return
    gpus = options.gpus.split(",") if torch.cuda.is_available() else []
    module, failed = str(__spec__.name), []
    shared = [f"--results={options.results}", *(["--tiny"] if options.tiny else [])]
    shared += ["--families", *options.families] if options.families else []
    for work in options.works:
        began = time.perf_counter()
        if work == "longest":
            ended = longest.search(module, shared, gpus, options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                ended = run_ranks(module, [work, *shared], Path(folder), gpus, options.patience) == 0
        failed += [] if ended else [work]
        print(f"{work}: {'done' if ended else 'FAILED'} in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    steps.compare(Path(options.results))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

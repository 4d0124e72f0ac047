"""Measures whole steps of a model on one GPU, beside what `longscan plan` says of them: tokens a second, peak memory.

    python -m benchmarks.steps griffin-1.3b --rows 8192x4 32768 --recompute none full

The works are named by `parallel.plan.work_name`, so that `parallel.plan.errors` finds them: its table of measured and
simulated speeds is printed at the end. `benchmarks.parallel` records the steps of several GPUs by the same names.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from longscan.data import Batch
from longscan.kernels import Segments
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, make_model, process_group
from longscan.parallel.plan import GPUS, Cluster, Load, errors, measured_ratios, memory, work_name
from longscan.parallel.plan.recorded import GRAPHED, RATE_METRIC

from . import record as recording
from .ranks import compile_kernels, seconds, settle
from .record import record

VOCABULARY = 32000


def load_of(preset: str, dims: ParallelDims, seq_len: int, rows: int, batches: int, recompute: str) -> Load:
    """The load of a preset with the benchmarks' vocabulary."""
    model = config_from_mapping({**load_preset(preset), "vocab_size": VOCABULARY})
    return Load(model, dims, seq_len, rows, batches, checkpointing=recompute)


def batch_of(load: Load, tokens: Tensor | None = None) -> Batch:
    """A micro-batch of whole rows, each one document, of `tokens` [micro_rows, seq_len + 1] or of random ones."""
    if tokens is None:
        tokens = torch.randint(load.model.vocab_size, (load.micro_rows, load.seq_len + 1))
    segments = Segments.whole(load.micro_rows, load.seq_len)
    documents = (segments.cu_seqlens, segments.continues, segments.doc_start)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), *documents, ((0, 0),) * load.micro_rows, 0.0)


def fill(model: nn.Module) -> None:
    """Draws small values where the parameters lie; `init_weights` takes a minute for a billion of them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)


@contextmanager
def engine_of(load: Load, device: torch.device, compile: bool = False) -> Iterator[Engine]:
    """An engine with the load's model, its blocks compiled or not."""
    release(device)
    # The ranks of a replica read the same rows.
    torch.manual_seed(0)
    with torch.device(device):
        model = make_model(load.model, load.dims, compile, activation_checkpoint=load.checkpointing)
    fill(model)
    engine = Engine(model, load.dims, OptimizerOptions(), load.precision, device, load.cuda_graphs)
    del model
    try:
        yield engine
    finally:
        engine.close()


def release(device: torch.device) -> None:
    """Gives freed memory back, and forgets its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def tokens_of(load: Load) -> int:
    """Tokens of a step, over all replicas."""
    return load.dims.data * load.micro_batches * load.micro_rows * load.seq_len


def take_step(engine: Engine, load: Load, batches: list[Batch]) -> None:
    """Takes one step, update included."""
    engine.forward_backward(batches, tokens_of(load))
    engine.update(1e-4)


def compile_step(engine: Engine, batch: Batch) -> None:
    """Compiles the kernels of a step all at once; collective."""
    compile_kernels(partial(engine.rehearse, [batch]), engine.device)


def train(load: Load, device: torch.device, compile: bool = False) -> tuple[float, float]:
    """(seconds a step, the slowest rank's; GiB of tensors at the peak on this rank), inside the process group."""
    with engine_of(load, device, compile) as engine:
        batches = [batch_of(load) for _ in range(load.micro_batches)]
        compile_step(engine, batches[0])
        release(device)
        taken = seconds(lambda: take_step(engine, load, batches), device)
        settle(device)
        return taken, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def note(preset: str, load: Load, taken: float, peak: float, impl: str = "longscan") -> None:
    """Records speed and peak memory, the planned one beside it; of CUDA graphs, whose memory no tensor holds, speed."""
    work = work_name(preset, load)
    record("steps", work, impl, RATE_METRIC, tokens_of(load) / taken, "/s")
    if impl == GRAPHED:
        return
    record("steps", work, impl, "peak memory", peak, "GiB")
    record("steps", work, "longscan plan", "peak memory", memory(load).total / 2**30, "GiB")


def measure(preset: str, load: Load, compile: bool) -> None:
    """Trains a few steps on one GPU and records them."""
    device, impl = torch.device("cuda", 0), "longscan, compiled" if compile else "longscan"
    try:
        figures = train(load, device, compile)
    except torch.OutOfMemoryError:
        capacity = torch.cuda.mem_get_info()[1] / 2**30
        record("steps", work_name(preset, load), impl, "does not fit in", capacity, "GiB")
        return
    note(preset, load, *figures, impl)


def main() -> None:
    """Measures each work, then compares with the simulator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--rows", nargs="+", default=["8192"], help="tokens a row, or TOKENSxROWS of a micro-batch")
    parser.add_argument("--recompute", nargs="+", default=["none"])
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks too")
    options = parser.parse_args()
    torch.cuda.set_device(0)
    with process_group(device="cuda:0"):
        for recompute in options.recompute:
            for text in options.rows:
                tokens, _, rows = text.partition("x")
                place = (ParallelDims(zero=0), int(tokens), int(rows or 1), options.batches)
                load = load_of(options.preset, *place, recompute)
                for compile in (False, True) if options.compile else (False,):
                    measure(options.preset, load, compile)
    compare()


def compare(results: Path = recording.RESULTS) -> None:
    """Prints measured and simulated tokens a second of all recorded steps, and the simulator's error."""
    kernels = measured_ratios(recording.RESULTS / "kernels-h100.jsonl")
    for file in sorted(results.glob("steps-*.jsonl")):
        name = file.stem.partition("-")[2]
        if name not in GPUS:
            continue
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for work, (measured, simulated) in errors(rows, Cluster(GPUS[name]), kernels).items():
            error = f"{simulated / measured - 1:+.0%}"
            print(f"{name} {work}: {measured:,.0f} tokens/s, simulated {simulated:,.0f}, {error}")


if __name__ == "__main__":
    main()

"""Measures whole steps of a model on one GPU, beside what `longscan plan` says of them: tokens a second, peak memory.

    python -m benchmarks.steps griffin-1.3b --rows 8192x4 32768 --recompute none full

The works are named by `parallel.plan.work_name`, so that `parallel.plan.errors` finds them: its table of measured and
simulated speeds is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from longscan.data import Batch
from longscan.kernels import Segments
from longscan.models import LanguageModel
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims, process_group
from longscan.parallel.plan import GPUS, Cluster, Load, errors, measured_ratios, memory, work_name
from longscan.parallel.plan.recorded import RATE_METRIC

from .record import RESULTS, record

VOCABULARY = 32000
WARM, STEPS = 2, 5


def batch_of(load: Load) -> Batch:
    """Rows of random tokens, each one document."""
    shape = (load.micro_rows, load.seq_len)
    tokens = torch.randint(load.model.vocab_size, (shape[0], shape[1] + 1))
    segments = Segments.whole(*shape)
    documents = (segments.cu_seqlens, segments.continues, segments.doc_start)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), *documents, ((0, 0),) * shape[0], 0.0)


def seconds_of(engine: Engine, load: Load) -> Iterator[float]:
    """The time of each step, after the warm-up."""
    batches = [batch_of(load) for _ in range(load.micro_batches)]
    for step in range(WARM + STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        engine.forward_backward(batches, load.micro_batches * load.micro_rows * load.seq_len)
        engine.update(1e-4)
        torch.cuda.synchronize()
        if step >= WARM:
            yield time.perf_counter() - began


def measure(preset: str, load: Load) -> None:
    """Trains a few steps and records speed and peak memory, the planned one beside it."""
    device = torch.device("cuda", 0)
    with torch.device(device):
        model = LanguageModel(load.model, activation_checkpoint=load.checkpointing)
    model.init_weights(0)
    engine = Engine(model, load.dims, OptimizerOptions(), load.precision, device)
    torch.cuda.reset_peak_memory_stats()
    work = work_name(preset, load)
    try:
        seconds = statistics.median(seconds_of(engine, load))
    except torch.OutOfMemoryError:
        record("steps", work, "longscan", "does not fit in", torch.cuda.mem_get_info()[1] / 2**30, "GiB")
        return
    finally:
        engine.close()
    record("steps", work, "longscan", RATE_METRIC, load.micro_batches * load.micro_rows * load.seq_len / seconds, "/s")
    record("steps", work, "longscan", "peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    record("steps", work, "longscan plan", "peak memory", memory(load).total / 2**30, "GiB")


def main() -> None:
    """Measures each work, then compares with the simulator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--rows", nargs="+", default=["8192"], help="tokens a row, or TOKENSxROWS of a micro-batch")
    parser.add_argument("--recompute", nargs="+", default=["none"])
    parser.add_argument("--batches", type=int, default=2)
    options = parser.parse_args()
    torch.cuda.set_device(0)
    model = config_from_mapping({**load_preset(options.preset), "vocab_size": VOCABULARY})
    with process_group(device="cuda:0"):
        for checkpointing in options.recompute:
            for text in options.rows:
                tokens, _, rows = text.partition("x")
                dims = ParallelDims(zero=0)
                load = Load(model, dims, int(tokens), int(rows or 1), options.batches, checkpointing=checkpointing)
                measure(options.preset, load)
                torch.cuda.empty_cache()
    compare(RESULTS / "steps-h100.jsonl")


def compare(file: Path) -> None:
    """Prints measured and simulated tokens a second of the recorded steps, and the simulator's error."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kernels = measured_ratios(RESULTS / "kernels-h100.jsonl")
    for work, (measured, simulated) in errors(rows, Cluster(GPUS["h100"]), kernels).items():
        print(f"{work}: {measured:,.0f} tokens/s, simulated {simulated:,.0f}, {simulated / measured - 1:+.0%}")


if __name__ == "__main__":
    main()

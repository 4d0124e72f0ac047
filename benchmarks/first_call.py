"""What the first training step of a whole model costs beyond the second, with nothing compiled and with all on disk.

    python -m benchmarks.first_call [preset ...]

A model has all the mixers of its preset at their real widths and as few layers as hold them all, since what is compiled
does not depend on their number. Its engine and its kernels are made ready as the trainer does it: a rehearsal, all
kernels that are missing compiled at once, then the step. Each figure is of a fresh process whose engine stands; the
first finds an empty cache, the next what the first left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial

import torch

from longscan.data import Batch
from longscan.kernels import Segments
from longscan.models import LanguageModel, ModelConfig, config_from_mapping, load_preset
from longscan.parallel import Engine, OptimizerOptions, ParallelDims

from .gpu_timing import seconds
from .record import ROOT, record

PRESETS = ("griffin-1.3b", "based-1.4b")
VOCABULARY = 32000
TOKENS = 8192
# Seconds that a user may wait for compilers.
MOST_S = 20.0


def small(preset: str) -> ModelConfig:
    """The preset with a vocabulary, cut to the first layers that hold every mixer of its pattern."""
    mapping = load_preset(preset) | {"vocab_size": VOCABULARY}
    pattern = config_from_mapping(mapping).mixers
    return config_from_mapping(mapping | {"layers": 1 + max(pattern.index(mixer) for mixer in set(pattern))})


def engine_of(preset: str) -> Engine:
    """An engine on the GPU that is about to train the small model; the libraries of CUDA are loaded."""
    with torch.device("cuda"):
        model = LanguageModel(small(preset))
    model.init_weights(0)
    a = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (a @ a).sum().backward()
    return Engine(model, ParallelDims(zero=0), OptimizerOptions(), "bf16", "cuda")


def batch_of_two_documents() -> Batch:
    """One row of random tokens."""
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    found = Segments.from_lengths([[TOKENS // 4, TOKENS - TOKENS // 4]])
    return Batch(tokens[:, :-1], tokens[:, 1:], found.cu_seqlens, found.continues, found.doc_start, (), 0.0)


def measure(preset: str) -> dict[str, float]:
    """Seconds of what comes before the first step of this process, of that step and of the second; kernels compiled."""
    from longscan.kernels.precompile import prepare, rehearse

    engine, batch = engine_of(preset), batch_of_two_documents()
    missing = []
    found = {"rehearsal": seconds(lambda: missing.extend(rehearse(partial(engine.rehearse, [batch]))))}
    found |= {"kernels": len(missing), "compiling": seconds(lambda: prepare(missing))}
    for step in ("first", "second"):
        found[step] = seconds(lambda: engine.forward_backward([batch], TOKENS))
        engine.discard()
    return found


def in_a_process(preset: str, cache: str) -> float:
    """Seconds before a second step beyond it, in a fresh process whose compilers keep what they make in `cache`."""
    environment = os.environ | {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    command = [sys.executable, "-m", "benchmarks.first_call", "--child", preset]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{preset}: the process ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items()), file=sys.stderr)
    return found["rehearsal"] + found["compiling"] + found["first"] - found["second"]


def main() -> None:
    """Measures the presets named, or is one such process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="preset", default=PRESETS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.first_call needs a GPU: it measures what compiling for one takes")
    if options.child:
        print(json.dumps(measure(options.child)))
        return
    for preset in options.presets:
        config = small(preset)
        work = f"{preset}, {config.layers} of its layers, T {TOKENS}: first forward and backward beyond the second"
        with tempfile.TemporaryDirectory() as cache:
            for state, most in (("empty cache", MOST_S), ("warm cache", None)):
                record("first_call", work, "longscan", state, in_a_process(preset, cache), "s", most)


if __name__ == "__main__":
    main()

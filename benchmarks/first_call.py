"""What the first training step of a whole model costs beyond the second, with nothing compiled and with all on disk.

    python -m benchmarks.first_call [preset ...]

A model has all the mixers of its preset at their real widths and as few layers as hold them all, since what is compiled
does not depend on their number. Each figure is of a fresh process; the first finds an empty cache, the next what the
first left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
from torch import Tensor

from longscan.kernels import Segments, linear_cross_entropy
from longscan.models import LanguageModel, ModelConfig, config_from_mapping, load_preset

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


def loss_of(model: LanguageModel, tokens: Tensor, segments: Segments) -> Tensor:
    """The summed loss of predicting each token by those before it."""
    hidden = model.hidden(tokens, segments).flatten(0, 1)
    table = "embedding" if model.config.tie_embeddings else "unembedding"
    return linear_cross_entropy(hidden[:-1], model.get_parameter(f"{table}.weight"), tokens.flatten()[1:])


def measure(preset: str) -> tuple[float, float]:
    """Seconds of the first and of the second forward and backward of this process."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LanguageModel(small(preset))
        tokens = torch.randint(VOCABULARY, (1, TOKENS))
    model.init_weights(0)
    model.to(torch.bfloat16)
    segments = Segments.from_lengths([[TOKENS // 4, TOKENS - TOKENS // 4]], device="cuda")
    a = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (a @ a).sum().backward()  # the libraries of CUDA load here

    def step() -> None:
        loss_of(model, tokens, segments).backward()

    return seconds(step), seconds(step)


def in_a_process(preset: str, cache: str) -> float:
    """Seconds of the first step beyond the second in a fresh process whose compilers keep what they make in `cache`."""
    environment = os.environ | {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    command = [sys.executable, "-m", "benchmarks.first_call", "--child", preset]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{preset}: the process ended with {done.returncode}")
    first, second = json.loads(done.stdout.splitlines()[-1])
    return first - second


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

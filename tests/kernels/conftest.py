"""Kernels run in Triton's interpreter where there is no GPU; uninitialised memory is NaN in every test here."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

from longscan.kernels import Segments

sys.path.insert(0, str(Path(__file__).parent))  # for what these tests share: sass.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when triton is first imported, which the first kernel call does.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In deterministic mode PyTorch fills what torch.empty and its kin return with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """The interpreter patches triton.language afresh at each call of a device function; once a launch is enough."""
    if DEVICE != "cpu":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    patching = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton"):
            return patching(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
    yield
    InterpretedFunction.__call__ = patching


@pytest.fixture(scope="session")
def random_segments():
    """(batch, tokens, seed) -> Segments: documents of random lengths, every other row's first one begun earlier."""

    def build(batch: int, tokens: int, seed: int = 0, device: str = DEVICE) -> Segments:
        chance = random.Random(seed)
        lengths = []
        for _ in range(batch):
            cuts = sorted(chance.sample(range(1, tokens), min(tokens - 1, chance.randint(1, 4))))
            lengths.append([b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)])
        return Segments.from_lengths(lengths, [7 * (row % 2 == 0) for row in range(batch)], device)

    return build

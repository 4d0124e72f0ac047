"""Kernels run in Triton's interpreter where there is no GPU; uninitialised memory is NaN in every test here."""

import dataclasses
import itertools
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.kernels import Segments

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for what these tests share: sass.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when triton is first imported, which the first kernel call does.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where there is a GPU, what runs on `device` is the GPU's: `make test-gpu` runs it, and nothing else does."""
    for item in items:
        if DEVICE == "cuda" and "device" in getattr(item, "fixturenames", ()) and HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


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
    """Runs kernels in the interpreter without the work whose result it drops.

    It patches triton.language afresh at each call of a device function, where once a launch (and once for Triton's
    own functions, which stay patched) is enough; it computes every sum and product of integers again for an assertion
    on overflow that is off; it makes a table of all dtypes at each look-up of one; and it scans element by element
    what has rows of independent elements.
    """
    if DEVICE != "cpu":
        yield
        return
    from triton.runtime import interpreter

    patching, numpy_dtype = interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "with debug the interpreter asserts that integers do not overflow"
    patched, dtypes = set(), {}

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton") and module not in patched:
            patched.add(module)
            return patching(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def look_up(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    def scan(self, inputs):
        steps = range(inputs[0].handle.data.shape[self.axis])
        rows = [[self.to_tensor(t.handle.data.take([i], self.axis), t.dtype) for t in inputs] for i in steps]
        columns = zip(*itertools.accumulate(rows, lambda left, right: self.combine_fn.fn(*left, *right)), strict=True)
        joined = [np.concatenate([t.handle.data for t in column], self.axis) for column in columns]
        return [self.to_tensor(data, t.dtype) for data, t in zip(joined, inputs, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ScanOps, "generic_scan", scan)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", look_up)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


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

"""Kernels compiled all at once: what a rehearsal notes is compiled for a Hopper GPU, and the work finds it there."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# In a process of its own: here triton may be in interpreter mode, where nothing compiles. Its driver is one that
# launches nothing and says so.
BEGIN = """
import contextlib, json, sys, types

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from longscan.kernels import precompile

launched, loaded = [], []


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, *arguments):
        launched.append(self.name)


class Driver:
    launcher_cls = Launcher
    utils = types.SimpleNamespace(
        load_binary=lambda name, *_: loaded.append(name) or (1, 2, 10, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_device = lambda: 0


@triton.jit
def fill(p, tokens, dtype: tl.constexpr, scale: tl.constexpr):
    tl.store(p + tl.arange(0, 16), (tokens * scale).to(dtype))


@triton.jit
def broken(p):
    tl.store(p, absent)
"""
WORKS = """
def work():
    for tokens in (32, 48, 33):
        p = torch.zeros(tokens)
        rotary.rotate(torch.zeros(1, tokens, 2, 8), torch.zeros(1, tokens, 4), torch.zeros(1, tokens, 4), False)
        fill[(1,)](p, tokens, tl.float32, 0.5)


from longscan.kernels.rotary import kernel as rotary

found = {}
missing = precompile.rehearse(work)
found["missing"] = [kernel.function.__name__ for kernel in missing]
found["rehearsed"] = len(launched), len(loaded)
precompile.prepare(missing)
found["prepared"] = len(launched), sorted(loaded)
triton.knobs.compilation.listener = lambda **_: sys.exit("compiled after all")
work()
found["worked"] = list(launched)
found["again"] = len(precompile.rehearse(work)), len(launched)
print(json.dumps(found))
"""
FAILS = """
def work():
    fill[(1,)](torch.zeros(16), 1, tl.float32, 1.0)
    broken[(1,)](torch.zeros(16))


precompile.prepare(precompile.rehearse(work))
"""
# A kernel in Gluon that takes a tensor descriptor, whose layout is a part of its type.
GLUON = """
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def copy(source, p_y, p_absent, tokens, ROWS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    block = gl.allocate_shared_memory(source.dtype, [ROWS, 64], source.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, ROWS * 64 * 2)
    tma.async_copy_global_to_shared(source, [0, 0], full, block)
    mbarrier.wait(full, 0)
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    o = o_row[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(p_y + o, block.load(LAYOUT), mask=o_row[:, None] < tokens)


@gluon.jit
def laid_out(p, LAYOUT: gl.constexpr):
    gl.store(p + gl.arange(0, 128, LAYOUT), 1)


def copied(x, rows=64):
    y = torch.zeros_like(x)
    layout = gl.NVMMASharedLayout.get_default_for([rows, 64], gl.bfloat16)
    copy[(1,)](TensorDescriptor.from_tensor(x, [rows, 64], layout), y, None, len(x), rows, num_warps=4)
    return y
"""
GLUON_WORKS = """
def work():
    for tokens, rows in ((32, 64), (33, 64), (32, 32)):
        copied(torch.zeros(tokens, 64, dtype=torch.bfloat16), rows)


missing = precompile.rehearse(work)
precompile.prepare(missing)
triton.knobs.compilation.listener = lambda **_: sys.exit("compiled after all")
work()
found = len(missing), loaded, list(launched), len(precompile.rehearse(work))
try:
    precompile.rehearse(lambda: laid_out[(1,)](torch.zeros(128), gl.BlockedLayout([1], [32], [4], [0])))
except TypeError as error:
    print(json.dumps([*found, str(error)]))
"""
GLUON_ON_A_GPU = """
import json

from triton import knobs

from longscan.kernels import precompile

x = torch.randn(33, 64, device="cuda", dtype=torch.bfloat16)
compiled = []
missing = precompile.rehearse(lambda: copied(x))
knobs.compilation.listener = lambda **_: compiled.append(1)
precompile.prepare(missing)
print(json.dumps([len(missing), len(compiled), torch.equal(copied(x), x), len(compiled)]))
"""
ON_A_GPU = """
import json

import torch
from triton import knobs

from longscan.kernels import linear_scan, precompile, short_conv

inputs = [torch.randn(2, 33, 16, device="cuda") for _ in range(2)]
weight = torch.randn(16, 4, device="cuda")


def work(implementation="triton"):
    x, log_a = (tensor.clone().requires_grad_() for tensor in inputs)
    h, _ = linear_scan(short_conv(x, weight, activation="silu", implementation=implementation)[0], -log_a.abs(),
                       implementation=implementation)
    return [h.detach(), *torch.autograd.grad(h.square().sum(), (x, log_a))]


compiled = []
missing = precompile.rehearse(work)
knobs.compilation.listener = lambda **_: compiled.append(1)
precompile.prepare(missing)
count, pairs = len(compiled), list(zip(work(), work("reference"), strict=True))
near = [torch.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in pairs]
print(json.dumps([len(missing), count, len(compiled), all(near)]))
"""


def run(script, folder):
    path = folder / "script.py"
    path.write_text(script)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    return subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)


def test_what_a_rehearsal_notes_is_compiled_once_and_found(tmp_path):
    done = run(BEGIN + WORKS, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["missing"] == ["_rotate", "fill"] * 2, "a number of tokens that 16 divides, and another"
    assert found["rehearsed"] == [0, 0]
    assert found["prepared"] == [0, ["_rotate", "_rotate", "fill", "fill"]]
    assert found["worked"] == ["_rotate", "fill"] * 3
    assert found["again"] == [0, 12], "nothing is missing, and what is there is launched"


def test_what_does_not_compile_raises(tmp_path):
    done = run(BEGIN + FAILS, tmp_path)
    assert done.returncode == 1
    assert "absent is not defined" in done.stderr


def test_kernels_in_gluon_are_noted_and_compiled_alike(tmp_path):
    done = run(BEGIN + GLUON + GLUON_WORKS, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    missing, loaded, launched, again, error = json.loads(done.stdout)
    assert missing == 3 and loaded == launched == ["copy"] * 3 and again == 0
    assert "BlockedLayout is not JSON serializable" in error


@pytest.mark.gpu
def test_in_gluon_on_a_gpu(tmp_path):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no GPU with TMA")
    done = run(GLUON + GLUON_ON_A_GPU, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [1, 1, True, 1]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    done = run(ON_A_GPU, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    missing, prepared, compiled, near = json.loads(done.stdout)
    assert missing == prepared == compiled == 5 and near


def test_its_import_leaves_open_whether_kernels_are_interpreted():
    script = "import sys, longscan.kernels.precompile; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0

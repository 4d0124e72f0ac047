"""The gate projections' kernels compile for a Hopper GPU on a machine that has none, within an SM's means."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: here triton may be in interpreter mode, where nothing compiles.
SCRIPT = """
import torch
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longscan.kernels.block_diagonal import kernel

OPERANDS = {torch.bfloat16: (tl.bfloat16, "*bf16"), torch.float32: (tl.float32, "*fp32")}


def build(jitted, tile, side, dtype, least=32):
    operand, pointer = OPERANDS[dtype]
    constants = kernel.plan(torch.empty(16, side, side, dtype=dtype), tile).constants(operand, least)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    names = jitted.arg_names

    def kind(name):
        if name in constants:
            return "constexpr"
        return "i32" if name[:2] != "p_" else "*fp32" if name in {"p_dweight", "p_dbias"} else pointer

    signature = {name: kind(name) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n[:2] == "p_"}
    values = {(names.index(n),): v for n, v in constants.items()}
    built = compile(ASTSource(jitted, signature, values, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    print(built.metadata.shared, "wgmma" in ptx, "mma.sync" in ptx)


for side, dtype in (*((side, torch.bfloat16) for side in (160, 96, 256, 13)), (64, torch.float32)):
    build(kernel._forward, kernel.FORWARD, side, dtype)
    build(kernel._inputs, kernel.INPUTS, side, dtype)
    build(kernel._weights, kernel.WEIGHTS, side, dtype, 64)
"""


def test_kernels_compile_for_sm_90(tmp_path):
    """Shared memory fits an SM's 227 KiB; 16-bit products all take the tensor cores' wide path, fp32 ones none."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [line.split() for line in done.stdout.splitlines()]
    assert all(int(shared) <= 227 * 1024 for shared, *_ in built), done.stdout
    assert [paths for _, *paths in built] == [["True", "False"]] * 12 + [["False", "False"]] * 3, done.stdout

"""short_conv's kernels compile for a Hopper GPU on a machine that has none, and a thread's walk stays in registers."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: here triton may be in interpreter mode, where nothing compiles.
SCRIPT = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longscan.kernels.short_conv import kernel

SINGLE, OPTIONAL = {"p_parts"}, {"p_bias", "p_tail", "p_positions", "p_dy", "p_dtail"}


def build(jitted, given=(), warps=4, **constants):
    # `given` are the optional arguments that a launch gives; strides and groups of 1 arrive as constants.
    names = jitted.arg_names
    constants = dict(group=1, stride_s=1) | constants | {n: None for n in OPTIONAL - set(given)}
    signature = {}
    for name in names:
        kind = {"p_positions": "*i64"}.get(name, "*fp32" if name in SINGLE else "*bf16")
        signature[name] = "constexpr" if name in constants else kind if name[:2] == "p_" else "i32"
    even = {n for n in names if signature[n][0] == "*" or n == "width"}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in even}
    values = {(names.index(n),): v for n, v in constants.items() if n in names}
    built = compile(
        ASTSource(jitted, signature, values, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    assert built.asm["cubin"]
    return built.metadata.shared


def sizes(tile, taps, activation=None):
    constants = tile.constants(2560, taps) | {"ACTIVATION": activation}
    return {"warps": constants.pop("num_warps")} | constants


small = kernel.Tile(rows=4, steps=2, block=32, warps=2)
print(build(kernel._forward, **sizes(kernel.FORWARD[0], 4)))
print(build(kernel._forward, {"p_bias", "p_tail", "p_positions"}, **sizes(small, 3, "silu")))
print(build(kernel._forward, {"p_dy"}, **sizes(small, 10, "gelu")))
build(kernel._backward, {"p_dy"}, **sizes(kernel.BACKWARD[0], 4))
build(kernel._backward, OPTIONAL, **sizes(small, 3, "silu"))
build(kernel._backward, OPTIONAL, group=2560, **sizes(small, 10))
tile = dict(kernel.SUM_TILE)
build(kernel._sum_parts, {"p_bias"}, warps=tile.pop("num_warps"), TAPS=4, parts=1, p_dbias=None, **tile)
"""


def test_kernels_compile_for_sm_90(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0"] * 3, f"shared memory of the forward kernels: {done.stdout}"

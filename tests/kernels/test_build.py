"""The kernels compile for a Hopper GPU on a machine that has none."""

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
from longscan.kernels.linear_scan import kernel as scan
from longscan.kernels.rg_lru import kernel as gated

INTEGERS = {"tokens", "width", "piece", "pieces"}
SINGLE = {"p_state", "p_transition", "p_initial", "p_final", "p_dfinal", "p_dinitial", "p_rate", "p_drate", "p_extra",
          "p_last", "p_product"}
OPTIONAL = {"p_initial", "p_extra", "p_resets", "p_dh"}


def kind(name, absent):
    if name in ("BLOCK_D", "REVERSE") or (absent and name in OPTIONAL):
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    return "*u8" if name == "p_resets" else "*fp32" if name in SINGLE else "*bf16"


def build(kernel, absent, reverse=False):
    names = kernel.arg_names
    signature = {name: kind(name, absent) for name in names}
    values = {"BLOCK_D": 128, "REVERSE": reverse}
    constants = {(i,): values.get(n) for i, n in enumerate(names) if signature[n] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n == "width"}
    source = ASTSource(kernel, signature, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2})
    assert built.asm["cubin"]
    print(kernel.__name__, "cp.async" in built.asm["ptx"])


for absent in (False, True):
    for reverse in (False, True):
        build(scan._summary, absent, reverse)
    for kernel in (scan._walk_forward, scan._walk_backward, scan._fold_pieces, gated._summary,
                   gated._summary_reverse, gated._walk_forward, gated._walk_backward):
        build(kernel, absent)
"""


def test_kernels_compile_for_sm_90(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 18
    assert all(line.endswith("True") for line in lines), f"loads are not prefetched: {done.stdout}"

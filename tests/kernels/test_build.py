"""The kernels compile for a Hopper GPU on a machine that has none."""

import pytest
from sass import printed

pytest.importorskip("triton")

# In a process of its own: here triton may be in interpreter mode, where nothing compiles.
SCRIPT = """
import re

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longscan.kernels.linear_scan import kernel as scan
from longscan.kernels.linear_scan.chain import Tile
from longscan.kernels.partials import SUM_TILE
from longscan.kernels.rg_lru import kernel as gated
from sass import loops

INTEGERS = {"batch", "tokens", "tiles", "parts"}
SINGLE = {"p_final", "p_transition", "p_initial", "p_dfinal", "p_dinitial", "p_a_param", "p_da_param", "p_drate",
          "p_extra"}
OPTIONAL = {"p_initial", "p_extra", "p_resets", "p_dh", "p_h", "p_transition"}


def kind(name, absent):
    if name.isupper() or name in absent:
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    return {"p_resets": "*u8", "p_words": "*i64"}.get(name, "*fp32" if name in SINGLE else "*bf16")


def build(kernel, absent, warps, ones=(), **sizes):
    # As for a launch whose arguments `ones` are 1, which makes constants of them.
    names = kernel.arg_names
    signature = {name: kind(name, absent | set(ones)) for name in names}
    sizes |= dict.fromkeys(ones, 1)
    constants = {(i,): sizes.get(n) for i, n in enumerate(names) if signature[n] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert built.asm["cubin"]
    polls = [loop for loop in loops(built.asm["ptx"]) if "ld.volatile" in loop]
    assert bool(polls) == ("p_words" in names)
    shared = any(re.search(r"\\bbar(rier)?\\b", loop) for loop in polls)
    assert not shared, f"{kernel}: warps share what one of them polled"
    block = f"tensor<{sizes['ROWS']}x{sizes['BLOCK_D']}x" if "ROWS" in sizes else "tensor"
    return any("ttg.convert_layout" in line and block in line for line in built.asm["ttgir"].splitlines())


SMALL = Tile(rows=2, steps=2, block=16, warps=2)


def sizes(tile, width=2560):
    cut = {"ROWS": tile.rows, "STEPS": tile.steps, "BLOCK_D": tile.block, "SKIP": tile.skip}
    return {"warps": tile.warps, "WIDTH": width} | cut


for module in (scan, gated):
    for absent in (OPTIONAL - {"p_h"}, {"p_h", "p_initial"}, {"p_transition"}):
        print("forward", build(module._forward, absent, **sizes(module.FORWARD[0])))
    for absent in (OPTIONAL - {"p_h", "p_dh"}, {"p_dh", "p_initial"}, set()):
        print("backward", build(module._backward, absent, **sizes(module.BACKWARD[0])))
    for tile in (module.FORWARD[1], module.BACKWARD[1]):
        kernel = module._forward if tile is module.FORWARD[1] else module._backward
        print("short", build(kernel, OPTIONAL - {"p_h", "p_dh", "p_resets"}, **sizes(tile)))
    for ones in ({"batch", "tiles"}, {"batch", "tokens", "tiles"}):
        build(module._forward, {"p_transition", "p_resets"}, ones=ones, **sizes(SMALL, 1))
        build(module._backward, {"p_extra"}, ones=ones, **sizes(SMALL, 37))
    for tile in {*module.SUMMARY, Tile(rows=8, steps=16, block=64, warps=8, skip=2)}:
        print("adjoint", build(module._adjoint, set(), **sizes(tile)))
        print("summary", build(module._forward, {"p_h", "p_initial", "p_final"}, **sizes(tile)))
SUM = {name: size for name, size in SUM_TILE.items() if name.isupper()}
for ones in ({}, {"parts"}):
    build(gated._sum_rates, set(), ones=ones, WIDTH=2560, warps=SUM_TILE["num_warps"], **SUM)
"""


def test_kernels_compile_for_sm_90(tmp_path):
    lines = printed(SCRIPT, tmp_path)
    assert len(lines) == 26
    assert all(line.endswith("False") for line in lines), f"stretches leave their registers: {lines}"

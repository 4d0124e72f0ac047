"""Attention's kernels compile for a Hopper GPU: on its wide tensor cores, no operand's place lost by ptxas."""

import pytest
from sass import printed, unwritten

pytest.importorskip("triton")

SCRIPT = """
import torch
import triton
from sass import compiled, lost
from longscan.kernels.attention import kernel

JITTED = {"forward": kernel._forward, "dq": kernel._backward_queries}
OPTIONAL = {"p_doc_start", "p_until", "p_slopes", "p_norms"}


def kind(name):
    if name[:2] != "p_":
        return "fp32" if name in {"factor", "scale"} else "i32"
    single = {"p_lse", "p_delta", "p_slopes", "p_norms"}
    return "*fp32" if name in single else "*i32" if name in {"p_doc_start", "p_until"} else "*bf16"


def build(work, dim, groups, window, given, parts=1):
    block = max(16, triton.next_power_of_2(dim))
    tile = kernel.tile_of(work, torch.bfloat16, block, groups, window)
    sizes = {"BLOCK_K": block, "BLOCK_V": block, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "PRECISION": "tf32"}
    sizes |= {"HEADS": 16, "GROUPS": groups, "KEY_DIM": dim, "VALUE_DIM": dim, "INNER": window > kernel.NARROW}
    # With neither documents nor ALiBi, as if the window were smaller than the rows.
    sizes |= {"TURN": not given, "PARTS": parts}
    absent = {"dk": {"p_dv"}, "dv": {"p_dk"}}.get(work, set()) | (set() if given else OPTIONAL)
    jitted = JITTED.get(work, kernel._backward_keys)
    wide = {"p_dk": "*fp32", "p_dv": "*fp32"} if parts > 1 else {}
    even = () if given else ("tokens", "keys")
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    built = compiled(jitted, sizes | dict.fromkeys(absent), lambda name: wide.get(name) or kind(name), even, **options)
    tensor_cores = "wgmma" in built.asm["ptx"]
    print(work, dim, groups, window, *tile, given, parts, "wgmma" if tensor_cores else "slow", lost(built.asm["cubin"]))


def norms(name):
    return "*i32" if name == "p_norms" else kind(name)


for dim in {case[0] for case in CASES}:
    block = max(16, triton.next_power_of_2(dim))
    sizes = {"HEADS": 16, "GROUPS": 16, "DIM": dim, "BLOCK_D": block, "BLOCK_M": kernel.NORMS_BLOCK // block}
    assert compiled(kernel._norms, sizes, norms, num_warps=8).asm["cubin"]
for dim, groups, window, given in CASES:
    for work in ("forward", "dq", *(("dkv",) if dim <= kernel.MOST_SHARED else ("dk", "dv"))):
        build(work, dim, groups, window, given)
        if work not in JITTED:
            build(work, dim, groups, window, given, parts=4)
"""
# Of the head dim, query heads to a key head, window; and whether documents and ALiBi are given, and odd sizes.
KINDS = [(16, 4096), (1, 4096), (16, 64)]
FEW = [(128, 16, 4096, False), (40, 16, 64, True)]
DIMS = (16, 33, 64, 80, 96, 127, 128, 160, 255, 256)


def check(cases, tmp_path):
    lines = printed(f"CASES = {cases}\n{SCRIPT}", tmp_path)
    assert lines and all("wgmma" in line for line in lines), lines
    assert all(line.endswith("[]") for line in lines), f"ptxas lost registers: {lines}"


@pytest.mark.timeout(300)
def test_kernels_compile_for_sm_90(tmp_path):
    check(FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dim", DIMS)
def test_every_tile_compiles_for_sm_90(dim, tmp_path):
    check([(dim, *kind, given) for kind in KINDS for given in (False, True)], tmp_path)


def test_a_register_that_nothing_wrote_is_seen():
    whole = """
        /*0010*/                   ULDC.64 UR8, c[0x0][0x208] ;
        /*0020*/                   UMOV UR6, UR8 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
    """
    assert unwritten(whole) == []
    assert unwritten(whole.replace("UMOV UR6, UR8", "UMOV UR7, UR8")) == [6]
    assert unwritten(whole.replace("ULDC.64 UR8", "ULDC.64 UR10")) == [8]

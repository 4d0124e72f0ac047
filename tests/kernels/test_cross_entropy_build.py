"""Cross entropy's kernels compile for a Hopper GPU, and programs that stay fetch rows ahead into shared memory."""

import pytest
from sass import printed

pytest.importorskip("triton")

SCRIPT = """
import torch
from sass import compiled, lost
from longscan.kernels.cross_entropy import kernel


def kind(name):
    if name[:2] != "p_":
        return {"rows": "i32", "columns": "i32", "first": "i32", "ignored": "i32", "size": "i64"}.get(name, "fp32")
    return {"p_logits": "*bf16", "p_y": "*bf16", "p_labels": "*i64"}.get(name, "*fp32")


def build(jitted, columns, cap, **constants):
    _, sizes = kernel._plan(torch.empty(4096, columns, dtype=torch.bfloat16, device="meta"), cap)
    constants |= {name: size for name, size in sizes.items() if name.isupper()}
    even = () if columns % 16 else ("columns",)
    built = compiled(jitted, constants, kind, even, num_warps=sizes["num_warps"])
    print(jitted.__name__, columns, cap, built.metadata.shared, lost(built.asm["cubin"]))


for columns, cap in ((32000, 0.0), (257, 30.0), (50257, 30.0)):
    build(kernel._loss_and_gradient, columns, cap, SMOOTHED=cap != 0)
    build(kernel._statistics, columns, cap)
built = compiled(kernel._gradient, {"CAPPED": True, "BLOCK": kernel.PART}, kind, num_warps=kernel.PART_WARPS)
print("_gradient", kernel.PART, 30.0, built.metadata.shared, lost(built.asm["cubin"]))
built = compiled(kernel._scale, {"BLOCK": kernel.PART}, kind, ("size",), num_warps=kernel.PART_WARPS)
wide = built.asm["ptx"].count("ld.global.v4") and built.asm["ptx"].count("st.global.v4")
print("_scale", kernel.PART, bool(wide), built.metadata.shared, lost(built.asm["cubin"]))
"""


@pytest.mark.timeout(300)
def test_kernels_compile_for_sm_90(tmp_path):
    lines = printed(SCRIPT, tmp_path)
    assert len(lines) == 8 and all(line.endswith("[]") for line in lines), lines
    shared = {tuple(line.split()[:3]): int(line.split()[3]) for line in lines}
    assert max(shared.values()) <= 227 * 1024, lines
    for name in ("_loss_and_gradient", "_statistics"):
        assert shared[name, "32000", "0.0"] >= 2 * 65536, f"rows are not fetched ahead: {lines}"
    assert shared["_scale", "2048", "True"] == 0, f"not 16 bytes at a time: {lines}"

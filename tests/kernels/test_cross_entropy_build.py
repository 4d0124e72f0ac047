"""Cross entropy's kernels compile for a Hopper GPU, and programs that stay fetch rows ahead into shared memory."""

import pytest
from sass import printed

pytest.importorskip("triton")

SCRIPT = """
import torch
from sass import compiled, lost
from longscan.kernels.cross_entropy import chunks, kernel


def kind(name):
    if name[:2] != "p_":
        whole = {"rows", "columns", "stride", "first", "ignored"}
        return "i64" if name == "size" else "i32" if name in whole else "fp32"
    return {"p_logits": "*bf16", "p_y": "*bf16", "p_labels": "*i64"}.get(name, "*fp32")


def build(jitted, columns, cap, sizes, **constants):
    constants |= {name: size for name, size in sizes.items() if name.isupper()}
    even = ("p_logits",) if columns == 50264 else ("p_logits", "stride")
    built = compiled(jitted, constants, kind, even, num_warps=sizes["num_warps"])
    # But for the label's logit, all of it: 16 bytes in the vectors of 4.
    halves = [line for line in built.asm["ptx"].splitlines() if ".global.b16" in line]
    wide = len(halves) <= 1 and (jitted is kernel._statistics or "st.global.v4" in built.asm["ptx"])
    print(jitted.__name__, columns, cap, wide, built.metadata.shared, lost(built.asm["cubin"]))


for columns, cap in ((32000, 0.0), (257, 30.0), (50257, 0.0), (50257, 30.0), (50264, 0.0), (128256, 0.0)):
    logits = torch.empty(4096, chunks.aligned(columns, 2), dtype=torch.bfloat16, device="meta")[:, :columns]
    sums, whole = (kernel._plan(logits, cap, *step)[1] for step in
                   ((kernel.SUMS, kernel.SUMS_WARPS), (kernel.BLOCK, kernel.WARPS)))
    build(kernel._loss_and_gradient, columns, cap, whole, SMOOTHED=cap != 0)
    build(kernel._statistics, columns, cap, sums)
part = {"CAPPED": True, "BLOCK": kernel.PART, "LANES": 8, "num_warps": kernel.PART_WARPS}
build(kernel._gradient, kernel.PART, 30.0, part)
built = compiled(kernel._scale, {"BLOCK": kernel.PART}, kind, ("size",), num_warps=kernel.PART_WARPS)
wide = built.asm["ptx"].count("ld.global.v4") and built.asm["ptx"].count("st.global.v4")
print("_scale", kernel.PART, 0.0, bool(wide), built.metadata.shared, lost(built.asm["cubin"]))
"""


@pytest.mark.timeout(300)
def test_kernels_compile_for_sm_90(tmp_path):
    lines = printed(SCRIPT, tmp_path)
    assert len(lines) == 14 and all(line.endswith("[]") for line in lines), lines
    assert all(line.split()[3] == "True" for line in lines), f"not 16 bytes at a time: {lines}"
    shared = {tuple(line.split()[:3]): int(line.split()[4]) for line in lines}
    assert max(shared.values()) <= 227 * 1024, lines
    for name in ("_loss_and_gradient", "_statistics"):
        assert shared[name, "32000", "0.0"] >= 2 * 65536, f"rows are not fetched ahead: {lines}"

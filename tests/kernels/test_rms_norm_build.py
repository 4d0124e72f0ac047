"""rms_norm's kernels compile for a Hopper GPU, keep rows in registers, and fetch them ahead in the backward pass."""

import pytest
from sass import printed

pytest.importorskip("triton")

SCRIPT = """
from sass import compiled, spilled
from longscan.kernels.rms_norm import kernel
from longscan.kernels.sizes import next_power_of_2


def build(jitted, dtype, **sizes):
    kinds = {"rows": "i32", "eps": "fp32", "p_root": "*fp32", "p_parts": "*fp32"}
    options = {name: sizes.pop(name) for name in ("num_warps", "maxnreg") if name in sizes}
    built = compiled(jitted, sizes, lambda name: kinds.get(name, f"*{dtype}"), **options)
    copies = built.asm["ptx"].count("cp.async.cg.shared.global [ ")
    print(jitted.__name__, sizes["WIDTH"], dtype, built.metadata.shared, copies > 0, spilled(built.asm["cubin"]))


for dtype, size in (("bf16", 2), ("fp32", 4)):
    for width in (64, 1792, 2560, 3584, 12288):
        build(kernel._forward, dtype, **kernel.FORWARD.constants(width, next_power_of_2(width)))
        build(kernel._backward, dtype, **kernel.BACKWARD.staying(width, size)[1])
    build(kernel._backward, dtype, p_parts=None, **kernel.BACKWARD.staying(2560, size)[1])
"""


@pytest.mark.timeout(300)
def test_kernels_compile_for_sm_90(tmp_path):
    lines = [line.split() for line in printed(SCRIPT, tmp_path)]
    assert len(lines) == 22
    for name, width, dtype, shared, ahead, spilled in lines:
        assert spilled == "0", f"{name} of {width} in {dtype} spills"
        # An L40S has no more.
        assert int(shared) <= 99 * 1024
        widest = (width, dtype) == ("12288", "fp32")
        assert name == "_forward" or widest or ahead == "True", f"{width} in {dtype} is not fetched ahead"

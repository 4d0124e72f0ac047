"""Partial sums are added as torch.sum in float64 adds them, of any number of parts and columns."""

import pytest
import torch
from sass import printed

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", [(1, 5), (2, 700), (16, 257), (17, 33), (512, 1), (513, 37), (300, 2, 7, 3), (1056, 48)]
)
def test_sum_partials(shape, dtype, device):
    from longscan.kernels.partials import sum_partials

    partials = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    total = sum_partials(partials, dtype)
    assert (total.shape, total.dtype) == (shape[1:], dtype)
    exact, size = partials.double().sum(0), partials.double().abs().sum(0)
    # Triton's interpreter cuts bf16 off where a GPU rounds.
    rounding = torch.finfo(dtype).eps / (2 if device == "cuda" else 1)
    assert ((total - exact).abs() <= rounding * exact.abs() + torch.finfo(torch.float32).eps * size).all()
    assert torch.equal(total, sum_partials(partials, dtype))


SCRIPT = """
from sass import compiled, spilled
from longscan.kernels import partials

kinds = {"p_partials": "*fp32", "p_total": "*bf16"}
for tile in (partials.SUM_TILE, partials.FEW_TILE):
    sizes = dict(tile)
    warps = sizes.pop("num_warps")
    for ones, even in (({}, ()), ({}, ("size",)), ({"parts": 1}, ()), ({"size": 1}, ())):
        kind = lambda name: kinds.get(name, "i32")
        built = compiled(partials._sum_partials, sizes | ones, kind, even, num_warps=warps)
        print(built.metadata.num_warps, spilled(built.asm["cubin"]))
"""


def test_kernel_compiles_for_sm_90(tmp_path):
    assert printed(SCRIPT, tmp_path) == ["8 0"] * 4 + ["4 0"] * 4

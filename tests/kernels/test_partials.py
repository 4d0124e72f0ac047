"""Partial sums are added as torch.sum in float64 adds them, of any number of parts and columns."""

import pytest
import torch
from sass import printed

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 5), (2, 16), (127, 1), (129, 37), (300, 2, 7, 3), (1056, 48)])
def test_sum_partials(shape, dtype, device):
    from longscan.kernels.partials import sum_partials

    partials = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    total = sum_partials(partials, dtype)
    assert (total.shape, total.dtype) == (shape[1:], dtype)
    exact, size = partials.double().sum(0), partials.double().abs().sum(0)
    bound = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * size
    assert ((total - exact).abs() <= bound).all()
    assert torch.equal(total, sum_partials(partials, dtype))


SCRIPT = """
from sass import compiled, spilled
from longscan.kernels import partials

kinds = {"p_partials": "*fp32", "p_total": "*bf16"}
for ones in ({}, {"rows": 1}, {"size": 1}):
    built = compiled(partials._sum, partials.TILE | ones, lambda name: kinds.get(name, "i32"))
    print(spilled(built.asm["cubin"]))
"""


def test_kernel_compiles_for_sm_90(tmp_path):
    assert printed(SCRIPT, tmp_path) == ["0"] * 3

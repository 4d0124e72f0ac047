"""Partial sums are added as torch.sum in float64 adds them, of any number of parts and columns."""

import pytest
import torch
from sass import printed

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 5), (2, 16), (127, 1), (129, 37), (300, 2, 7, 3), (1056, 48)])
def test_sum_parts(shape, dtype, device):
    from longscan.kernels.parts import sum_parts

    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    total = sum_parts(parts, dtype)
    assert (total.shape, total.dtype) == (shape[1:], dtype)
    exact, size = parts.double().sum(0), parts.double().abs().sum(0)
    bound = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * size
    assert ((total - exact).abs() <= bound).all()
    assert torch.equal(total, sum_parts(parts, dtype))


SCRIPT = """
from sass import compiled, spilled
from longscan.kernels import parts

for ones in ({}, {"parts": 1}, {"size": 1}):
    built = compiled(parts._sum, parts.TILE | ones, lambda n: {"p_parts": "*fp32", "p_total": "*bf16"}.get(n, "i32"))
    print(spilled(built.asm["cubin"]))
"""


def test_kernel_compiles_for_sm_90(tmp_path):
    assert printed(SCRIPT, tmp_path) == ["0"] * 3

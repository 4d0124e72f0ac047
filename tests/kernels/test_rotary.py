"""rotary, reference and kernel, held to a multiplication of complex numbers in float64."""

import os
import subprocess
import sys

import pytest
import torch

from longscan.kernels import rotary

# (B, T, H, K) and angles a token: whole heads, half of each, none alike, one token of one head, more heads than a tile.
SHAPES = {
    "whole": ((2, 33, 4, 16), 8),
    "half": ((1, 65, 3, 32), 8),
    "odd": ((3, 7, 5, 11), 3),
    "one": ((1, 1, 1, 2), 1),
    "many": ((1, 5, 40, 64), 32),
}
every_shape = pytest.mark.parametrize(("shape", "angles"), SHAPES.values(), ids=SHAPES)


def make(shape, angles, dtype=torch.float64, device="cpu"):
    """(x, cos, sin, a gradient of the output)."""
    rng = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    theta = 100 * torch.randn(*shape[:2], angles, generator=rng, dtype=torch.float64)
    table = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = (t.to(device, table) for t in (theta.cos(), theta.sin()))
    return x.to(device, dtype).requires_grad_(), cos, sin, grad.to(device, dtype)


def naive(x, cos, sin):
    angles = cos.shape[-1]
    numbers = torch.complex(x[..., :angles], x[..., angles : 2 * angles]) * torch.complex(cos, sin)[:, :, None]
    return torch.cat([numbers.real, numbers.imag, x[..., 2 * angles :]], dim=-1)


def run(function, x, cos, sin, grad):
    """The output and the gradient of x; x and the gradient that came in stay what they were."""
    before = x.detach().clone(), grad.clone()
    y = function(x, cos, sin)
    found = [y.detach(), *torch.autograd.grad(y, x, grad)]
    assert torch.equal(x, before[0])
    assert torch.equal(grad, before[1])
    return found


def using(implementation):
    return lambda x, cos, sin: rotary(x, cos, sin, implementation=implementation)


def error(actual, exact):
    return float((actual.cpu().double() - exact).norm() / exact.norm())


@every_shape
def test_reference_is_a_complex_product(shape, angles):
    inputs = make(shape, angles)
    for found, exact in zip(run(using("reference"), *inputs), run(naive, *inputs), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, cos, sin, _ = make((2, 3, 2, 6), 2)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, cos, sin), (x,))


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_kernel_within_bar(shape, angles, dtype, device):
    x, cos, sin, grad = make(shape, angles, dtype, device)
    wide = [t.detach().cpu().double() for t in (x, cos, sin, grad)]
    exact = run(naive, wide[0].requires_grad_(), *wide[1:])
    kernel, again, reference = (run(using(i), x, cos, sin, grad) for i in ("triton", "triton", "reference"))
    for k, a, r, e in zip(kernel, again, reference, exact, strict=True):
        assert k.dtype == r.dtype == dtype
        assert torch.equal(k, a), "other bits the second time"
        assert error(k, e) <= 2 * error(r, e) + torch.finfo(dtype).eps


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_strides_do_not_matter(implementation, device):
    """Those of the inputs, and those of a gradient that a sum, a slice or a transposition hands on."""
    laid = make(*SHAPES["half"], torch.float32, device)
    strided = [t.detach().mT.contiguous().mT for t in laid]
    strided[0].requires_grad_()
    for one, other in zip(run(using(implementation), *laid), run(using(implementation), *strided), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_shared_gradient_is_left_alone(implementation, device):
    """The gradient that a sum hands to both its terms: one of them turned must not turn the other's."""
    x, cos, sin, _ = make(*SHAPES["whole"], torch.float32, device)
    other = torch.zeros_like(x, requires_grad=True)
    y = using(implementation)(x, cos, sin) + other
    _, found = torch.autograd.grad(y, (x, other), torch.ones_like(y))
    assert torch.equal(found, torch.ones_like(found))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation, device):
    inputs = make(*SHAPES["half"], torch.float32, device)
    compiled = torch.compile(using(implementation), fullgraph=True, backend="aot_eager")
    for one, other in zip(run(using(implementation), *inputs), run(compiled, *inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_bad_arguments_are_named():
    x, cos, sin, _ = make((2, 5, 3, 8), 4)
    with pytest.raises(ValueError, match=r"cos has shape \[1, 5, 4\], expected \[2, 5, any\]"):
        rotary(x, cos[:1], sin[:1])
    with pytest.raises(ValueError, match=r"sin has shape \[2, 5, 3\], expected \[2, 5, 4\]"):
        rotary(x, cos, sin[..., :3])
    with pytest.raises(ValueError, match="cos has 4 angles a token, expected at most 3: half a head of x"):
        rotary(x[..., :6], cos, sin)
    with pytest.raises(TypeError, match="sin is torch.float32, expected torch.float64 as cos"):
        rotary(x, cos, sin.float())
    with pytest.raises(TypeError, match=r"x is torch.int64, expected a floating type"):
        rotary(x.long(), cos, sin)


# In a process of its own: here triton may be in interpreter mode, where nothing compiles.
SCRIPT = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longscan.kernels.rotary.kernel import TILE, _rotate

for heads, dim, half in ((16, 128, 64), (10, 256, 64), (1, 128, 64), (16, 64, 16), (5, 11, 3)):
    constants = TILE.constants(heads, dim, half)
    warps = constants.pop("num_warps")
    kinds = {"p_x": "*bf16", "p_y": "*bf16", "p_cos": "*fp32", "p_sin": "*fp32", "rows": "i32", "sign": "fp32"}
    signature = {name: kinds.get(name, "constexpr") for name in _rotate.arg_names}
    values = {(_rotate.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(_rotate, signature, values, aligned)
    asm = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm
    stores = [line for line in asm["ptx"].splitlines() if "st.global" in line]
    print(all("st.global.v4.b32" in line for line in stores), asm["ptx"].count("ld.global.v4.b32") >= len(stores))
"""


def test_kernel_compiles_for_sm_90(tmp_path):
    """And moves 16 bytes at a time wherever a head's parts are that long."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["True True"] * 4 + ["False False"], done.stdout

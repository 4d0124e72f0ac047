"""rms_norm, reference and kernel, held to its formula in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longscan.kernels import rms_norm

EPS = 1e-3
# One number, one row, odd widths, heads' dims, a row that is cut in two blocks, and one whose second block is not full.
SHAPES = [(1, 1), (1, 33), (7, 33), (2, 19, 80), (3, 5, 7, 64), (70, 1), (2, 5, 2560), (3, 3000), (4, 2048)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
both_implementations = pytest.mark.parametrize("implementation", ["reference", "triton"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def make(shape, dtype=torch.float64, device="cpu", scale_dtype=None):
    """(x, scale, a gradient of the output); rows' sizes differ."""
    rng = torch.Generator().manual_seed(0)
    x, dy, size, scale = (
        torch.randn(s, generator=rng, dtype=torch.float64) for s in (shape, shape, (*shape[:-1], 1), shape[-1:])
    )
    x = (x * size.exp()).to(device, dtype).requires_grad_()
    return x, scale.to(device, scale_dtype or dtype).requires_grad_(), dy.to(device, dtype)


def formula(x, scale, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + scale)


def using(implementation, eps=EPS):
    return lambda x, scale: rms_norm(x, scale, eps, implementation=implementation)


def run(function, x, scale, dy):
    """The output and both gradients; x and the gradient that came in stay what they were."""
    before = x.detach().clone(), dy.clone()
    y = function(x, scale)
    found = [y.detach(), *torch.autograd.grad(y, (x, scale), dy)]
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])
    return found


def run_exact(x, scale, dy):
    x, scale, dy = (t.detach().cpu().double() for t in (x, scale, dy))
    return run(formula, x.requires_grad_(), scale.requires_grad_(), dy)


def error(actual, exact):
    return float((actual.cpu().double() - exact).norm() / exact.norm())


def assert_within_bar(kernel, reference, exact):
    """The kernel's error is at most twice the reference's at the same precision, and a rounding of the dtype."""
    for name, k, r, e in zip(("y", "dx", "dscale"), kernel, reference, exact, strict=True):
        assert k.dtype == r.dtype
        floor = torch.finfo(k.dtype).eps * (4 if k.dtype == torch.float32 else 1)
        assert error(k, e) <= 2 * error(r, e) + floor, f"{name}: {error(k, e):.1e}, reference {error(r, e):.1e}"


@every_shape
def test_reference_is_the_formula(shape):
    inputs = make(shape)
    for found, exact in zip(run(using("reference"), *inputs), run_exact(*inputs), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    x, scale, _ = make((2, 3, 5))
    assert torch.autograd.gradcheck(using("auto"), (x, scale))
    assert torch.autograd.gradgradcheck(using("auto"), (x, scale))


@every_shape
@every_dtype
def test_kernel_within_bar(shape, dtype, device):
    inputs = make(shape, dtype, device)
    kernel, again, reference = (run(using(i), *inputs) for i in ("triton", "triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(*inputs))
    assert all(torch.equal(k, a) for k, a in zip(kernel, again, strict=True)), "other bits the second time"


@pytest.mark.parametrize("width", [1, 80, 1100])
def test_programs_that_stay_add_up(width, device, monkeypatch):
    """Many more tiles than programs, the last of them not full."""
    from longscan.kernels.rms_norm import kernel

    monkeypatch.setattr(kernel, "processors", lambda x: 1)
    programs, constants = kernel.BACKWARD.staying(width, 4)
    inputs = make((5 * programs * constants["ROWS"] + 1, width), torch.float32, device)
    kernel, reference = (run(using(i), *inputs) for i in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(*inputs))


@every_dtype
def test_a_scale_of_another_dtype(dtype, device):
    for scale_dtype in (torch.float32, torch.bfloat16):
        inputs = make((37, 80), dtype, device, scale_dtype)
        kernel, reference = (run(using(i), *inputs) for i in ("triton", "reference"))
        assert [t.dtype for t in kernel] == [dtype, dtype, scale_dtype]
        assert_within_bar(kernel, reference, run_exact(*inputs))


@both_implementations
def test_rows_do_not_touch(implementation, device):
    """A row of NaN and one of infinities leave the others as they are; a row of zeros stays zero."""
    x, scale, dy = make((9, 33), torch.float32, device)
    spoilt = x.detach().clone()
    spoilt[2], spoilt[5], spoilt[7] = float("nan"), float("inf"), 0
    results = []
    for each in (x, spoilt.requires_grad_()):
        y = using(implementation)(each, scale)
        results.append((y.detach(), *torch.autograd.grad(y, each, dy)))
    others = [0, 1, 3, 4, 6, 8]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[others], other[others])
    assert results[1][0][2].isnan().all()
    assert torch.equal(results[1][0][7], torch.zeros_like(scale))


def test_tiny_rows_without_eps(device):
    """The cube of such a row's reciprocal root is beyond fp32; the kernel does without it."""
    x, scale, dy = make((3, 80), torch.float32, device)
    tiny = (x.detach() * 1e-16).requires_grad_()
    wide = [t.detach().cpu().double() for t in (tiny, scale, dy)]
    exact = run(lambda x, scale: formula(x, scale, 0.0), *(t.requires_grad_() for t in wide[:2]), wide[2])
    for found, wanted in zip(run(using("triton", 0.0), tiny, scale, dy), exact, strict=True):
        assert error(found, wanted) < 1e-5


def test_strides_do_not_matter(device):
    """Those of the inputs, and those of a gradient that a sum, a slice or a transposition hands on."""
    x, scale, dy = make((3, 17, 80), torch.float32, device)
    strided_x, strided_dy = (t.detach().mT.contiguous().mT for t in (x, dy))
    strided_scale = torch.stack([scale.detach()] * 2, dim=1)[:, 0]
    strided = (strided_x.requires_grad_(), strided_scale.requires_grad_(), strided_dy)
    of_a_sum = torch.ones((), device=device).expand(dy.shape)
    for one, other in (((x, scale, dy), strided), ((x, scale, torch.ones_like(dy)), (x, scale, of_a_sum))):
        pairs = zip(run(using("triton"), *one), run(using("triton"), *other), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@both_implementations
def test_a_gradient_that_is_not_wanted(implementation, device):
    x, scale, dy = make((37, 80), torch.float32, device)
    both = run(using(implementation), x, scale, dy)
    (dx,) = torch.autograd.grad(using(implementation)(x, scale.detach()), x, dy)
    (dscale,) = torch.autograd.grad(using(implementation)(x.detach(), scale), scale, dy)
    assert torch.equal(dx, both[1])
    assert torch.equal(dscale, both[2])


@both_implementations
def test_no_rows(implementation, device):
    y, dx, dscale = run(using(implementation), *make((2, 0, 80), torch.float32, device))
    assert y.shape == dx.shape == (2, 0, 80)
    assert torch.equal(dscale, torch.zeros_like(dscale))


@both_implementations
@pytest.mark.parametrize("trained", [True, False])
def test_compiles_without_graph_breaks(implementation, trained, device):
    x, scale, dy = make((2, 19, 80), torch.float32, device)
    scale.requires_grad_(trained)
    compiled = torch.compile(using(implementation), fullgraph=True, backend="aot_eager")
    leaves = (x, scale) if trained else (x,)
    for one, other in zip(
        *(torch.autograd.grad(each(x, scale), leaves, dy) for each in (using(implementation), compiled)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_fake_tensors(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with FakeTensorMode():
        x = torch.empty(2, 19, 80, dtype=torch.bfloat16).mT.contiguous().mT.requires_grad_()
        scale = torch.empty(80, requires_grad=True)
        y = using("triton")(x, scale)
        dx, dscale = torch.autograd.grad(y, (x, scale), torch.empty_like(y))
    assert y.is_contiguous()
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (x.shape, x.dtype) * 2
    assert (dscale.shape, dscale.dtype) == (scale.shape, scale.dtype)


def test_the_width_that_registers_hold(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, scale = torch.ones(1, 12289), torch.zeros(12289)
    with pytest.raises(ValueError, match="rms_norm: .* its kernel takes rows of up to 12288, and these have 12289"):
        rms_norm(x, scale, EPS, implementation="triton")
    torch.testing.assert_close(rms_norm(x, scale, 0.0), x)


def test_bad_arguments_are_named():
    x, scale, _ = make((2, 5, 8))
    with pytest.raises(ValueError, match=r"scale has shape \[7\], expected \[8\]"):
        rms_norm(x, scale[:7], EPS)
    with pytest.raises(ValueError, match=r"x has shape \[\], expected \[any\]"):
        rms_norm(x[0, 0, 0], scale, EPS)
    with pytest.raises(TypeError, match=r"x is torch.int64, expected a floating type"):
        rms_norm(x.long(), scale, EPS)
    with pytest.raises(ValueError, match="scale is on meta, expected cpu"):
        rms_norm(x, scale.to("meta"), EPS)

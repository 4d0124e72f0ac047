"""gate_projections, reference and kernel, held to the sum of its docstring in float64."""

import pytest
import torch
from torch import Tensor

from longscan.kernels import gate_projections

NAMES = ("x", "weight_a", "bias_a", "weight_x", "bias_x")


def make(batch, tokens, blocks, side, dtype=torch.float64, device="cpu") -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    weight, bias = (blocks, side, side), (blocks * side,)
    shapes = [(batch, tokens, blocks * side), weight, bias, weight, bias]
    drawn = [torch.randn(s, generator=rng, dtype=torch.float64) * (side**-0.5 if s == weight else 1) for s in shapes]
    return [t.to(device, dtype).requires_grad_() for t in drawn]


def naive(x, *parameters):
    def project(weight, bias):
        blocks, side, _ = weight.shape
        return torch.einsum("btni,nio->btno", x.unflatten(2, (blocks, side)), weight).flatten(2) + bias

    return project(*parameters[:2]), project(*parameters[2:])


def with_gradients(function, inputs) -> list[Tensor]:
    outputs = function(*inputs)
    rng = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


def run(inputs, implementation) -> list[Tensor]:
    return with_gradients(lambda *a: gate_projections(*a, implementation=implementation), inputs)


def error(actual, exact) -> float:
    return float((actual.cpu().double() - exact).norm() / exact.norm())


def assert_within_bar(inputs) -> None:
    """The kernel's errors are at most twice the reference's at the same precision, and a rounding of the dtype."""
    dtype = inputs[0].dtype
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    exact = with_gradients(naive, [t.detach().cpu().double().requires_grad_() for t in inputs])
    for position, (k, r, e) in enumerate(zip(run(inputs, "triton"), run(inputs, "reference"), exact, strict=True)):
        assert k.dtype == r.dtype == dtype
        assert k.shape == r.shape
        assert error(k, e) <= 2 * error(r, e) + floor, (
            f"output {position}: {error(k, e):.1e}, reference {error(r, e):.1e}"
        )


@pytest.fixture
def few_programs(monkeypatch):
    """Programs so few that each walks several tiles, and that several share the tokens."""
    from longscan.kernels.block_diagonal import kernel

    monkeypatch.setattr(kernel, "SMS", 4)


def test_reference_is_the_sum():
    inputs = make(2, 5, 3, 4)
    for a, e in zip(run(inputs, "reference"), with_gradients(naive, inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(gate_projections, make(1, 2, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    [(2, 33, 3, 13), (1, 1, 2, 8), (1, 130, 1, 160), (1, 20, 1, 200)],
    ids=["odd", "one token", "pieces", "groups"],
)
def test_kernel_within_bar(shape, dtype, device):
    assert_within_bar(make(*shape, dtype, device))


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("tokens", "blocks", "side"), [(700, 1, 64), (389, 2, 96), (260, 1, 176)])
def test_kernel_over_many_tiles(tokens, blocks, side, device):
    assert_within_bar(make(1, tokens, blocks, side, torch.float16, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    [(2, 1333, 16, 160), (1, 4097, 10, 256), (3, 1000, 8, 128), (1, 5000, 4, 96), (1, 777, 3, 200)],
    ids=str,
)
def test_kernel_at_the_models_sizes(shape, dtype):
    assert_within_bar(make(*shape, dtype, "cuda"))


@pytest.mark.gpu
def test_addresses_take_64_bits():
    """The last tokens of an input of more than 2^31 values are those of the same tokens alone."""
    tokens, blocks, side = 2**31 // 2560 + 100, 16, 160
    parameters = [t.detach() for t in make(1, 1, blocks, side, torch.bfloat16, "cuda")[1:]]
    x = torch.zeros(1, tokens, blocks * side, dtype=torch.bfloat16, device="cuda")
    x[:, -64:] = torch.randn(64, blocks * side, device="cuda")
    whole, last = gate_projections(x, *parameters), gate_projections(x[:, -64:], *parameters)
    for w, y in zip(whole, last, strict=True):
        torch.testing.assert_close(w[:, -64:], y, rtol=0, atol=0)


def test_same_bits_twice(device):
    inputs = make(1, 300, 2, 40, torch.float16, device)
    for one, two in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(one, two)


def test_strided_inputs_and_gradients(device):
    """Transposed inputs and gradients that arrive expanded give what contiguous ones give."""
    inputs = make(2, 20, 2, 16, torch.float32, device)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in inputs]
    found = []
    for given in (inputs, strided):
        gate_a, gate_x = gate_projections(*given, implementation="triton")
        found.append(torch.autograd.grad(gate_a.sum() + 2 * gate_x.sum(), given))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_one_gate_alone_has_a_gradient(device):
    x, weight_a, *others = make(1, 20, 2, 16, torch.float32, device)
    gate_x = gate_projections(x, weight_a, *others, implementation="triton")[1]
    dx, dweight_a = torch.autograd.grad(gate_x.sum(), [x, weight_a])
    (exact,) = torch.autograd.grad(naive(x, weight_a, *others)[1].sum(), [x])
    torch.testing.assert_close(dx, exact)
    assert dweight_a.count_nonzero() == 0


def test_custom_operators(device):
    from longscan.kernels.block_diagonal import op

    inputs = make(1, 6, 2, 16, torch.float32, device)
    torch.library.opcheck(op._forward.operator, inputs)
    grads = [torch.randn(1, 6, 32, device=device) for _ in range(2)]
    torch.library.opcheck(op._backward.operator, [*grads, *(inputs[i].detach() for i in (0, 1, 3))])


@pytest.mark.parametrize(
    ("index", "wrong", "kind", "message"),
    [
        (0, torch.zeros(2, 6), ValueError, r"x has shape \[2, 6\], expected \[any, any, any\]"),
        (1, torch.zeros(4, 2, 2), ValueError, "weight_a has 4 blocks, expected a divisor of the 6 channels of x"),
        (2, torch.zeros(5), ValueError, r"bias_a has shape \[5\], expected \[6\]"),
        (3, torch.zeros(2, 3, 2), ValueError, r"weight_x has shape \[2, 3, 2\], expected \[2, 3, 3\]"),
        (4, torch.zeros(6, dtype=torch.bfloat16), TypeError, "bias_x is torch.bfloat16, expected torch.float32 as x"),
        (4, torch.zeros(6, device="meta"), ValueError, "bias_x is on meta, expected cpu"),
    ],
    ids=["x", "blocks", "bias", "weight", "dtype", "device"],
)
def test_wrong_arguments(index, wrong, kind, message):
    inputs = [t.detach() for t in make(1, 2, 2, 3, torch.float32)]
    inputs[index] = wrong
    with pytest.raises(kind, match=message):
        gate_projections(*inputs)


def test_blocks_wider_than_the_kernel_takes(device):
    inputs = make(1, 2, 1, 264, torch.float16, device)
    with pytest.raises(ValueError, match="its kernel takes blocks of up to 256 channels, and these have 264"):
        gate_projections(*inputs, implementation="triton")
    for a, e in zip(gate_projections(*inputs), gate_projections(*inputs, implementation="reference"), strict=True):
        assert torch.equal(a, e)


def test_compiles_without_graph_breaks(device):
    inputs = make(1, 20, 2, 16, torch.float16, device)

    def total(*inputs):
        gate_a, gate_x = gate_projections(*inputs, implementation="triton")
        return (gate_a * gate_x).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for one, two in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (total, compiled)), strict=True):
        assert torch.equal(one, two)

"""short_conv, reference and kernel, held to the sum of its docstring, written token by token in float64."""

import pytest
import torch

from longscan.kernels import Segments, short_conv

ACTIVATIONS = {
    None: lambda y: y,
    "silu": torch.nn.functional.silu,
    "gelu": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}
both_implementations = pytest.mark.parametrize("implementation", ["reference", "triton"])


def make(batch, tokens, width, taps, filters=None, dtype=torch.float64, device="cpu", seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, width), (filters or width, taps), (width,), (batch, taps - 1, width)]
    drawn = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    return [t.to(device, dtype).requires_grad_() for t in drawn]


def naive(x, weight, bias, tail, segments, activation):
    taps = weight.shape[1]
    positions = torch.full(x.shape[:2], taps) if segments is None else segments.positions.cpu()
    weight = weight.repeat_interleave(x.shape[2] // weight.shape[0], 0)
    left = torch.cat([tail, x], 1)
    rows = []
    for t in range(x.shape[1]):
        y = bias.expand(x.shape[0], -1)
        for s in range(taps):
            kept = (positions[:, t] >= s).to(x.dtype)[:, None]
            y = y + kept * weight[:, taps - 1 - s] * left[:, t - s + taps - 1]
        rows.append(y)
    return ACTIVATIONS[activation](torch.stack(rows, 1)), left[:, left.shape[1] - (taps - 1) :]


def with_gradients(function, inputs):
    outputs = function(*inputs)
    rng = torch.Generator().manual_seed(3)
    grads = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)]


def run(inputs, implementation, segments=None, activation=None):
    options = {"activation": activation, "implementation": implementation}
    return with_gradients(lambda *a: short_conv(*a, segments, **options), inputs)


def error(actual, exact):
    return float((actual.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def assert_within_bar(inputs, segments, activation):
    """The kernel's errors are at most twice the reference's at the same precision, and a rounding of the dtype."""
    dtype = inputs[0].dtype
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    exact = [t.detach() for t in with_gradients(lambda *a: naive(*a, segments, activation), wide)]
    kernel, reference = (run(inputs, i, segments, activation) for i in ("triton", "reference"))
    for position, (k, r, e) in enumerate(zip(kernel, reference, exact, strict=True)):
        assert k.dtype == r.dtype == dtype
        assert error(k, e) <= 2 * error(r, e) + floor, (
            f"output {position}: {error(k, e):.1e}, reference {error(r, e):.1e}"
        )


@pytest.fixture
def cut_short(monkeypatch):
    """Lets the kernels cut chunks of 8 tokens, so that a short row has several."""
    from longscan.kernels.short_conv import kernel

    for tiles in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(kernel, tiles, (kernel.Tile(rows=4, steps=2, block=16, warps=1),) * 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("tokens", "taps", "filters"), [(1, 4, 6), (2, 4, 3), (3, 4, 6), (65, 4, 2), (65, 2, 6), (65, 1, 6), (20, 64, 1)]
)
def test_reference_is_the_sum(tokens, taps, filters, activation, random_segments):
    inputs = make(2, tokens, 6, taps, filters)
    segments = random_segments(2, tokens, device="cpu")
    exact = with_gradients(lambda *a: naive(*a, segments, activation), inputs)
    for a, e in zip(run(inputs, "reference", segments, activation), exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, random_segments):
    segments = random_segments(2, 6, device="cpu")
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, segments, activation=activation), make(2, 6, 2, 4, 1))
    x, weight, _, _ = make(2, 6, 2, 4)
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, activation=activation), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("shape", "taps", "filters", "activation"),
    [((2, 33, 40), 4, 40, None), ((1, 65, 20), 3, 5, "silu"), ((2, 1, 5), 4, 5, "gelu")],
    ids=["plain", "heads", "one token"],
)
def test_kernel_within_bar(shape, taps, filters, activation, dtype, device, random_segments):
    segments = random_segments(*shape[:2]) if activation == "silu" else None
    assert_within_bar(make(*shape, taps, filters, dtype, device), segments, activation)


@pytest.mark.usefixtures("cut_short")
@pytest.mark.parametrize(
    ("shape", "taps", "activation"),
    [
        ((2, 20, 18), 1, "silu"),
        ((2, 20, 18), 2, None),
        ((2, 12, 4), 8, "gelu"),
        ((2, 20, 4), 9, None),
        ((1, 12, 4), 17, "silu"),
        ((1, 3, 4), 64, "gelu"),
    ],
)
def test_kernel_over_many_chunks(shape, taps, activation, device, random_segments):
    inputs = make(*shape, taps, 2, torch.float32, device)
    assert_within_bar(inputs, random_segments(*shape[:2]), activation)


@pytest.mark.usefixtures("cut_short")
@pytest.mark.parametrize(("taps", "activation"), [(4, None), (4, "silu"), (11, "gelu")])
def test_without_bias_and_tail(taps, activation, device):
    x, weight, bias, tail = make(2, 20, 5, taps, dtype=torch.float32, device=device)
    zeros = torch.zeros_like(bias), torch.zeros_like(tail)
    bare = with_gradients(lambda *a: short_conv(*a, activation=activation, implementation="triton")[:1], [x, weight])
    full = with_gradients(
        lambda *a: short_conv(*a, *zeros, activation=activation, implementation="triton")[:1], [x, weight]
    )
    for one, other in zip(bare, full, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("cut_short")
@both_implementations
@pytest.mark.parametrize(("taps", "activation"), [(4, None), (3, "silu"), (11, "gelu")])
@pytest.mark.parametrize("cut", [1, 16])
def test_split_invariance(cut, taps, activation, implementation, device, random_segments):
    segments = random_segments(2, 18)
    options = {"activation": activation, "implementation": implementation}

    def split(x, weight, bias, tail):
        left, tail = short_conv(x[:, :cut], weight, bias, tail, segments.split(0, cut), **options)
        right, tail = short_conv(x[:, cut:], weight, bias, tail, segments.split(cut, 18), **options)
        return torch.cat([left, right], 1), tail

    dtype = torch.float64 if implementation == "reference" else torch.float32
    inputs = make(2, 18, 4, taps, dtype=dtype, device=device)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    whole = run(inputs, implementation, segments, activation)
    for one, other in zip(whole, with_gradients(split, inputs), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.usefixtures("cut_short")
@both_implementations
@pytest.mark.parametrize("taps", [4, 12])
def test_no_leaks(taps, implementation, device):
    x, weight, bias, tail = make(1, 20, 3, taps, dtype=torch.float32, device=device)
    segments = Segments.from_lengths([[6, 5, 9]], [2], device)
    with torch.no_grad():
        x[:, 9] = torch.nan
        tail[:, : taps - 3] = torch.nan
    y, _ = short_conv(x, weight, bias, tail, segments, implementation=implementation)
    assert y.isnan().any(-1)[0].nonzero().view(-1).tolist() == [9, 10]
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.isfinite().all()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_bits_repeat(activation, device, random_segments):
    inputs = make(2, 40, 20, 4, dtype=torch.bfloat16, device=device)
    one, two = (run(inputs, "triton", random_segments(2, 40), activation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.usefixtures("cut_short")
def test_strides_do_not_matter(device):
    laid = make(2, 20, 6, 4, dtype=torch.float32, device=device)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() if t.dim() > 1 else t for t in laid]
    for one, other in zip(run(laid, "triton"), run(strided, "triton"), strict=True):
        assert torch.equal(one, other)


def test_half_precision_sums_in_single(random_segments):
    segments = random_segments(2, 40, device="cpu")
    inputs = make(2, 40, 8, 4, dtype=torch.bfloat16)
    exact = short_conv(*(t.double() for t in inputs), segments)[0]
    y, tail = short_conv(*inputs, segments)
    assert y.dtype == tail.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_bad_arguments_are_named():
    x, weight, bias, tail = make(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"activation='relu', expected None or one of silu, gelu"):
        short_conv(x, weight, activation="relu")
    with pytest.raises(ValueError, match=r"tail has shape \[2, 2, 3\], expected \[2, 3, 3\]"):
        short_conv(x, weight, bias, tail[:, 1:])
    with pytest.raises(ValueError, match=r"weight has shape \[4, 3\], expected \[3 or a divisor of it, any\]"):
        short_conv(x, weight.t())

"""short_conv held to the sum of its docstring, written token by token in float64."""

import pytest
import torch

from longscan.kernels import Segments, short_conv

ACTIVATIONS = {
    None: lambda y: y,
    "silu": torch.nn.functional.silu,
    "gelu": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


def make(batch, tokens, width, taps, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, width), (width, taps), (width,), (batch, taps - 1, width)]
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def naive(x, weight, bias, tail, segments, activation):
    taps, positions = weight.shape[1], segments.positions
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "taps"), [(1, 4), (2, 4), (3, 4), (65, 4), (65, 2), (65, 1)])
def test_values_and_gradients(tokens, taps, activation, random_segments):
    inputs = make(2, tokens, 5, taps)
    segments = random_segments(2, tokens, device="cpu")
    actual = with_gradients(lambda *a: short_conv(*a, segments, activation=activation), inputs)
    exact = with_gradients(lambda *a: naive(*a, segments, activation), inputs)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, random_segments):
    segments = random_segments(2, 6, device="cpu")
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, segments, activation=activation), make(2, 6, 2, 4))
    x, weight, _, _ = make(2, 6, 2, 4)
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, activation=activation), (x, weight))


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_split_invariance(cut, random_segments):
    segments = random_segments(2, 33, device="cpu")

    def split(x, weight, bias, tail):
        left, tail = short_conv(x[:, :cut], weight, bias, tail, segments.split(0, cut))
        right, tail = short_conv(x[:, cut:], weight, bias, tail, segments.split(cut, 33))
        return torch.cat([left, right], 1), tail

    inputs = make(2, 33, 4, 4)
    whole = with_gradients(lambda *a: short_conv(*a, segments), inputs)
    for one, other in zip(whole, with_gradients(split, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_no_leaks():
    x, weight, bias, tail = make(1, 20, 3, 4, torch.float32)
    segments = Segments.from_lengths([[6, 5, 9]], [2])
    before, _ = short_conv(x, weight, bias, tail, segments)
    with torch.no_grad():
        x[:, 9] += 1
    after, _ = short_conv(x, weight, bias, tail, segments)
    assert (before != after).any(-1)[0].nonzero().view(-1).tolist() == [9, 10]


def test_half_precision_sums_in_single(random_segments):
    segments = random_segments(2, 40, device="cpu")
    inputs = make(2, 40, 8, 4, torch.bfloat16)
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
    with pytest.raises(ValueError, match=r"weight has shape \[4, 3\]"):
        short_conv(x, weight.t())

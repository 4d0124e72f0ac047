"""Opaque functions: an operator where something must see it, the function alone elsewhere, the same gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from longscan.kernels.opaque import opaque

CALLS = []


@opaque("test_square_and_cube")
def powers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    CALLS.append(x.shape)
    return x * x, x * x * x


@powers.register_fake
def _(x):
    return torch.empty_like(x), torch.empty_like(x)


def gradients(ctx, *outer):
    (x,) = ctx.saved_tensors
    of_square, of_cube = outer
    ctx.seen.append([gradient is None for gradient in outer])
    dx = torch.zeros_like(x) if of_square is None else 2 * x * of_square
    return dx if of_cube is None else dx + 3 * x * x * of_cube


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.seen = SEEN


SEEN = []


@opaque("test_square")
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@opaque("test_squared")
def squared(x: torch.Tensor) -> torch.Tensor:
    return x * x


squared.register_autograd(
    lambda ctx, dy: square(ctx.saved_tensors[0]) * dy, lambda ctx, inputs, _: ctx.save_for_backward(*inputs)
)
powers.register_autograd(gradients, setup_context=save)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x():
    CALLS.clear(), SEEN.clear()
    return torch.tensor([1.0, -2.0], requires_grad=True)


@pytest.mark.parametrize("seen", [False, True], ids=["alone", "operator"])
def test_gradients(x, seen):
    mode = Names()
    if seen:
        with mode:
            one, other = powers(x)
    else:
        one, other = powers(x)
    assert (mode.names == ["longscan.test_square_and_cube.default"]) == seen
    assert torch.autograd.grad(one.sum() + other.sum(), x, retain_graph=True)[0].tolist() == [5, 8]
    assert torch.autograd.grad(other.sum(), x)[0].tolist() == [3, 12]
    assert SEEN == [[False, False], [True, False]]


def test_fake_tensors_reach_no_function(x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        one, _ = powers(x)
    assert one.shape == x.shape
    assert not CALLS


def test_compiles_to_one_operator(x):
    found = []

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: powers(x)[1], backend=backend, fullgraph=True)
    assert compiled(x).tolist() == [1, -8]
    assert found[0] == "longscan.test_square_and_cube.default"


def test_without_gradients(x):
    with torch.no_grad():
        assert not powers(x)[0].requires_grad
    assert powers(x.detach())[0].grad_fn is None


def test_a_function_without_gradients_has_none(x):
    for call in (lambda: square(x), lambda: torch.autograd.grad(squared(x).sum(), x, create_graph=True)[0]):
        with pytest.raises(RuntimeError, match="autograd"):
            call().sum().backward()

import os

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from longscan.parallel.products import Exchange, project, sum_products

TOKENS, WIDTH = 6, 5


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(divided, rows):
    """The largest error of outputs and gradients of a pair of products, biased and not, against the plain products."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    exchange = Exchange(dist.group.WORLD)
    x, dy = drawn(rows, TOKENS, WIDTH), drawn(rows, TOKENS, WIDTH, seed=1)
    plain = [
        [drawn(size * n, WIDTH, seed=n), drawn(size * n, seed=10 + n), drawn(WIDTH, size * n, seed=20 + n)]
        for n in (3, 4)
    ]
    own = [
        [up.chunk(size)[rank].clone(), bias.chunk(size)[rank].clone(), down.chunk(size, dim=1)[rank].clone()]
        for up, bias, down in plain
    ]
    inputs = [x, *(t for three in plain for t in three)]
    for t in inputs:
        t.requires_grad_()
    expected = sum(torch.nn.functional.linear(x @ up.t() + bias * n, down) for n, (up, bias, down) in enumerate(plain))
    gradients = torch.autograd.grad(expected, inputs, dy, allow_unused=True)
    mine = x.detach().chunk(size, dim=1)[rank] if divided else x.detach()
    here = [mine.clone().requires_grad_(), *(t.requires_grad_() for three in own for t in three)]
    # The first has no bias; a biased one and one without go together.
    hidden = project(here[0], [(own[0][0], None), (own[1][0], own[1][1])], exchange, divided)
    found = sum(sum_products(h, three[2], exchange, divided) for h, three in zip(hidden, own, strict=True))
    upstream = dy.chunk(size, dim=1)[rank] if divided else dy
    ours = torch.autograd.grad(found, here, upstream, allow_unused=True)
    cut = [lambda t: t.chunk(size, dim=1)[rank] if divided else t]
    cut += [lambda t: t.chunk(size)[rank], lambda t: t.chunk(size)[rank], lambda t: t.chunk(size, dim=1)[rank]] * 2
    assert ours[2] is None and not gradients[2].any()
    pairs = [(found, cut[0](expected))]
    pairs += [(a, c(b)) for i, (a, b, c) in enumerate(zip(ours, gradients, cut, strict=True)) if i != 2]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize("size", [2, 3])
def test_they_are_the_plain_products(size, divided, rows):
    assert max(run_distributed(compare, size, divided, rows)) < 1e-13


def frozen():
    """Which gradients come where only x, or only the bias, is trained."""
    exchange, found = Exchange(dist.group.WORLD), []
    for trained in (0, 2):
        tensors = [drawn(2, TOKENS, WIDTH), drawn(4, WIDTH), drawn(4)]
        tensors[trained].requires_grad_()
        (y,) = project(tensors[0], [(tensors[1], tensors[2])], exchange, True)
        y.sum().backward()
        found.append([t.grad is not None for t in tensors])
    return found


def kept():
    """Bytes that both products keep for the backward pass where weights are trained, and where only x is."""
    exchange, found = Exchange(dist.group.WORLD), []
    for trained in (True, False):
        x = drawn(2, TOKENS, WIDTH).requires_grad_()
        up, down = (drawn(*shape).requires_grad_(trained) for shape in ((4, WIDTH), (WIDTH, 4)))
        packed = []
        pack = lambda t, to=packed: to.append(t.nbytes) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            sum_products(project(x, [(up, None)], exchange, True)[0], down, exchange, True)
        found.append(sum(packed) - up.nbytes - down.nbytes)
    return found


def test_frozen_weights_keep_no_input():
    (whole, nothing), *_ = run_distributed(kept, 2)
    assert whole == 8 * 2 * 2 * TOKENS * (WIDTH + 4)
    assert nothing == 0


def test_what_is_frozen_gets_no_gradient():
    for found in run_distributed(frozen, 2):
        assert found == [[True, False, False], [False, False, True]]

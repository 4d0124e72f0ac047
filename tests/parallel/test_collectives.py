"""Each collective against the whole tensor, and each pair by <A x, y> = <x, A' y>."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from longscan.parallel.collectives import StateExchange, gather_tokens, left_halo, sum_gradients, sum_parts

RANKS, BATCH, TOKENS, WIDTH = 3, 2, 4, 5
# Within a piece, a whole piece, over two pieces, all there is, and longer than the row.
HALOS = [1, 3, 4, 6, 8, 11, 30]


def random(name, *shape, shared=False):
    """Numbers of a rank's own, or the same on every rank."""
    seed = 1000 * (0 if shared else dist.get_rank() + 1) + sum(map(ord, name))
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def over_ranks(value, shared=False):
    """An inner product of tensors that lie on all ranks: the sum of the parts, or what every rank has."""
    total = torch.tensor([value], dtype=torch.float64)
    if not shared:
        dist.all_reduce(total)
    return total.item()


def adjoint_error(function, x, y, x_shared=False, y_shared=False):
    """How far <A x, y> is from <x, A' y>, relative; a shared tensor counts once."""
    x.requires_grad_()
    result = function(x)
    result.backward(y)
    left, right = over_ranks(float((result * y).sum()), y_shared), over_ranks(float((x * x.grad).sum()), x_shared)
    return abs(left - right) / abs(left)


def adjoints():
    """The error of every pair."""
    group, errors = dist.group.WORLD, {}
    piece = (BATCH, TOKENS, WIDTH)
    for n in HALOS:
        y = random("y", BATCH, n, WIDTH)
        errors[f"left_halo {n}"] = adjoint_error(lambda x, n=n: halo_of(x, n), random("x", *piece), y)
        # What goes on and the halo together.
        both = random("y", BATCH, n + TOKENS, WIDTH)
        errors[f"x and halo {n}"] = adjoint_error(lambda x, n=n: x_and_halo(x, n), random("x", *piece), both)
    wide = random("y", BATCH, RANKS * TOKENS, WIDTH)
    errors["gather_tokens"] = adjoint_error(lambda x: gather_tokens(x, group), random("x", *piece), wide)
    shared = random("x", *piece, shared=True)
    errors["sum_gradients"] = adjoint_error(
        lambda x: sum_gradients(x, group), shared.clone(), random("y", *piece), x_shared=True
    )
    errors["sum_parts"] = adjoint_error(
        lambda x: sum_parts(x, group), random("x", *piece), shared.clone(), y_shared=True
    )
    return errors


def halo_of(x, n):
    return left_halo(x, n, dist.group.WORLD)[1]()


def x_and_halo(x, n):
    x, halo = left_halo(x, n, dist.group.WORLD)
    return torch.cat([halo(), x], dim=1)


def whole_row(piece):
    """Every rank's piece, one after another along the tokens."""
    parts = [torch.empty_like(piece) for _ in range(RANKS)]
    dist.all_gather(parts, piece)
    return torch.cat(parts, dim=1)


def values():
    """Whether halos and gathered tokens are the row's own numbers, bit for bit."""
    group, rank = dist.group.WORLD, dist.get_rank()
    x = random("x", BATCH, TOKENS, WIDTH)
    row = whole_row(x)
    found = {"gather_tokens": torch.equal(gather_tokens(x, group), row)}
    for n in HALOS:
        padded = torch.cat([row.new_zeros(BATCH, n, WIDTH), row], dim=1)
        expected = padded[:, rank * TOKENS : rank * TOKENS + n]
        found[f"left_halo {n}"] = torch.equal(halo_of(x, n), expected)
    return found


def states():
    """The largest error of entering states and of the gradients they pass, against the recurrence in one process."""
    group, rank = dist.group.WORLD, dist.get_rank()
    own = [random("state", BATCH, WIDTH), random("transition", BATCH, 1), random("weight", BATCH, WIDTH)]
    own[1][0] = 0  # A row that holds a document's start.
    everyone = []
    for tensor in own:
        parts = [torch.empty_like(tensor) for _ in range(RANKS)]
        dist.all_gather(parts, tensor)
        everyone.append([part.requires_grad_() for part in parts])
    entered, loss = [torch.zeros(BATCH, WIDTH, dtype=torch.float64)], 0.0
    for state, transition, weight in zip(*everyone, strict=True):
        loss = loss + (entered[-1].square() * weight).sum()
        entered.append(transition * entered[-1] + state)
    loss.backward()
    exchange = StateExchange(*own[:2], group)
    entering = exchange.entering()
    # The gradient of the state that leaves a piece is that of its sum, `state`; the last one's is nobody's.
    leaving = exchange.from_right(2 * entering * own[2])
    wanted = everyone[0][rank].grad
    pairs = [(entering, entered[rank]), (leaving, torch.zeros_like(leaving) if wanted is None else wanted)]
    return [float((found - expected).abs().max()) for found, expected in pairs]


def every_check():
    return {"adjoints": adjoints(), "values": values(), "states": states()}


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(every_check, RANKS, preload=["longscan.parallel.collectives"])


def test_every_pair_keeps_the_adjoint_identity(ranks):
    for found in ranks:
        assert max(found["adjoints"].values()) < 1e-13, found["adjoints"]


def test_halos_and_gathered_tokens_are_the_rows_own(ranks):
    for found in ranks:
        assert all(found["values"].values()), found["values"]


def test_the_entering_state_and_its_gradients_are_those_of_the_recurrence(ranks):
    for found in ranks:
        assert max(found["states"]) < 1e-13, found["states"]

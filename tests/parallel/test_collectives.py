"""Each collective against the whole tensor, and each pair by <A x, y> = <x, A' y>."""

import os

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from longscan.parallel import ParallelDims, groups, process_group
from longscan.parallel.collectives import StateExchange, gather_tokens, left_halos, sum_gradients, sum_parts, sum_tokens

RANKS, BATCH, TOKENS, WIDTH = 3, 2, 4, 5
# Within a piece, a whole piece, over two pieces, all there is, and longer than the row.
HALOS = [1, 3, 4, 6, 8, 11, 30]
# Layouts of eight ranks, and how many of a row's fold their states by how many nodes.
BY_NODE = {
    "pairs": ({"context": 8}, 2, [2, 4]),
    "fours": ({"context": 8}, 4, [4, 2]),
    "tensor": ({"context": 4, "tensor": 2}, 2, [2, 2]),
    "pipeline": ({"context": 4, "pipeline": 2}, 2, [2, 2]),
    "at once": ({"context": 2, "data": 4}, 2, [2]),
    "prime": ({"context": 4, "data": 2}, 1, [4]),
}


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
        for function in (x_and_halo, two_and_halos):
            error = adjoint_error(lambda x, n=n, function=function: function(x, n), random("x", *piece), both)
            errors[f"{function.__name__} {n}"] = error
    wide = random("y", BATCH, RANKS * TOKENS, WIDTH)
    errors["gather_tokens"] = adjoint_error(lambda x: gather_tokens(x, group), random("x", *piece), wide)
    whole, mine = random("x", BATCH, RANKS * TOKENS, WIDTH), random("y", *piece)
    errors["sum_tokens"] = adjoint_error(lambda x: sum_tokens(x, group), whole, mine)
    shared = random("x", *piece, shared=True)
    errors["sum_gradients"] = adjoint_error(
        lambda x: sum_gradients(x, group), shared.clone(), random("y", *piece), x_shared=True
    )
    errors["sum_parts"] = adjoint_error(
        lambda x: sum_parts(x, group), random("x", *piece), shared.clone(), y_shared=True
    )
    return errors


def halo_of(x, n):
    return left_halos([x], n, dist.group.WORLD)[1]()[0]


def x_and_halo(x, n):
    (x,), halos = left_halos([x], n, dist.group.WORLD)
    return torch.cat([*halos(), x], dim=1)


def two_and_halos(x, n):
    """The same for two parts of x, of other shapes, that travel together."""
    xs, halos = left_halos([x[..., :2], x[..., 2:].unflatten(2, (3, 1))], n, dist.group.WORLD)
    rows = (torch.cat(parts, dim=1).flatten(2) for parts in zip(halos(), xs, strict=True))
    return torch.cat(list(rows), dim=2)


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
        together = torch.cat([expected, x], dim=1)
        found[f"two halos {n}"] = torch.equal(two_and_halos(x, n), together)
    return found


def states(row, *levels):
    """The largest error of entering states and of the gradients they pass, against the recurrence in one process."""
    rank = row.rank()
    own = [random("state", BATCH, WIDTH), random("transition", BATCH, 1), random("weight", BATCH, WIDTH)]
    own[1][0] = 0  # A row that holds a document's start.
    everyone = []
    for tensor in own:
        parts = [torch.empty_like(tensor) for _ in range(row.size())]
        dist.all_gather(parts, tensor, group=row)
        everyone.append([part.requires_grad_() for part in parts])
    entered, loss = [torch.zeros(BATCH, WIDTH, dtype=torch.float64)], 0.0
    for state, transition, weight in zip(*everyone, strict=True):
        loss = loss + (entered[-1].square() * weight).sum()
        entered.append(transition * entered[-1] + state)
    loss.backward()
    exchange = StateExchange(*own[:2], *levels)
    entering = exchange.entering()
    # The gradient of the state that leaves a piece is that of its sum, `state`; the last one's is nobody's.
    leaving = exchange.from_right(2 * entering * own[2])
    wanted = everyone[0][rank].grad
    pairs = [(entering, entered[rank]), (leaving, torch.zeros_like(leaving) if wanted is None else wanted)]
    return [float((found - expected).abs().max()) for found, expected in pairs]


def every_check():
    return {"adjoints": adjoints(), "values": values(), "states": states(dist.group.WORLD, dist.group.WORLD)}


def by_node(folder):
    """The sizes of the levels by which states are folded, and the errors, in several layouts."""
    rank, found = int(os.environ["RANK"]), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "FLAT", 2)
        for name, (sizes, node, _) in BY_NODE.items():
            patch.setattr(groups, "NODE", node)
            with process_group(rank=rank, world_size=8, store=f"{folder}/{name}", timeout_seconds=60):
                row = groups.layout_groups(ParallelDims(zero=0, **sizes)).context
                levels = groups.fold_levels(row)
                found[name] = [level.size() for level in levels], states(row, *levels)
    return found


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


def test_states_folded_by_node_are_those_of_the_recurrence(tmp_path):
    preload = ["longscan.parallel.collectives", "megatron.core.parallel_state"]
    for found in run_distributed(by_node, 8, tmp_path, join=False, preload=preload):
        for name, (_, _, sizes) in BY_NODE.items():
            levels, errors = found[name]
            assert levels == sizes and max(errors) < 1e-12, (name, levels, errors)

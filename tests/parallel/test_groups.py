import os
import socket

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from longscan.errors import UserError
from longscan.parallel import ParallelDims, destroy_process_group, init_process_group, process_group
from longscan.parallel.groups import layout_groups


def meet(folder, address):
    """The ranks meet by a file, part, and meet by an address; all-reduced numbers prove it."""
    rank, world_size, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), []
    for place in ({"store": f"{folder}/store"}, {"address": address}):
        with process_group(rank=rank, world_size=world_size, timeout_seconds=30, **place):
            number = torch.tensor(float(rank + 1))
            dist.all_reduce(number)
            found.append(number.item())
    return found


def test_ranks_meet_by_a_file_and_by_an_address(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run_distributed(meet, 2, tmp_path, f"127.0.0.1:{port}", join=False) == [[3.0, 3.0]] * 2


def test_one_process_needs_nothing():
    with process_group():
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()
    destroy_process_group()


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot listen at {address}.*choose another port"):
            init_process_group(0, 2, address=address, timeout_seconds=2)


def test_a_missing_rank_ends_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="rank 0 could not join 2 ranks .* within 1 s"):
        init_process_group(0, 2, store=tmp_path / "store", timeout_seconds=1)


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_the_helper_shows_the_traceback_of_the_rank_that_failed():
    with pytest.raises(AssertionError, match=r"error-1(.|\n)*ValueError: the reason"):
        run_distributed(fail_on_rank_one, 2)


def share_axes(folder):
    """Who shares an axis with this rank in several layouts of the same eight ranks, as sums of powers of two."""
    rank, found = int(os.environ["RANK"]), {}
    with process_group(rank=rank, world_size=8, store=f"{folder}/store", timeout_seconds=60):
        for name, sizes in EIGHT.items():
            groups = layout_groups(ParallelDims(zero=0, **sizes))
            assert layout_groups(ParallelDims(zero=0, **sizes)) == groups, "made once"
            found[name] = [members(group, rank) for group in vars(groups).values()]
    return found


def members(group, rank):
    if group is None:
        return None
    number = torch.tensor(1 << rank)
    dist.all_reduce(number, group=group)
    found = [other for other in range(8) if int(number) >> other & 1]
    assert found.index(rank) == group.rank()
    return found


EIGHT = {
    "data": {"data": 8},
    "tensor x context": {"data": 2, "context": 2, "tensor": 2},
    "context": {"data": 2, "context": 4},
    "tensor": {"tensor": 8},
    "context x pipeline": {"data": 2, "context": 2, "pipeline": 2},
    "pipeline x tensor": {"pipeline": 4, "tensor": 2},
}


def test_replicas_are_consecutive_ranks(tmp_path):
    ranks = run_distributed(share_axes, 8, tmp_path, join=False, preload=["megatron.core.parallel_state"])
    everyone = list(range(8))
    for rank, found in enumerate(ranks):
        assert found["data"] == [None, None, everyone, None, None, None]
        tensor = rank - rank % 2
        context = rank - rank % 4 + rank % 2
        pair, copies = [tensor, tensor + 1], [other for other in everyone if other % 2 == rank % 2]
        assert found["tensor x context"] == [pair, [context, context + 2], copies, None, None, pair]
        replica = everyone[rank - rank % 4 :][:4]
        assert found["context"] == [None, replica, everyone, None, None, None]
        assert found["tensor"] == [everyone, None, None, None, None, everyone]
        stages, copies = [context, context + 2], [other for other in everyone if other % 4 // 2 == rank % 4 // 2]
        assert found["context x pipeline"] == [None, pair, copies, stages, stages, stages]
        stages = everyone[rank % 2 :: 2]
        ends = [stages[0], stages[-1]] if rank in (stages[0], stages[-1]) else None
        assert found["pipeline x tensor"] == [pair, None, None, stages, ends, everyone]


def bind_and_make():
    """What is bound after groups were made while the default group was bound to a GPU, which gloo cannot connect."""
    world = dist.group.WORLD
    world.bound_device_id = torch.device("cuda", 0)
    context = layout_groups(ParallelDims(context=2, zero=0)).context
    found = [str(group.bound_device_id) for group in (world, context)]
    world.bound_device_id = None
    dist.all_reduce(torch.ones(1), group=context)
    return found


def test_groups_of_a_layout_connect_when_they_are_used():
    found = run_distributed(bind_and_make, 2, preload=["megatron.core.parallel_state"])
    assert found == [["cuda:0", "None"]] * 2

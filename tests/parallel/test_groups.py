import os
import socket

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from longscan.errors import UserError
from longscan.parallel import destroy_process_group, init_process_group, process_group


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

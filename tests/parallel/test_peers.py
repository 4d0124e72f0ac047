"""Copies between peers, by flags in shared memory of the host; over two GPUs of which each rank sees one. More of GPUs
is in `test_gpu.py`."""

import os
import struct
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from matrix import LAYOUTS, train

from longscan.errors import ConfigError
from longscan.parallel import ParallelDims, peers, process_group, tensor
from longscan.parallel.peers import GPUs, PeerCopies
from longscan.parallel.products import Exchange


class Files:
    """Peers whose boxes are files that every rank maps; all is done at once, in the order of the calls."""

    def __init__(self, folder):
        self.rank, size = dist.get_rank(), dist.get_world_size()
        bytes_ = peers.box_bytes(size)
        self.boxes = [torch.from_file(f"{folder}/{r}", True, bytes_, dtype=torch.uint8) for r in range(size)]
        self.boxes[self.rank].zero_()
        self.views = [memoryview(box.numpy()) for box in self.boxes]
        self.given = 0
        dist.barrier()

    def sending(self):
        return nullcontext()

    receiving = sending

    def done(self):
        return lambda: None

    def take(self, place):
        end = time.monotonic() + 30
        while struct.unpack_from("i", self.views[self.rank], place) != (1,):
            assert time.monotonic() < end, f"nobody gave {place}"
            time.sleep(0)
        struct.pack_into("i", self.views[self.rank], place, 0)

    def give(self, rank, place):
        assert struct.unpack_from("i", self.views[rank], place) == (0,), f"{place} was given twice"
        struct.pack_into("i", self.views[rank], place, 1)
        self.given += 1


def compare(folder, slot_bytes):
    """Whether gathers and sums by copies have the bits of collectives, for rows of several lengths and dtypes."""
    peers.SLOT_BYTES = slot_bytes
    size, rank = dist.get_world_size(), dist.get_rank()
    files = Files(folder)
    begun = files.given
    ours, theirs = PeerCopies(dist.group.WORLD, files), Exchange(dist.group.WORLD)
    assert files.given - begun == peers.SLOTS * (size - 1)
    torch.manual_seed(rank)
    same = []
    for tokens, dtype in [
        (1, torch.float32),
        (7, torch.bfloat16),
        (64, torch.float64),
        (33, torch.bfloat16),
        (0, torch.float32),
    ] * 2:
        x, parts = torch.randn(tokens, 4).to(dtype), torch.randint(-9, 9, (size * tokens, 4)).to(dtype)
        found = [(x.new_empty(size * tokens, 4), x.new_empty(tokens, 4)) for _ in range(2)]
        for exchange, (whole, total) in zip((ours, theirs), found, strict=True):
            exchange.all_gather(whole, x)()
            written = []

            def fill(tokens, part, parts=parts, written=written):
                part.copy_(parts[tokens])
                written += range(*tokens.indices(len(parts)))

            exchange.reduce_scatter(total, fill, last=bool(tokens % 2))()
            assert sorted(written) == list(range(len(parts)))
        same += [torch.equal(*pair) for pair in zip(*found, strict=True)]
    # Whatever was full is free again.
    dist.barrier()
    flags = files.boxes[rank][peers.SLOTS * slot_bytes :].view(torch.int32).view(2, peers.SLOTS, size)
    others = torch.arange(size) != rank
    same += [not flags[0].any(), bool(flags[1][:, others].all()), not flags[1][:, rank].any()]
    # The parts are of whole numbers, so that other orders of summation give the same.
    return same


@pytest.mark.parametrize("slot_bytes", [1024, 1 << 20])
@pytest.mark.parametrize("size", [2, 3])
def test_copies_between_peers_are_the_collectives(tmp_path, size, slot_bytes):
    for same in run_distributed(compare, size, tmp_path, slot_bytes):
        assert all(same), same


def train_copied(folder, families):
    """The most that copies change in a training, relative to each tensor's largest number."""
    found = {}
    for family in families:
        dims, options = LAYOUTS["tp2-sp-selective"]
        with patch.object(tensor, "GPUs", lambda group: Files(folder)):
            copied = train(family, True, replace(dims, copy_engines=True), **options)
        plain = train(family, True, dims, **options)
        changes = [(plain[n] - copied[n]).abs().max() / plain[n].abs().max().clamp(min=1e-300) for n in plain]
        found[family] = float(torch.stack(changes).max())
    return found


@pytest.mark.timeout(120)
def test_a_model_trains_by_copies_as_by_collectives(tmp_path):
    """In fp64, but for the rounding of products of a part of the rows, which some BLAS libraries sum otherwise."""
    families = ["griffin", "based"]
    ranks = run_distributed(train_copied, 2, tmp_path, families, preload=["longscan.parallel.tensor"])
    assert all(change <= 1e-12 for rank in ranks for change in rank.values()), ranks


class Noted:
    """Peers that note what a GPU would be given: flags taken and given, each with all that it is ordered after."""

    def __init__(self, rank, size):
        self.rank, self.work, self.stream = rank, [], "main"
        self.boxes = [torch.empty(peers.box_bytes(size), dtype=torch.uint8)] * size
        self.ends = {"main": set(), "sending": set(), "receiving": set()}

    @contextmanager
    def on(self, stream, *others):
        self.ends[stream] = self.ends[stream].union(*(self.ends[other] for other in others))
        self.stream = stream
        yield
        self.stream = "main"

    def sending(self):
        return self.on("sending", "main")

    def receiving(self):
        return self.on("receiving", "main", "sending")

    def done(self):
        ends = self.ends["sending"] | self.ends["receiving"]
        return lambda: self.ends[self.stream].update(ends)

    def take(self, place):
        self.note("take", self.rank, place)

    def give(self, rank, place):
        self.note("give", rank, place)

    def note(self, kind, rank, place):
        self.work.append((kind, (rank, place), self.stream, set(self.ends[self.stream])))
        self.ends[self.stream] = {len(self.work) - 1}

    def queued(self, first):
        """Everything in one queue, of what may come next that of the stream `first`, whatever was asked for before."""
        done, left = set(), dict(enumerate(self.work))
        while left:
            ready = [number for number, (*_, after) in left.items() if after <= done]
            number = min(ready, key=lambda number: (left[number][2] != first, number))
            done.add(number)
            yield left.pop(number)


@pytest.mark.parametrize("first", ["sending", "receiving"])
@pytest.mark.parametrize("size", [2, 3])
def test_no_order_that_a_graph_may_take_waits_for_itself(monkeypatch, size, first):
    """More rows than slots, gathered and then summed."""
    monkeypatch.setattr(peers, "SLOT_BYTES", 1024)
    ranks = [Noted(rank, size) for rank in range(size)]
    for rank, noted in enumerate(ranks):
        exchange = PeerCopies(SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size), noted)
        whole, total = torch.empty(2 * size, 4), torch.empty(2, 4)
        for ask in (
            lambda last, exchange=exchange: exchange.all_gather(whole, total),  # noqa: B023
            lambda last, exchange=exchange: exchange.reduce_scatter(total, lambda *_: None, last),  # noqa: B023
        ):
            for wait in [ask(row == 2 * peers.SLOTS) for row in range(2 * peers.SLOTS + 1)]:
                wait()
    queues, given = [list(noted.queued(first)) for noted in ranks], set()
    while any(queues):
        before = sum(map(len, queues))
        for queue in queues:
            while queue and (queue[0][0] == "give" or queue[0][1] in given):
                kind, flag, *_ = queue.pop(0)
                (given.add if kind == "give" else given.remove)(flag)
        assert sum(map(len, queues)) < before, [queue[0] for queue in queues if queue]


def apart():
    """What ranks of several machines are told, and whether those of one pass."""
    device = torch.device("cpu")
    peers._check_one_machine(dist.group.WORLD, device)
    with patch.object(peers, "_machine", lambda: dist.get_rank() // 2), pytest.raises(ConfigError) as refused:
        peers._check_one_machine(dist.group.WORLD, device)
    return str(refused.value)


def test_ranks_of_several_machines_are_refused():
    for told in run_distributed(apart, 3):
        assert "the 3 tensor ranks lie on 2 machines or containers; set parallel.copy_engines=false" in told


def exchange_blindly(folder):
    """Whether copies are the collectives where each rank sees its own GPU alone, as workers of Ray do."""
    rank = int(os.environ["RANK"])
    assert torch.cuda.device_count() == 1
    place = {"rank": rank, "world_size": 2, "store": f"{folder}/store", "device": "cuda:0"}
    with process_group(**place, timeout_seconds=60):
        torch.manual_seed(rank)
        x = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
        found = [x.new_empty(2 * len(x), 2048) for _ in range(2)]
        Exchange(dist.group.WORLD).all_gather(found[0], x)()
        PeerCopies(dist.group.WORLD, GPUs(dist.group.WORLD)).all_gather(found[1], x)()
        return torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two CUDA GPUs")
def test_a_rank_may_see_its_own_gpu_alone(tmp_path):
    # Set before a process begins: importing Megatron looks at the GPUs.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    alone = run_distributed(
        exchange_blindly, 2, tmp_path, join=False, env=lambda rank: {"CUDA_VISIBLE_DEVICES": visible[rank]}
    )
    assert alone == [True, True]


def too_long(folder):
    """What a token that fits no slot gives."""
    peers.SLOT_BYTES = 1024
    exchange = PeerCopies(dist.group.WORLD, Files(folder))
    with pytest.raises(AssertionError, match="a token of 200 numbers does not fit a slot's 512 bytes"):
        exchange.all_gather(torch.zeros(4, 200), torch.zeros(2, 200))
    return os.environ["RANK"]


def test_a_token_must_fit_a_slot(tmp_path):
    assert run_distributed(too_long, 2, tmp_path) == ["0", "1"]


@pytest.mark.skipif("torch.cuda.is_available()", reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_to_set():
    with pytest.raises(ConfigError, match="there is no GPU here; set parallel.copy_engines=false"):
        peers.GPUs(None)


def test_copy_engines_need_rows_that_are_divided():
    with pytest.raises(ConfigError, match=r"copy_engines needs parallel.sequence_parallel, which is false"):
        ParallelDims(tensor=2, copy_engines=True).validate(2)
    ParallelDims(tensor=2, copy_engines=True, sequence_parallel=True).validate(2)

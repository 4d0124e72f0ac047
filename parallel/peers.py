"""Rows exchanged by the copy engines of the GPUs of one node, which leaves all multiprocessors to the products.

A rank writes into its peers' memory. What it sends is cut into pieces that fit a slot of an inbox; of each slot two
flags in device memory say that it is full and that it is free again. Streams wait for them and set them, no kernel
does. Flags end as they began, so that a CUDA graph repeats an exchange.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .products import Exchange, Fill

# Pieces on their way at once, and the bytes of one from all ranks.
SLOTS, SLOT_BYTES = 4, 32 * 2**20
_FLAG = 4


class Peers(Protocol):
    """Memory that each rank of a group can write, and streams that order what is done with it."""

    @property
    def boxes(self) -> Sequence[Tensor]:
        """Of each rank, uint8 [box_bytes(size)]; flags begin as zeros."""
        ...

    def sending(self) -> AbstractContextManager[None]:
        """What is done inside is done in order, after what was asked for before."""
        ...

    def receiving(self) -> AbstractContextManager[None]:
        """The same, beside what is sent from now on, but after what was sent before.

        A CUDA graph may put both into one queue, in any order that it knows nothing against; flags it does not know.
        """
        ...

    def done(self) -> Callable[[], None]:
        """Called, what it returns lets what is asked for next wait for all that was sent and received so far."""
        ...

    def take(self, place: int) -> None:
        """Waits until the flag at this byte of the own box is 1, and makes it 0."""
        ...

    def give(self, rank: int, place: int) -> None:
        """Makes the flag at this byte of the rank's box 1, once all that was done before is there."""
        ...


class PeerCopies(Exchange):
    """An Exchange by copies into the peers' memory; what is summed over all tokens goes by collectives.

    Args:
        group: the tensor ranks.
        peers: their memory.
    """

    def __init__(self, group: dist.ProcessGroup, peers: Peers) -> None:
        super().__init__(group)
        self._peers, self._slot = peers, 0
        # What waits until a slot's last piece was taken from it here, of those that nothing asked for next waits for.
        self._emptied: dict[int, Callable[[], None]] = {}
        self._share = SLOT_BYTES // self.size // 256 * 256
        self._others = [(self.rank + hop) % self.size for hop in range(1, self.size)]
        with peers.sending():
            for slot in range(SLOTS):
                for peer in self._others:
                    peers.give(self.rank, self._free(slot, peer))

    def all_gather(self, whole: Tensor, x: Tensor) -> Callable[[], None]:  # noqa: D102
        pieces = whole.unflatten(0, (self.size, -1))
        with self._peers.receiving():
            pieces[self.rank].copy_(x)
        for tokens in self._cut(x):
            slot = self._send(dict.fromkeys(self._others, x[tokens]))
            with self._received(slot, x[tokens]) as parts:
                for rank, part in parts.items():
                    pieces[rank, tokens].copy_(part)
        return self._until_done(whole, x)

    def reduce_scatter(self, total: Tensor, fill: Fill, last: bool) -> Callable[[], None]:  # noqa: D102
        parts, tokens = total.new_empty(self.size, *total.shape), len(total)
        cut = self._cut(total)
        # What others wait for is computed first where no later product hides its way.
        early = last and len(cut) == 1
        for rank in self._others if early else []:
            fill(slice(rank * tokens, (rank + 1) * tokens), parts[rank])
        if not early:
            fill(slice(0, self.size * tokens), parts.flatten(0, 1))
        for piece in cut:
            slot = self._send({rank: parts[rank, piece] for rank in self._others})
            if early:
                fill(slice(self.rank * tokens, (self.rank + 1) * tokens), parts[self.rank])
            with self._received(slot, total[piece]) as taken:
                first, *rest = taken.values()
                torch.add(parts[self.rank, piece], first, out=total[piece])
                for part in rest:
                    total[piece].add_(part)
        return self._until_done(total, parts)

    def _cut(self, x: Tensor) -> list[slice]:
        """The tokens [T, ...] of x by as many as fit a slot, in even pieces."""
        width = x.shape[1:].numel()
        fit = self._share // (width * x.element_size())
        assert fit, f"a token of {width} numbers does not fit a slot's {self._share} bytes"
        count = max(1, -(-len(x) // fit))
        bounds = [len(x) * piece // count for piece in range(count + 1)]
        return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]

    def _send(self, outgoing: dict[int, Tensor]) -> int:
        """Sends each peer its tensor, all of one shape; returns the slot that they, and those for this rank, take."""
        peers, slot = self._peers, self._slot
        self._slot = (slot + 1) % SLOTS
        with peers.sending():
            self._emptied.pop(slot, lambda: None)()
            for peer, tensor in outgoing.items():
                peers.take(self._free(slot, peer))
                self._room(peer, slot, self.rank, tensor).copy_(tensor)
                peers.give(peer, self._full(slot, self.rank))
        return slot

    @contextmanager
    def _received(self, slot: int, like: Tensor) -> Iterator[dict[int, Tensor]]:
        """A `with` block that has what each peer sent, in rank order."""
        with self._peers.receiving():
            for peer in self._others:
                self._peers.take(self._full(slot, peer))
            yield {peer: self._room(self.rank, slot, peer, like) for peer in sorted(self._others)}
            for peer in self._others:
                self._peers.give(peer, self._free(slot, self.rank))
            self._emptied[slot] = self._peers.done()

    def _until_done(self, *held: Tensor) -> Callable[[], None]:
        """What waits; until then the tensors are held, for the allocator sees no use of them by other streams."""
        done, kept = self._peers.done(), list(held)

        def wait() -> None:
            done()
            kept.clear()
            # Rows are waited for when all are on their way; and a graph's events are of no use to what comes after it.
            self._emptied.clear()

        return wait

    def _room(self, owner: int, slot: int, sender: int, like: Tensor) -> Tensor:
        begin = slot * SLOT_BYTES + sender * self._share
        return self._peers.boxes[owner][begin : begin + like.nbytes].view(like.dtype).view(like.shape)

    def _full(self, slot: int, sender: int) -> int:
        return SLOTS * SLOT_BYTES + _FLAG * (slot * self.size + sender)

    def _free(self, slot: int, receiver: int) -> int:
        return self._full(slot + SLOTS, receiver)


def box_bytes(size: int) -> int:
    """How many bytes the box of a rank takes in a group of so many: the inbox and its flags."""
    return SLOTS * SLOT_BYTES + 2 * SLOTS * size * _FLAG


class GPUs:
    """The current GPUs of a group's ranks, on one node and connected: PyTorch's symmetric memory; collective.

    Raises:
        ConfigError: there is no GPU, or the GPUs cannot write each other's memory.

    A rank may see no GPU but its own, and all call theirs number 0; what they are PyTorch then cannot tell apart.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("parallel.copy_engines is true and there is no GPU here; set parallel.copy_engines=false")
        import torch.distributed._symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        size = box_bytes(group.size())
        _check_one_machine(group, device)
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        try:
            self._box = symmetric.empty(size, dtype=torch.uint8, device=device)
            self._box[SLOTS * SLOT_BYTES :].zero_()
            handle = symmetric.rendezvous(self._box, group)
        except RuntimeError as error:
            raise ConfigError(
                f"parallel.copy_engines is true and rank {group.rank()} cannot reach the memory of the other "
                f"{group.size() - 1} tensor ranks' GPUs: {error}; set parallel.copy_engines=false"
            ) from error
        self._boxes = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
        self._handle, self._rank = handle, group.rank()
        self._sending, self._receiving = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        # Nobody gives before all flags are zero.
        torch.cuda.synchronize(device)
        dist.barrier(group)

    @property
    def boxes(self) -> Sequence[Tensor]:  # noqa: D102
        return self._boxes

    def sending(self) -> AbstractContextManager[None]:  # noqa: D102
        return self._after_current(self._sending)

    def receiving(self) -> AbstractContextManager[None]:  # noqa: D102
        self._receiving.wait_stream(self._sending)
        return self._after_current(self._receiving)

    def done(self) -> Callable[[], None]:  # noqa: D102
        events = [stream.record_event() for stream in (self._sending, self._receiving)]

        def wait() -> None:
            for event in events:
                event.wait()

        return wait

    def take(self, place: int) -> None:  # noqa: D102
        _call("cuStreamWaitValue32_v2", self._boxes[self._rank].data_ptr() + place, 1, _EQUAL)
        _call("cuStreamWriteValue32_v2", self._boxes[self._rank].data_ptr() + place, 0, 0)

    def give(self, rank: int, place: int) -> None:  # noqa: D102
        _call("cuStreamWriteValue32_v2", self._boxes[rank].data_ptr() + place, 1, 0)

    def _after_current(self, stream: torch.cuda.Stream) -> Any:
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)


def _check_one_machine(group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises ConfigError on every rank where not all could send each other handles of memory, by process number."""
    own = torch.tensor([_machine()], device=device)
    found = own.new_empty(group.size())
    dist.all_gather_into_tensor(found, own, group=group)
    if (found != own).any():
        raise ConfigError(
            f"parallel.copy_engines is true and the {group.size()} tensor ranks lie on {len(found.unique())} machines "
            "or containers; set parallel.copy_engines=false, or parallel.tensor to at most a machine's GPUs"
        )


def _machine() -> int:
    """A number of this machine, this start of it, and the container."""
    name = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


# CU_STREAM_WAIT_VALUE_EQ
_EQUAL = 1


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, address: int, value: int, flags: int) -> None:
    """One of the driver's operations on a stream's memory, on the current stream."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status = getattr(_driver(), name)(stream, ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(flags))
    if status:
        raise RuntimeError(f"{name} failed with CUDA's error {status}")

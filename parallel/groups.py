"""Process groups: how the ranks of a run find each other, and how they part."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..errors import UserError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def init_process_group(
    rank: int = 0,
    world_size: int = 1,
    *,
    store: str | Path | None = None,
    address: str | None = None,
    backend: str | None = None,
    timeout_seconds: float = 600.0,
    device: torch.device | str = "cpu",
) -> None:
    """Joins the default process group as `rank` of `world_size`; returns when every rank has.

    Args:
        rank: this process's number.
        world_size: how many processes join. One needs neither `store` nor `address`.
        store: a file that does not exist yet, for ranks that all run on this machine. No port is opened by it.
        address: "host:port" of rank 0, for ranks on several machines.
        backend: "gloo" or "nccl"; by default what `device` calls for.
        timeout_seconds: how long a collective may wait for the slowest rank.
        device: where the tensors of this rank live.
    """
    assert not dist.is_initialized(), "the process group of this process stands already"
    device = torch.device(device)
    timeout = timedelta(seconds=timeout_seconds)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    rendezvous = _make_store(rank, world_size, store, address, timeout)
    bound: dict[str, Any] = {"device_id": device} if backend == "nccl" and device.index is not None else {}
    try:
        dist.init_process_group(backend, store=rendezvous, rank=rank, world_size=world_size, timeout=timeout, **bound)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank} could not join {world_size} ranks at {store or address} within {timeout_seconds:g} s: "
            f"{error}; see whether each of them started"
        ) from error


def destroy_process_group() -> None:
    """Leaves the default process group and every group made from it; does nothing where none stands."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_group(**options):
    """A `with` block inside a process group made by `init_process_group(**options)`."""
    init_process_group(**options)
    try:
        yield
    finally:
        destroy_process_group()


def _make_store(rank: int, world_size: int, store: str | Path | None, address: str | None, timeout: timedelta) -> Store:
    """The store the ranks meet at; ranks of one machine are kept on the loopback interface."""
    if store is None and address is None:
        assert world_size == 1, f"{world_size} ranks need a store or an address to meet at"
        _stay_on_loopback()
        return HashStore()
    if store is not None:
        _stay_on_loopback()
        return FileStore(str(store), world_size)
    assert address is not None
    host, _, port = address.rpartition(":")
    if host in _LOOPBACK:
        _stay_on_loopback()
    return _tcp_store(host, int(port), rank, world_size, timeout)


def _tcp_store(host: str, port: int, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A TCP store whose server listens at `host` alone, not on every interface of the machine."""
    listener = None
    try:
        if rank == 0:
            listener = socket.create_server((host, port), family=_family(host))
        return TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port} ({error.strerror}); choose another port") from error
    except dist.DistNetworkError as error:
        raise UserError(f"rank {rank} cannot reach rank 0 at {host}:{port}; see whether it started") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _stay_on_loopback() -> None:
    """Keeps gloo's and NCCL's sockets off the network, unless the user named an interface."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")

"""Process groups: how the ranks of a run find each other, which of them share an axis, and how they part."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..errors import UserError
from .dims import ParallelDims

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What a gather of states brings grows with the ranks: more than FLAT of a row fold theirs by nodes of at most NODE.
FLAT, NODE = 16, 8
_nodes: dict[dist.ProcessGroup, tuple[Any, ...]] = {}


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
    megatron: Any = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None:
        megatron.destroy_model_parallel()
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


@dataclass(frozen=True)
class LayoutGroups:
    """The groups this rank is in; None where there is but one rank.

    Attributes:
        tensor: the ranks that share this rank's layers, in the order of their boxes.
        context: the ranks that share this rank's rows, in the order of their pieces.
        copies: the ranks that hold the same box of every parameter, data x context: they sum gradients.
        pipeline: the ranks that share this rank's rows and part of each layer, in the order of their layers.
        ends: the first and the last rank of `pipeline`, on those two: they share a tied embedding.
        model: the ranks that share one copy of the model, tensor x pipeline.
    """

    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None
    copies: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None
    ends: dist.ProcessGroup | None = None
    model: dist.ProcessGroup | None = None


def layout_groups(dims: ParallelDims) -> LayoutGroups:
    """Returns the groups of the layout, made by Megatron at the first call inside the default group; collective.

    Tensor ranks lie next to each other, then context, pipeline and data ranks: a replica's are consecutive.
    """
    if dims.replica_size == 1:
        return LayoutGroups(copies=dist.group.WORLD if dims.data > 1 else None)
    parallel_state = megatron()
    if made := not _stands(parallel_state, dims):
        _make_groups(parallel_state, dims)
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    groups = LayoutGroups(
        parallel_state.get_tensor_model_parallel_group() if dims.tensor > 1 else None,
        parallel_state.get_context_parallel_group() if dims.context > 1 else None,
        copies if dims.data * dims.context > 1 else None,
        model=parallel_state.get_model_parallel_group() if dims.tensor * dims.pipeline > 1 else None,
    )
    if made:
        _connect(groups)
    if dims.pipeline == 1:
        return groups
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    return replace(groups, pipeline=pipeline, ends=parallel_state.get_embedding_group(check_initialized=False))


def _connect(groups: LayoutGroups) -> None:
    """Has each connection take its memory now, not in the first step, when tensors hold most of it."""
    device = torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")
    for group in filter(None, (groups.tensor, groups.context, groups.copies, groups.model)):
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def fold_levels(context: dist.ProcessGroup) -> tuple[dist.ProcessGroup, ...]:
    """Returns the levels by which the ranks of `context` fold states: all at once, or by node, then over nodes."""
    return _nodes.get(context, (context,))


@contextmanager
def timeout_shared():
    """A `with` block whose new groups get the default group's timeout; made without one, they wait half an hour."""
    c10d: Any = dist.distributed_c10d
    world: Any = dist.group.WORLD
    device = torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")
    before = set(c10d._world.pg_map)
    yield
    for group in set(c10d._world.pg_map) - before:
        c10d._set_pg_timeout(world._get_backend(device).options._timeout, group)


@contextmanager
def connected_when_used():
    """A `with` block whose new groups connect at their first collective, which all of their ranks have to take.

    A default group bound to its GPU has them connect at once, and each connection takes memory of the GPU. Of those
    that Megatron makes, for a row over two ranks 17 a rank, most are never used.
    """
    world: Any = dist.group.WORLD
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = bound


def megatron() -> Any:
    """Returns Megatron's parallel_state, and imports all of Megatron quietly: it warns of each optional package."""
    # Megatron gathers by names that torch renames; the warning would come once a rank.
    warnings.filterwarnings("ignore", "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.parallel_state")


def _stands(state: Any, dims: ParallelDims) -> bool:
    """Whether Megatron's groups are those of this layout."""
    if not state.model_parallel_is_initialized():
        return False
    sizes = (
        state.get_tensor_model_parallel_world_size(),
        state.get_context_parallel_world_size(),
        state.get_pipeline_model_parallel_world_size(),
    )
    return sizes == (dims.tensor, dims.context, dims.pipeline)


def _make_groups(state: Any, dims: ParallelDims) -> None:
    from .megatron_cpu import serve_cpu

    assert dist.is_initialized(), f"{dims} needs a process group of {dims.world_size} ranks"
    state.destroy_model_parallel()
    world: Any = dist.group.WORLD
    on_cpu = dist.get_backend() == "gloo"
    if on_cpu:
        serve_cpu("tensor_parallel.mappings")
    options = world._get_backend(torch.device("cpu" if on_cpu else "cuda")).options
    # Pipeline ranks begin in pairs.
    with connected_when_used() if dims.pipeline == 1 else nullcontext():
        state.initialize_model_parallel(
            tensor_model_parallel_size=dims.tensor,
            context_parallel_size=dims.context,
            pipeline_model_parallel_size=dims.pipeline,
            # Of experts there are none; by their sizes Megatron checks that pipeline ranks may lie inside data ranks.
            expert_tensor_parallel_size=dims.tensor * dims.context,
            order="tp-cp-ep-pp-dp",
            create_gloo_process_groups=False,
            distributed_timeout_minutes=options._timeout.total_seconds() / 60,
            # What travels while products are computed does not wait for those to leave the GPU.
            high_priority_stream_groups=None if on_cpu else ["tp", "cp"],
        )
    _nodes.clear()
    if levels := _level_ranks(dims):
        made = (dist.new_subgroups_by_enumeration(ranks, timeout=options._timeout)[0] for ranks in levels)
        _nodes[state.get_context_parallel_group()] = tuple(made)


def _level_ranks(dims: ParallelDims) -> list[list[list[int]]]:
    """The ranks of every group of each level of `fold_levels`, nodes first; none where states are folded at once."""
    node = next(size for size in range(NODE, 0, -1) if dims.context % size == 0)
    if dims.context <= FLAT or node == 1:
        return []
    ranks = torch.arange(dims.world_size).view(-1, dims.context, dims.tensor).transpose(1, 2)
    nodes = ranks.reshape(-1, dims.context // node, node)
    return [level.flatten(0, 1).tolist() for level in (nodes, nodes.transpose(1, 2))]


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

"""DeepSpeed, brought in quietly: the only place that imports it, and only when a ZeRO stage is asked for.

Importing it costs seconds, so nothing here runs at import time. Left alone, DeepSpeed would also compile a shared
memory op at first use, log every choice it makes to standard output and look for wandb; none of that happens here.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..models.block import Block
from ..models.mlp import MLP
from .groups import megatron, timeout_shared

# Stage 3 shards parameters of more elements than this; to gather smaller ones would cost more time than memory.
KEPT_WHOLE = 2**14


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    device: torch.device,
    model_group: dist.ProcessGroup | None = None,
) -> Any:
    """Returns a DeepSpeed engine around `model` and `optimizer` on `device`; `model_group` shares one copy of it."""
    ranks = None if model_group is None else _Ranks(model_group)
    # Where DeepSpeed takes its device from, in stage 3 at any time.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    # A replica may be smaller than what the launcher started, which stage 3 takes for a mistake.
    with _environment("WORLD_SIZE", str(dist.get_world_size())), redirect_stdout(io.StringIO()):
        deepspeed = _load(device)
        _gather_once(deepspeed, model)
        with timeout_shared():
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, mpu=ranks, dist_init_required=False
            )
    return engine


def _gather_once(deepspeed: ModuleType, model: nn.Module) -> None:
    """Has stage 3 gather an MLP's parameters and its norm's once, and reduce them once, though tiles use them often."""
    deepspeed.utils.set_z3_leaf_modules(model, [MLP], raise_if_not_found=False)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for parameter in block.mlp_norm.parameters():
            deepspeed.zero.register_external_parameter(block.mlp, parameter)


class _Ranks:
    """Megatron's groups under the names DeepSpeed asks for. Its data ranks are data x context."""

    def __init__(self, model_group: dist.ProcessGroup) -> None:
        self._model = model_group
        self._copies = megatron().get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._copies

    def get_data_parallel_world_size(self) -> int:
        return self._copies.size()

    def get_data_parallel_rank(self) -> int:
        return self._copies.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()


def _load(device: torch.device) -> ModuleType:
    """Returns the deepspeed module, set up for `device` and joined to this process's default process group."""
    accelerator, backend = ("cuda", "nccl") if device.type == "cuda" else ("cpu", "gloo")
    with warnings.catch_warnings(), _environment("DS_ACCELERATOR", accelerator):
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
        chosen = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
        assert chosen == accelerator, f"this process has DeepSpeed for {chosen}; start another for {accelerator}"
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Without its shared memory op DeepSpeed takes gloo's collectives; with it, it runs a compiler first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if deepspeed.comm.comm.cdb is None:
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    # It gathers by a name that torch renames; the warning would come at every step.
    warnings.filterwarnings("ignore", "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")
    return deepspeed


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """The environment variable `name` as `value` for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def forget_groups() -> None:
    """Drops the process groups DeepSpeed remembers, so that this process can join new ones."""
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    if comm.cdb is not None:
        groups._release_process_group_references(group=None)
        groups.mpu = None
        comm.cdb = None


def zero_config(stage: int, precision: str, clip: float, offload: bool, device: torch.device) -> dict[str, Any]:
    """Returns the DeepSpeed configuration of a ZeRO stage whose caller owns batches, accumulation and the rate.

    Gradients are summed over the replicas, not averaged: the loss is divided by the global count of tokens already.
    Stage 3 can but average, so its caller multiplies. They are accumulated and sent as fp32 whatever parameters are.
    """
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "gradient_clipping": clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": False,
            "reduce_bucket_size": 2**26,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": KEPT_WHOLE,
            **({"offload_optimizer": host} if offload else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }

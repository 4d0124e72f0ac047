"""Which implementation of an op runs: decided from what is asked, the device and the dtype, logged once each.

Nothing falls back in silence: "triton" raises with the reason where it cannot run, and "auto" is a choice by rule
(the kernel on CUDA where one exists for the dtype, else the reference), not an attempt.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os

import torch

from ..errors import ConfigError

logger = logging.getLogger(__name__)

_HERE = contextlib.nullcontext()

_HALF_AND_SINGLE = frozenset({torch.float32, torch.float16, torch.bfloat16})
# The dtypes each op's Triton kernel takes; an op that is not listed has none.
KERNELS = {
    "attention": _HALF_AND_SINGLE,
    "cross_entropy": _HALF_AND_SINGLE,
    "gate_projections": _HALF_AND_SINGLE,
    "linear_attention": _HALF_AND_SINGLE,
    "linear_scan": _HALF_AND_SINGLE,
    "rg_lru": _HALF_AND_SINGLE,
    "rms_norm": _HALF_AND_SINGLE,
    "rotary": _HALF_AND_SINGLE,
    "short_conv": _HALF_AND_SINGLE,
    "taylor_attention": _HALF_AND_SINGLE,
}
IMPLEMENTATIONS = ("auto", "reference", "triton")
# Looked up here: torch.compile traces `resolve` and not every release of it can trace the lookup.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class CannotRun(ConfigError, ValueError):
    """The implementation that was asked for cannot run here; a wrong argument for a caller, a setting for a user."""


def resolve(implementation: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "reference" or "triton".

    Args:
        implementation: what the caller asks for, one of IMPLEMENTATIONS.
        op: the op's name.
        device: where the inputs are.
        dtype: the widest dtype of the inputs.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    chosen = implementation
    if implementation == "auto":
        chosen = "triton" if device.type == "cuda" and dtype in KERNELS.get(op, ()) else "reference"
    if chosen == "triton":
        reason = _why_not_triton(op, device.type, dtype)
        if reason:
            raise CannotRun(f"{op}: implementation='triton' cannot run: {reason}")
    if not torch.compiler.is_compiling():
        log_choice(op, device.type, dtype, implementation, chosen)
    return chosen


def _why_not_triton(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if op not in KERNELS:
        return "this op has no Triton kernel"
    if dtype not in KERNELS[op]:
        return f"its kernel has no {dtype}"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the inputs are on {device_type}; it needs CUDA, or TRITON_INTERPRET=1 set before Python starts"
    return None


@functools.cache
def log_choice(op: str, device_type: str, dtype: torch.dtype, asked: str, chosen: str) -> None:
    """Logs, the first time, what runs an op and what was asked for."""
    logger.info("%s on %s in %s: %s (asked: %s)", op, device_type, str(dtype).removeprefix("torch."), chosen, asked)


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's GPU; nothing to do where that is the current one, or for the interpreter."""
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else _HERE


def processors(tensor: torch.Tensor) -> int:
    """The multiprocessors of the GPU that holds the tensor; 1 elsewhere."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1

"""Megatron over gloo: its modules that make tensors on "the current CUDA device" make them on the CPU.

Each such module gets a stand-in for the name `torch` of its own; torch itself is untouched, and so is a process that
trains on CUDA, which never calls this.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch


class _Cuda:
    """`torch.cuda` as those modules use it."""

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")


class _CpuTorch(ModuleType):
    """`torch` with the CPU as its CUDA device."""

    cuda = _Cuda

    @staticmethod
    def zeros(*shape: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*shape, device="cpu", **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def serve_cpu(*modules: str) -> None:
    """Puts the stand-in into these modules of megatron.core, for this process's life; may be called again."""
    stand_in = _CpuTorch("torch")
    for name in modules:
        module: Any = importlib.import_module(f"megatron.core.{name}")
        module.torch = stand_in

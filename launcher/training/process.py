"""What a training process sets for itself before anything is built: device, precision, threads, determinism."""

from __future__ import annotations

import os

import torch

from ...errors import ConfigError
from ..config import DEVICES, Config


def choose_device(name: str) -> torch.device:
    """The device of this process; Ray shows each worker its own GPU as number 0."""
    if name not in DEVICES:
        raise ConfigError(f"the device is {name!r}; it must be one of {', '.join(DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the device is cuda and PyTorch sees no GPU here; `longscan doctor` says why.")
    use_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if use_gpu else torch.device("cpu")


def choose_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16; `auto` is bf16 (with fp32 masters) on a GPU and fp32 on a CPU."""
    return name if name != "auto" else "bf16" if device.type == "cuda" else "fp32"


def prepare_process(config: Config, world: int) -> None:
    """Sets threads, the GPU, matmul precision and determinism."""
    threads = config.run.threads or max(1, (os.cpu_count() or 1) // world)
    torch.set_num_threads(threads)
    if torch.cuda.is_available() and config.run.device != "cpu":
        torch.cuda.set_device(0)
        torch.backends.cuda.matmul.allow_tf32 = not config.run.deterministic
    if config.run.deterministic:
        _make_deterministic(config)


def _make_deterministic(config: Config) -> None:
    """Makes PyTorch raise at any operation that does not repeat its bits; refuses settings that cannot."""
    if config.run.device != "cpu" and torch.cuda.is_available() and not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        raise ConfigError(
            "run.deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment of a run that is already on a "
            "GPU; set it and start again, or use run.launcher=ray, which sets it."
        )
    if not config.run.threads:
        raise ConfigError(
            "run.deterministic needs run.threads set, since the number of CPU threads changes how sums round and 0 "
            f"takes it from the machine; this one would have {max(1, (os.cpu_count() or 1))} cores to share."
        )
    torch.use_deterministic_algorithms(True)

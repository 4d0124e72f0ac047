"""What is measured at a step and where it is written: metrics.jsonl, TensorBoard, and Weights & Biases on request."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import torch

from ...errors import ConfigError
from ..config import Config
from ..run_folder import RunFolder

# Dense bf16 peak in FLOP/s, by a word of the device's name. Devices not listed have no mfu.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


class Meter:
    """Turns the sums of a step into its metrics.

    Args:
        device: what this process computes on.
        devices: how many of them the run holds.
    """

    def __init__(self, device: torch.device, devices: int):
        self.device = device
        self.peak = peak_flops(device) * devices
        self.last = time.perf_counter()

    def restart(self) -> None:
        """Leaves what happened since the last step (a checkpoint, a validation) out of the next step's pace."""
        self.last = time.perf_counter()

    def measure(self, tokens: int, flops_per_token: float) -> dict[str, float | None]:
        """The pace since the last call, and the memory held."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        flops = tokens * flops_per_token / seconds
        return {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops,
            "mfu": flops / self.peak if self.peak else None,
            "memory_bytes": memory_bytes(self.device),
        }


def peak_flops(device: torch.device) -> float:
    """The device's dense bf16 peak in FLOP/s; 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_FLOPS.items() if word in name), 0.0)


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU, or on the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bits_per_byte(loss_sum: float, text_bytes: float) -> float | None:
    """Summed nats over bytes of text, in bits; None where no bytes are known."""
    return loss_sum / math.log(2) / text_bytes if text_bytes else None


class MetricsWriter:
    """Writes one object a step. Only rank 0 of the newest incarnation has one."""

    def __init__(self, config: Config, folder: RunFolder):
        self.folder = folder
        self.every = config.logging.every
        self.tensorboard = None
        self.wandb = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder.path / "tensorboard"), flush_secs=30)
        if config.logging.wandb:
            self.wandb = _start_wandb(config, folder)

    def write(self, metrics: dict[str, Any]) -> None:
        """Writes the metrics of a step, if it is one of every `logging.every`."""
        step = metrics["step"]
        if step % self.every:
            return
        self.folder.metrics.append(metrics)
        self._chart(step, metrics)

    def validation(self, step: int, loss: float, bits: float | None, incarnation: int) -> None:
        """Writes the held-out loss after a step, beside the events of the run."""
        measured = {"heldout_loss": loss, "heldout_bits_per_byte": bits}
        record = {"time": round(time.time(), 3), "event": "validated", "incarnation": incarnation, "step": step}
        self.folder.events.append({**record, **measured})
        self._chart(step, measured)

    def _chart(self, step: int, metrics: dict[str, Any]) -> None:
        scalars = {key: value for key, value in metrics.items() if isinstance(value, int | float) and key != "step"}
        if self.tensorboard:
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flushes everything."""
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _start_wandb(config: Config, folder: RunFolder) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb={config.logging.wandb} needs Weights & Biases: pip install 'longscan[wandb]', "
            "or set logging.wandb= to do without."
        ) from error
    return wandb.init(project=config.logging.wandb, name=folder.path.name, dir=str(folder.path), resume="allow")

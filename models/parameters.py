"""How every parameter begins and whether it decays, declared beside the parameter.

A module that owns parameters sets `self.specs`, one ParameterSpec a parameter. Values are drawn from the seed and the
parameter's full name alone, on the CPU in fp32: build order, device, dtype and layout change nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

Init = Callable[[tuple[int, ...], Generator], Tensor]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter's initial values, and whether weight decay applies to it."""

    init: Init
    decay: bool = True


def normal(variance: float, decay: bool = True) -> ParameterSpec:
    """Values from N(0, variance)."""

    def init(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * math.sqrt(variance)

    return ParameterSpec(init, decay)


def zeros() -> ParameterSpec:
    """Zeros, never decayed: biases and the norms' scales."""
    return ParameterSpec(lambda shape, generator: torch.zeros(shape), decay=False)


def init_parameters(module: nn.Module, seed: int) -> None:
    """Fills every parameter of `module` in place from `seed` and its name."""
    with torch.no_grad():
        for name, parameter, spec in _specified(module):
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            parameter.copy_(spec.init(tuple(parameter.shape), generator))


def undecayed(module: nn.Module) -> set[str]:
    """The names of the parameters that weight decay leaves alone."""
    return {name for name, _, spec in _specified(module) if not spec.decay}


def _specified(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParameterSpec]]:
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            specs = getattr(owner, "specs", {})
            assert name in specs, f"{type(owner).__name__} declares no ParameterSpec for {full}"
            yield full, parameter, specs[name]

"""How every parameter begins and whether it decays, declared beside the parameter.

A module that owns parameters sets `self.specs`, one ParameterSpec a parameter. Values are drawn from the seed and the
parameter's full name alone, on the CPU in fp32, for the whole logical tensor, of which a rank that holds a box takes
that: build order, device, dtype and layout change nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
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


def ones() -> ParameterSpec:
    """Ones, never decayed: the factors of LayerNorm."""
    return ParameterSpec(lambda shape, generator: torch.ones(shape), decay=False)


@dataclass(frozen=True)
class Logical:
    """Where a parameter lies in its logical tensor, the one that a model on one device would have.

    Attributes:
        shape: the logical tensor's.
        offsets: where this rank's box begins; its sizes are the parameter's own shape.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def whole(name: str, parameter: Tensor) -> Logical:
    """The place of a parameter that is its logical tensor."""
    return Logical(tuple(parameter.shape), (0,) * parameter.ndim)


def init_parameters(
    module: nn.Module,
    seed: int,
    logical: Callable[[str, Tensor], Logical] = whole,
    names: Collection[str] | None = None,
) -> None:
    """Fills the parameters called `names`, all unless given, of `module` in place from `seed` and their names.

    `logical` says which box of what a parameter is.
    """
    with torch.no_grad():
        for name, parameter, spec in _specified(module):
            if names is not None and name not in names:
                continue
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            place = logical(name, parameter)
            box = tuple(slice(o, o + n) for o, n in zip(place.offsets, parameter.shape, strict=True))
            parameter.copy_(spec.init(place.shape, generator)[box])


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

"""What each kernel is to reach on one H100 in bf16, forward and forward plus backward, and whether it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .figures import Timing, peer

FLOOR, MS = "x floor", "ms"


@dataclass(frozen=True)
class Target:
    """A row of the table: the works it speaks of and the most that forward, and forward plus backward, may take.

    `unit` is FLOOR, MS, or the beginning of a peer's name: then times are ratios to the fastest such peer.
    """

    work: str
    forward: float | None
    both: float
    unit: str = FLOOR
    impl: str = "longscan"

    def reached(self, timings: Sequence[Timing]) -> Reached | None:
        """What the newest figures say of it, or None where there are none."""
        here = [t for t in timings if re.search(self.work, t.work)]
        ours = next((t for t in here if peer(t.impl) == self.impl and t.both), None)
        if ours is None:
            return None
        peers = [t for t in here if t.impl.startswith(self.unit)]
        forward, both = (self._value(ours, name, peers) for name in ("forward", "both"))
        return Reached(self, ours.work, forward, both)

    def _value(self, ours: Timing, name: str, peers: Sequence[Timing]) -> float | None:
        time = getattr(ours, name)
        if self.unit == MS or time is None:
            return time
        if self.unit == FLOOR:
            return getattr(ours, f"{name}_ratio")
        best = min((getattr(t, name) for t in peers if getattr(t, name)), default=None)
        return time / best if best else None


@dataclass(frozen=True)
class Reached:
    """A target with the figures that stand against it."""

    target: Target
    work: str
    forward: float | None
    both: float | None

    @property
    def met(self) -> bool:
        """Whether every promised figure is there and within its bound."""
        promised = ((self.target.forward, self.forward), (self.target.both, self.both))
        return all(most is None or (value is not None and value <= most) for most, value in promised)


TARGETS = (
    Target(r"^rg_lru \(1, 32768, 2560\)", 1.2, 1.35),
    Target(r"^rg_lru \(8, 2048, 2560\)", 1.2, 1.35),
    Target(r"^linear_scan \(1, 32768, 2560\)", 1.1, 1.25),
    Target(r"^linear_scan \(8, 2048, 2560\)", 1.1, 1.25),
    Target(r"^taylor_attention \(B, H, T\) = \(1, 16, 32768\) K 16 V 64", 0.35, 1.4, MS),
    Target(r"^taylor_attention \(B, H, T\) = \(8, 16, 2048\) K 16 V 64", 0.2, 0.75, MS),
    Target(r"^attention window 1024 B 1 T 32768 H 10/1 K 256", 0.95, 4.3, MS),
    Target(r"^attention window 2048 B 1 T 32768 H 16/1 K 128", 1.1, 4.4, MS),
    Target(r"^attention window 64 B 1 T 32768 H 16/1 K 64", 0.09, 0.35, MS),
    Target(r"^attention causal ALiBi B 1 T 32768 H 16/16 K 128", 1.15, 1.25, "SDPA"),
    Target(r"^attention causal flat ALiBi B 1 T 32768 H 16/16 K 128", 1.15, 1.25, "SDPA"),
    Target(r"^short_conv \(4, 8192, 2560\) 4 taps bf16", 1.3, 1.6),
    Target(r"^linear_cross_entropy 16384 x 2560 x 32000", None, 1.1),
    Target(r"^linear_cross_entropy 16384 x 2560 x 32000", None, 1.45, impl="longscan, vocabulary slice"),
)

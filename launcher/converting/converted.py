"""What a conversion made, for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    `rounded` counts the tensors of which it does not hold every bit, `drawn` those that a twin adds to its teacher.
    """

    source: str
    target: str
    to: str
    family: str
    parameters: int
    tensors: int
    bytes: int
    rounded: int
    drawn: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)

    def show(self, console: Console) -> None:
        """Prints where the model is, its size, whether bits were lost, and what is not trained."""
        size = f"{self.parameters:,} parameters in {self.tensors} tensors, {self.bytes / 2**20:,.1f} MiB"
        console.print(f"{self.target} ({self.family}): {size}, {self.seconds:.1f} s", markup=False, soft_wrap=True)
        if self.rounded:
            console.print(f"{self.rounded} tensors were rounded")
        if self.drawn:
            console.print(f"{self.drawn} tensors are the twin's own: drawn from run.seed, not trained")

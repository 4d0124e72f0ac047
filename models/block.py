"""The residual block: a mixer and an MLP, each after its norm."""

from __future__ import annotations

from torch import Tensor, nn

from .backend import Backend
from .config import ModelConfig
from .mixers import MIXERS
from .mlp import MLP
from .sequence import SequenceContext


class Block(nn.Module):
    """`x = x + mixer(norm(x)); x = x + mlp(norm(x))`."""

    def __init__(self, mixer: str, config: ModelConfig, backend: Backend, implementation: str) -> None:
        super().__init__()
        self.mixer_norm = backend.norm(config.width, config.norm_eps)
        self.mixer = MIXERS[mixer](config, backend, implementation)
        self.mlp_norm = backend.norm(config.width, config.norm_eps)
        self.mlp = MLP(config, backend)

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.mixer(self.mixer_norm(x), seq)
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry of the mixer)."""
        y, carry = self.mixer.step(self.mixer_norm(x), carry, position)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), carry

"""The residual block: a mixer and an MLP, each after its norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backend import Backend
from .config import ModelConfig
from .mixers import MIXERS
from .mlp import MLP
from .norm import NORMS
from .sequence import SequenceContext

ACTIVATION_CHECKPOINTS = ("none", "selective", "full", "offload")


class Block(nn.Module):
    """`x = x + mixer(norm(x)); x = x + mlp(norm(x))`.

    Args:
        mixer: its name.
        config, backend, implementation: the model's.
        activation_checkpoint: what is computed again in the backward pass instead of kept: "none"; "selective", the
            MLP and its norm, in Griffin 14 of the 30 numbers a channel that an RG-LRU's block keeps and of the 21 that
            an attention's keeps, and neither a scan or attention nor an exchange with other pieces of the sequence;
            "full", all of it, of which only the input is kept, for a third more work; "offload", like "full", the
            inputs in host memory (`LanguageModel.through`). But for "none" MLP and norm run in tiles of tokens.
    """

    def __init__(
        self,
        mixer: str,
        config: ModelConfig,
        backend: Backend,
        implementation: str,
        activation_checkpoint: str = "none",
    ) -> None:
        super().__init__()
        self.mixer_norm = NORMS[config.norm](config.width, config.norm_eps)
        self.mixer = MIXERS[mixer](config, backend, implementation)
        self.mlp_norm = NORMS[config.norm](config.width, config.norm_eps)
        self.mlp = MLP(config, backend)
        self.activation_checkpoint = activation_checkpoint

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.activation_checkpoint in ("full", "offload") and torch.is_grad_enabled():
            # Nothing in a block draws random numbers, so no state of a generator is kept for the second time.
            return checkpoint(self._whole, x, seq, use_reentrant=False, preserve_rng_state=False)
        return self._whole(x, seq)

    def _whole(self, x: Tensor, seq: SequenceContext) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), seq)
        if self.activation_checkpoint == "none":
            return x + self.mlp(self.mlp_norm(x))
        return self.mlp(x, norm=self.mlp_norm)

    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry of the mixer)."""
        y, carry = self.mixer.step(self.mixer_norm(x), carry, position)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), carry

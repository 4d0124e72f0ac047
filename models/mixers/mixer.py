"""The face that every mixer shows to its block."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..sequence import SequenceContext


class Mixer(nn.Module, ABC):
    """Mixes tokens along the sequence: `forward` over a piece, `step` over one token, the same function of both."""

    @abstractmethod
    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """[B, T, D] -> [B, T, D]; what lies outside the piece comes from `seq` and leaves through it."""

    @abstractmethod
    def step(self, x: Tensor, carry: dict[str, Tensor], position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One token's ([B, D], next carry); `position` int64 [B] is the token's in its document, 0 begins one."""

    @abstractmethod
    def init_carry(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The carry of `batch` rows that have read nothing, for a model of `dtype`."""

    def use_positions(self, config: ModelConfig) -> None:
        """Goes on with the positions of `config`; a mixer that is told none has nothing to do."""

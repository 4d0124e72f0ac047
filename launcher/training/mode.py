"""What a stage trains and to which end; the model and weights that this takes.

Not when a mode ends: the trainer says so. Invariant: a parameter that a mode does not train keeps its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...models import LanguageModel
from ...models.adapter import merge_adapters
from ...models.linearize import AttentionTransfer, added_parameters, frozen_parameters
from ...parallel import Engine, ParallelDims, make_model
from ...parallel.checkpoint import load_weights
from ..config import Config


@dataclass(frozen=True)
class Mode:
    """A stage's `objective` and what it `trains`."""

    objective: str
    trains: str

    @staticmethod
    def of(config: Config, stage: int) -> Mode:
        """That of stage number `stage`."""
        return Mode(config.stages[stage].objective, config.stages[stage].trains)

    @property
    def transfers(self) -> bool:
        """Whether the loss is the mixers' distance from softmax attention."""
        return self.objective == "attention_transfer"

    def make_model(self, config: Config, dims: ParallelDims) -> LanguageModel:
        """This rank's part of the model, without values, what it does not train named as frozen; collective."""
        options: Any = {
            "implementation": config.run.implementation,
            "activation_checkpoint": config.run.activation_checkpoint,
        }
        kind = AttentionTransfer if self.transfers else LanguageModel
        model = make_model(config.model, dims, config.run.compile and not self.transfers, kind, **options)
        model.frozen = frozen_parameters(model, self.trains)
        return model

    def load_weights(self, path: str, model: LanguageModel, seed: int) -> dict[str, Any]:
        """Fills `model` from the checkpoint, adapters merged; returns what rode along.

        What a twin has and its teacher's checkpoint has not is drawn from `seed`.
        """
        added = added_parameters(model.config)
        manifest = load_weights(path, model, may_lack=added)
        model.init_weights(seed, {name for name in added if f"weight/{name}" not in manifest.tensors})
        merge_adapters(model)
        return manifest.meta

    def block_errors(self, engine: Engine, tokens: float) -> tuple[float, ...]:
        """Each block's error of the step in progress, the mean of its `tokens`; empty unless this mode transfers."""
        if not self.transfers:
            return ()
        assert isinstance(engine.model, AttentionTransfer)
        # A sum over ranks counts a replica once, and its ranks hold a piece of the tokens each, and some of the blocks.
        errors = engine.model.reset_errors() * (engine.dims.context * engine.dims.pipeline)
        return tuple(error / tokens for error in engine.sum(*errors.unbind()))

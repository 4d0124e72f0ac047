"""A Llama into its linearized twin: every tensor of the teacher's as it is, and what the twin adds, not trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...errors import ConfigError
from ...models import ModelConfig
from ...models import convert as published
from ...models.config import LoRAConfig
from ...models.linearize import added_parameters, first_values, twin_config
from ..config import Config, RunConfig, flatten, resolve
from .importing import Importing, training_command

# The family that can be linearized, the configuration that says how by default, and what may be said otherwise of a
# twin that is not trained.
LINEARIZABLE = "llama"
LINEARIZE = "linearize"
TWIN_KEYS = ("model.linearized_attention.", "run.seed=")


class Linearizing(Importing):
    """A Llama on its way into a run folder with its linearized twin, not trained; making one checks the source."""

    def __init__(self, source: Path, tokenizer: str | None, overrides: Sequence[str]) -> None:
        super().__init__(source, tokenizer)
        check_linearizable(self)
        if others := [text for text in overrides if not text.startswith(TWIN_KEYS)]:
            raise ConfigError(
                f"{others[0]!r} is no part of a twin that is not trained; give model.linearized_attention.KEY=VALUE or "
                "run.seed=N"
            )
        found = twin_of(self.model, LINEARIZE, overrides)
        # Adapters begin with the stage that trains them.
        twin = replace(found.model, lora=LoRAConfig())
        self.config = Config(model=twin, run=RunConfig(seed=found.run.seed))
        shapes = published.parameter_shapes(twin)
        self.drawn = sorted(shapes.keys() - self.shapes.keys())
        self.shapes |= {name: shapes[name] for name in self.drawn}

    def _tensors(self) -> Iterator[Tensor]:
        yield from super()._tensors()
        yield from first_values(self.config.model, self.config.run.seed, self.drawn)

    def _commands(self, name: str) -> list[str]:
        transfer = "{seq_len: 2048, tokens: 20M, objective: attention_transfer, trains: mixers, lr_scale: 10}"
        return [training_command(name, transfer, "{seq_len: 2048, tokens: 100M, lr_scale: 0.1}")]

    def _remarks(self) -> list[str]:
        what = f"{len(self.drawn)} tensors that linearized attention adds are drawn from seed {self.config.run.seed}"
        return [f"{what} and not trained: it predicts badly before it is.", "It does not convert back."]


def check_linearizable(importing: Importing) -> None:
    """Returns nothing; ConfigError where the model is of a family that has no linearized twin."""
    if importing.family.name != LINEARIZABLE:
        raise ConfigError(f"{importing.source} is a {importing.family.name}; only a {LINEARIZABLE} can be linearized")


def twin_of(teacher: ModelConfig, config: str, overrides: Sequence[str]) -> Config:
    """The configuration `config` (what `resolve` takes) with overrides, its model the linearized twin of `teacher`.

    ConfigError where the overrides leave no room for a tensor of the teacher's.
    """
    fields = flatten({"model": dataclasses.asdict(twin_config(teacher))})
    twin = [f"{key}={json.dumps(value)}" for key, value in fields.items() if not key.startswith("model.lora.")]
    found = resolve(config, [*twin, *overrides])
    theirs, ours = published.parameter_shapes(teacher), published.parameter_shapes(found.model)
    new = added_parameters(found.model)
    for name in sorted(theirs.keys() | ours.keys() - new):
        if theirs.get(name) != ours.get(name):
            there, here = (list(shapes[name]) if name in shapes else "absent" for shapes in (theirs, ours))
            raise ConfigError(
                f"{name} is {there} in the model to linearize and {here} in the twin; change only what linearized "
                "attention adds to it"
            )
    return found

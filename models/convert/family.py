"""A family of published models: how its config reads here, and which of our parameters hold each of its tensors.

A table of names serves both directions. Parameters that an option leaves out of the model drop out of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config import MIXER_NAMES, ModelConfig, validate
from ..language_model import LanguageModel
from ..mixer_config import AttentionConfig
from .fields import Fields

# What no logit depends on: how weights begin.
_BEGINNINGS = ("rg_lru.decay_init", "rg_lru.decay_range")


@dataclass(frozen=True)
class Turn:
    """How one tensor of theirs and the one or several of ours that hold its numbers come from each other."""

    to_ours: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    to_theirs: Callable[[Sequence[Tensor], ModelConfig], Tensor]


SAME = Turn(lambda theirs, _: [theirs], lambda ours, _: ours[0])
# Their scale is stored around one and ours around zero.
AROUND_ONE = Turn(lambda theirs, _: [theirs - 1], lambda ours, _: ours[0] + 1)


@dataclass(frozen=True)
class Entry:
    """A line of a family's table; names are what follows the block's prefix."""

    theirs: str
    ours: str | tuple[str, ...]
    turn: Turn = SAME


def linear(theirs: str, ours: str) -> tuple[Entry, Entry]:
    """The lines of a weight and a bias: a linear's, or a LayerNorm's."""
    return Entry(f"{theirs}.weight", f"{ours}.weight"), Entry(f"{theirs}.bias", f"{ours}.bias")


@dataclass(frozen=True)
class Link:
    """One tensor of theirs in a model of a given config.

    Attributes:
        theirs: its name.
        shape: its shape.
        ours: the names of the parameters that hold its numbers.
        shapes: theirs, in the same order.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    turn: Turn
    config: ModelConfig

    def to_ours(self, theirs: Tensor) -> list[Tensor]:
        """The parameters, in the order of `ours`."""
        return [tensor.contiguous() for tensor in self.turn.to_ours(theirs, self.config)]

    def to_theirs(self, ours: Sequence[Tensor]) -> Tensor:
        """The tensor that the parameters make."""
        return self.turn.to_theirs(ours, self.config).contiguous()


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        name: its `model_type`.
        architecture: the class that holds a model of it with its head.
        read: its config's fields as ours.
        write: a config of ours as its fields; what it cannot say is found by reading them back.
        base: the prefix of all names but the head's, which some published files leave out.
        layer: what names of a block begin with.
        outside: the tensors outside of the blocks.
        block: those of every block but its mixer's.
        mixers: those of each mixer it has.
        head: the head's table where it is not the embedding's.
        unread: endings of names that hold no parameter.
    """

    name: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    base: str
    layer: str
    outside: tuple[Entry, ...]
    block: tuple[Entry, ...]
    mixers: Mapping[str, tuple[Entry, ...]]
    head: str = "lm_head.weight"
    unread: tuple[str, ...] = field(default=())

    def config(self, mapping: Mapping[str, Any]) -> ModelConfig:
        """The model that the fields of a config.json describe; ConfigError names those that mean nothing here."""
        fields = Fields(mapping, self.name)
        try:
            config = self.read(fields)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"config.json has a value that makes no {self.name} model: {error}") from error
        fields.close()
        validate(config)
        return config

    def links(self, config: ModelConfig) -> list[Link]:
        """Every tensor of a model of `config`, the blocks in order."""
        shapes = parameter_shapes(config)
        links = [
            _link(entry, config, shapes, theirs, ours)
            for entry, theirs, ours in self._entries(config)
            if set(_names(entry.ours, ours)) <= shapes.keys()
        ]
        covered = {name for link in links for name in link.ours}
        assert covered == shapes.keys(), f"{self.name}: no line for {sorted(shapes.keys() - covered)}"
        return links

    def problems(self, config: ModelConfig) -> list[str]:
        """What of `config` this family cannot say, with the values; empty where it is one of its models."""
        if strangers := set(config.mixers) - self.mixers.keys():
            return [f"it has no {name}" for name in sorted(strangers)]
        try:
            said = essence(self.config(self.write(config)))
        except ConfigError as error:
            return [str(error)]
        meant = essence(config)
        keys = [key for key in meant if said.get(key) != meant[key]]
        return [f"model.{key}={meant[key]} would be {said.get(key)}" for key in keys]

    def _entries(self, config: ModelConfig) -> Iterator[tuple[Entry, str, str]]:
        yield from ((entry, "", "") for entry in self.outside)
        if not config.tie_embeddings:
            yield Entry(self.head, "unembedding.weight"), "", ""
        for layer, mixer in enumerate(config.mixers):
            for entry in (*self.block, *self.mixers[mixer]):
                yield entry, self.layer.format(layer), f"blocks.{layer}."


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model of `config`; nothing is allocated."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def essence(config: ModelConfig) -> dict[str, Any]:
    """What the logits of `config` depend on, by dotted key, with what 0 stands for filled in."""
    tree = asdict(config)
    found = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    found |= {"pattern": config.mixers, **{f"mlp.{key}": value for key, value in tree["mlp"].items()}}
    found["mlp.hidden"] = config.mlp.hidden_size(config.width)
    for name in set(config.mixers) & set(MIXER_NAMES):
        found |= {f"{name}.{key}": value for key, value in tree[name].items()}
        options = config.mixer_config(name)
        if isinstance(options, AttentionConfig):
            found[f"{name}.heads"] = options.query_heads(config.width)
            found[f"{name}.kv_heads"] = options.key_heads(config.width)
            if options.position != "rope":
                found |= {f"{name}.rope_fraction": None, f"{name}.rope_base": None}
            if options.position != "alibi":
                found[f"{name}.alibi_scale"] = None
    if "rg_lru" in config.mixers:
        found["rg_lru.width"] = config.rg_lru.channels(config.width)
    return {key: value for key, value in found.items() if key not in _BEGINNINGS}


def _link(entry: Entry, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], theirs: str, ours: str) -> Link:
    names = _names(entry.ours, ours)
    parts = tuple(shapes[name] for name in names)
    whole = entry.turn.to_theirs([torch.empty(shape, device="meta") for shape in parts], config)
    return Link(theirs + entry.theirs, tuple(whole.shape), names, parts, entry.turn, config)


def _names(ours: str | tuple[str, ...], prefix: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in ((ours,) if isinstance(ours, str) else ours))

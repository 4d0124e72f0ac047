"""Whether something can be converted at all: found out from names, shapes and fields, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ConfigError, UserError
from ..config import ModelConfig, nearest
from .bloom import BLOOM
from .family import Family, Link
from .files import DTYPES, Weights
from .llama import LLAMA
from .recurrent_gemma import RECURRENT_GEMMA

FAMILIES = {family.name: family for family in (RECURRENT_GEMMA, LLAMA, BLOOM)}
# How many wrong tensors a message lists.
LISTED = 3


def family_named(config: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names; ConfigError where it is none of those known."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ConfigError(
            f"{where} says model_type={name!r}, which cannot be converted; {nearest(str(name), (*FAMILIES,))}"
        )
    return FAMILIES[name]


def family_of(config: ModelConfig) -> Family:
    """The family that can say all of `config`; ConfigError with what each lacks where none can."""
    lacking = {}
    for name, family in FAMILIES.items():
        lacking[name] = family.problems(config)
        if not lacking[name]:
            return family
    reasons = "; ".join(f"{name}: {', '.join(problems[:LISTED])}" for name, problems in lacking.items())
    raise ConfigError(f"no architecture of transformers that is known here says this model ({reasons})")


def check_tensors(family: Family, links: list[Link], weights: Weights, where: str) -> dict[str, str]:
    """The stored name of each tensor of `links`; UserError with names and shapes where tensors and config disagree."""
    stored = {link.theirs: _stored_name(link.theirs, family, weights) for link in links}
    problems = []
    for link in links:
        entry = weights.entries.get(stored[link.theirs])
        if entry is None:
            problems.append(f"{link.theirs} {list(link.shape)} is missing")
        elif entry.shape != link.shape:
            problems.append(f"{entry.name} is {list(entry.shape)}, by config.json it would be {list(link.shape)}")
        elif entry.dtype not in DTYPES:
            problems.append(f"{entry.name} is {entry.dtype}; known are {', '.join(DTYPES)}")
    for name in sorted(weights.entries.keys() - set(stored.values())):
        if not name.endswith(family.unread or (" ",)) and not _repeats_embedding(name, family, stored, weights):
            problems.append(f"{name} {list(weights.entries[name].shape)} is not a tensor of such a model")
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(f"{where} does not hold the model of its config.json: {'; '.join(problems[:LISTED])}{more}")
    return stored


def _stored_name(name: str, family: Family, weights: Weights) -> str:
    """`name`, or without the base's prefix where the file holds the model without its head."""
    bare = name.removeprefix(family.base)
    return bare if name not in weights.entries and bare in weights.entries else name


def _repeats_embedding(name: str, family: Family, stored: dict[str, str], weights: Weights) -> bool:
    """Whether `name` is a tied head that was stored all the same, equal to the embedding."""
    table = next(stored[entry.theirs] for entry in family.outside if entry.ours == "embedding.weight")
    if name != family.head or weights.entries.get(table, None) is None:
        return False
    return torch.equal(weights.read(name), weights.read(table))

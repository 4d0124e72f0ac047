"""The model card: what a converted model is, where it came from and how it is loaded."""

from __future__ import annotations

from ..config import ModelConfig, num_params
from .family import Family


def model_card(
    name: str, library: str, family: Family, config: ModelConfig, origin: str, loading: str, notes: list[str]
) -> str:
    """The card in Markdown, with the front matter that model hubs read.

    Args:
        name: of the model.
        library: what loads it.
        family: the architecture of transformers that it is, its attention linearized or not.
        config: the model.
        origin: a sentence on where the weights come from.
        loading: the commands or code that use it.
        notes: further sentences, one a point.
    """
    mixers = ", ".join(f"{config.mixers.count(mixer)} {mixer}" for mixer in dict.fromkeys(config.mixers))
    linearized = ", its attention linearized" if "linearized_attention" in config.mixers else ""
    points = "".join(f"- {note}\n" for note in notes)
    return f"""---
library_name: {library}
pipeline_tag: text-generation
tags: [longscan, {family.name}]
---
# {name}

{origin}

| | |
|---|---|
| architecture | {family.architecture}{linearized} |
| parameters | {num_params(config):,} |
| width, layers | {config.width}, {config.layers} |
| mixers | {mixers} |
| vocabulary | {config.vocab_size:,} |

{loading}

{points}
The license is that of the weights it was made from; this page grants none.
"""

"""A source says itself what it becomes: a model of transformers a run folder, and a run a model of transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import ConfigError
from ...parallel.checkpoint.manifest import MANIFEST
from .converted import Converted
from .exporting import Exporting
from .importing import Importing
from .linearized import LINEARIZABLE, Linearizing
from .weights import SHARD_BYTES

DIRECTIONS = ("huggingface", "longscan")


def convert(
    source: Path,
    target: Path,
    to: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    linearized: bool = False,
    overrides: Sequence[str] = (),
) -> Converted:
    """Converts the model at `source` into the new folder `target`.

    Args:
        source: a folder with config.json and safetensors, or a run folder or one checkpoint in it.
        target: what to make; it must not exist.
        to: "huggingface" or "longscan", where the direction shall not follow from the source alone.
        dtype: of the tensors for transformers: fp32, bf16 or fp16; those it came in by default, fp32 where it was
            trained here. Checkpoints are fp32.
        tokenizer: "bytes" or a tokenizer.json, for a source that holds none.
        shard_bytes: the size of tensors above which files are split.
        linearized: make the linearized twin of the Llama at `source`, as `longscan linearize` begins to train it.
        overrides: `key=value` of that twin: what linearized attention adds, and the seed that draws it.

    Raises:
        ConfigError: an option, a config or a tokenizer that does not fit.
        UserError: files or tensors that do not, or a target that cannot be written.
    """
    began = time.perf_counter()
    found = direction(source)
    if to not in (None, *DIRECTIONS):
        raise ConfigError(f"--to is {to!r}; it must be one of {', '.join(DIRECTIONS)}")
    if to not in (None, found):
        raise ConfigError(f"--to is {to!r}, but {source} can only be converted to {found!r}; leave --to out")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists and is never written over; name another folder")
    if overrides and not linearized:
        raise ConfigError(f"{overrides[0]!r} says how to linearize, and nothing else can be set; give --linearized too")
    if linearized and found != "longscan":
        raise ConfigError(
            f"--linearized takes a {LINEARIZABLE} of transformers, and {source} is a run; convert it to huggingface "
            "first, or have longscan linearize make and train its twin"
        )
    if found == "longscan":
        if dtype:
            raise ConfigError(f"--dtype is {dtype!r}, but checkpoints are always fp32; leave it out")
        importing = Linearizing(source, tokenizer, overrides) if linearized else Importing(source, tokenizer)
        made = importing.write(target, shard_bytes)
    else:
        if tokenizer:
            raise ConfigError(f"--tokenizer is {tokenizer!r}, but {source} has its own; leave it out")
        made = Exporting(source, dtype).write(target, shard_bytes)
    return replace(made, seconds=round(time.perf_counter() - began, 3))


def direction(source: Path) -> str:
    """What `source` can be converted to."""
    if (source / "config.json").is_file():
        return "longscan"
    if (source / "config.yaml").is_file() or (source / MANIFEST).is_file():
        return "huggingface"
    what = "holds neither config.json nor config.yaml" if source.is_dir() else "is no folder"
    raise ConfigError(f"{source} {what}; name a model's folder, a run folder or one checkpoint in it")

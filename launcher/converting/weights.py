"""The weights of a checkpoint without ranks: written and read one logical tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models import convert as published
from ...models.config import LoRAConfig
from ...models.convert.files import DTYPES
from ...parallel.checkpoint.boxes import Box
from ...parallel.checkpoint.manifest import Chunk, DataFile, Manifest, write_manifest
from ...parallel.checkpoint.storage import MappedFiles, narrow

SHARD_BYTES = 5 * 10**9


def write_checkpoint(
    folder: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterator[Tensor], meta: dict[str, Any], shard_bytes: int
) -> Manifest:
    """Writes weights alone, the fp32 `tensors` in the order of `shapes`, as the checkpoint of step `meta["step"]`."""
    entries = [published.Entry(f"weight/{name}", "F32", shape) for name, shape in shapes.items()]
    files = []
    for number, held in enumerate(published.shards(entries, shard_bytes)):
        path = folder / f"rank-{number:05d}.safetensors"
        written = published.write_file(path, held, (next(tensors) for _ in held))
        chunks = (
            Chunk(entry.name, Box((0,) * len(entry.shape), entry.shape), begin)
            for entry, begin in zip(held, written.begins, strict=True)
        )
        files.append(DataFile(path.name, written.bytes, written.checksum, tuple(chunks)))
    manifest = Manifest(meta["step"], 0, {entry.name: (entry.shape, "F32") for entry in entries}, tuple(files), meta)
    manifest.check_cover()
    write_manifest(manifest, folder)
    return manifest


def whole_tensor(manifest: Manifest, files: MappedFiles, name: str) -> Tensor:
    """A logical tensor in fp32, put together from the boxes that ranks wrote."""
    shape, dtype = manifest.tensors[name]
    whole = torch.empty(shape)
    for file, chunk in manifest.chunks(name):
        narrow(whole, chunk.box.offsets, chunk.box.sizes).copy_(files.tensor(file, chunk, DTYPES[dtype]))
    return whole


def merged_tensor(manifest: Manifest, files: MappedFiles, name: str, lora: LoRAConfig) -> Tensor:
    """`whole_tensor`, with its adapter added if it has one."""
    weight, adapter = whole_tensor(manifest, files, name), name.removesuffix("weight") + "adapter."
    if f"{adapter}down" in manifest.tensors:
        up, down = (whole_tensor(manifest, files, adapter + part) for part in ("up", "down"))
        weight += up @ down * (lora.alpha / lora.rank)
    return weight


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes: NaNs are themselves, and 0 is not -0."""
    return torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))

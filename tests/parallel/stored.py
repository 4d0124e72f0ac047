"""What a checkpoint's files hold, read with the safetensors library and the manifest alone."""

import torch
from safetensors.torch import load_file

from longscan.parallel.checkpoint import verify


def stored(path):
    """The logical tensors, put together from all files."""
    manifest = verify(path)
    tensors = {name: torch.full(shape, float("nan")) for name, (shape, _) in manifest.tensors.items()}
    for file in manifest.files:
        content = load_file(path / file.name)
        assert len(content) == len(file.chunks)
        for chunk in file.chunks:
            place = tuple(slice(o, o + s) for o, s in zip(chunk.box.offsets, chunk.box.sizes, strict=True))
            tensors[chunk.tensor][place] = content[f"{chunk.tensor}[{','.join(map(str, chunk.box.offsets))}]"]
    return tensors

"""A checkpoint with adapters into a run folder of the same model without: each added to the weight beside it.

One weight is in memory at a time. Invariant: the two compute the same function, up to fp32 rounding.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from ..durable import sync_folder
from ..models import convert as published
from ..models.config import LoRAConfig
from ..parallel import checkpoint as checkpoints
from ..parallel.checkpoint.storage import MappedFiles
from .config import checkpoint_config, to_yaml
from .converting import CARRIED_FOLDER, SHARD_BYTES, carry_files, merged_tensor, new_folder, write_checkpoint
from .run_folder import RunFolder
from .trained import find_checkpoint


def merge(source: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the run folder `target`, which must not exist, from the run folder or checkpoint `source`.

    It holds one checkpoint of weights, as a converted model's does: to generate, evaluate, convert or begin with.
    """
    folder, checkpoint = find_checkpoint(source)
    manifest = checkpoints.read_manifest(checkpoint)
    config = checkpoint_config(manifest.meta)
    lora, model = config.model.lora, dataclasses.replace(config.model, lora=LoRAConfig())
    config = dataclasses.replace(config, model=model)
    kept = {key: manifest.meta[key] for key in ("step", "tokenizer", "versions")}
    meta = {**kept, "config": dataclasses.asdict(config), "merged": str(checkpoint.resolve())}
    shapes = published.parameter_shapes(model)
    files = MappedFiles(checkpoint)
    tensors = (merged_tensor(manifest, files, f"weight/{name}", lora) for name in shapes)
    with new_folder(target) as path:
        made = RunFolder(path)
        step = checkpoints.step_folder(made.checkpoints, manifest.step)
        step.mkdir(parents=True)
        write_checkpoint(step, shapes, tensors, meta, shard_bytes)
        published.write_text(path / "config.yaml", to_yaml(config))
        shutil.copytree(folder.tokenizer, made.tokenizer)
        carry_files(folder.path / CARRIED_FOLDER, path / CARRIED_FOLDER)
        sync_folder(made.checkpoints)

"""A checkpoint into a model of transformers: what training left as it came goes back as the bytes that came."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ... import __version__
from ...data import open_tokenizer
from ...errors import ConfigError
from ...models import convert as published
from ...models import num_params
from ...models.config import LoRAConfig
from ...models.convert.files import DTYPES
from ...parallel import checkpoint as checkpoints
from ...parallel.checkpoint.load import check_fit
from ...parallel.checkpoint.storage import MappedFiles
from ..config import checkpoint_config
from ..trained import find_checkpoint
from .converted import Converted
from .folders import CARRIED_FOLDER, carry_files, new_folder
from .tokenizer import check_vocabulary, tokenizer_note
from .weights import merged_tensor, same_bits

OUTPUT_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class Exporting:
    """A checkpoint on its way into a folder that transformers loads; making one checks the source."""

    def __init__(self, source: Path, dtype: str | None) -> None:
        if dtype not in (None, *OUTPUT_DTYPES):
            raise ConfigError(f"--dtype is {dtype!r}; it must be one of {', '.join(OUTPUT_DTYPES)}")
        self.folder, self.checkpoint = find_checkpoint(source)
        self.manifest = checkpoints.read_manifest(self.checkpoint)
        self.files = MappedFiles(self.checkpoint)
        carried = self.folder.path / CARRIED_FOLDER
        self.originals = published.Weights(carried) if (carried / published.SINGLE).exists() else None
        trained = checkpoint_config(self.manifest.meta).model
        self.lora, self.model = trained.lora, replace(trained, lora=LoRAConfig())
        self.family = published.family_of(self.model)
        self.links = self.family.links(self.model)
        check_fit(self.checkpoint, self.manifest, published.parameter_shapes(trained))
        self.tokenizer = open_tokenizer(self.folder.tokenizer)
        check_vocabulary(self.tokenizer, self.model, self.folder.path)
        came_in = self.manifest.meta.get("converted", {})
        self.dtypes = {
            link.theirs: OUTPUT_DTYPES[dtype] if dtype else came_in.get(link.theirs, "F32") for link in self.links
        }
        # The order of transformers' own files: wide numbers first, then by name.
        self.links.sort(key=lambda link: (-DTYPES[self.dtypes[link.theirs]].itemsize, link.theirs))
        self.rounded = 0

    def write(self, target: Path, shard_bytes: int) -> Converted:
        """Writes the folder `target`: config.json, safetensors, tokenizer files and a model card."""
        entries = [published.Entry(link.theirs, self.dtypes[link.theirs], link.shape) for link in self.links]
        with new_folder(target) as path:
            names = published.write_model(path, entries, map(self._tensor, self.links), shard_bytes)
            carry_files(self.folder.path / CARRIED_FOLDER, path)
            self._write_config(path)
            self._write_tokenizer(path)
            published.write_text(path / "README.md", self._card(target))
            size = sum((path / name).stat().st_size for name in names)
        counts = (num_params(self.model), len(entries), size, self.rounded, 0)
        return Converted(str(self.checkpoint), str(target), "huggingface", self.family.name, *counts, 0.0)

    def _tensor(self, link: published.Link) -> Tensor:
        """The tensor in its dtype; counts those that would not come back as they were."""
        ours = [merged_tensor(self.manifest, self.files, f"weight/{name}", self.lora) for name in link.ours]
        dtype = DTYPES[self.dtypes[link.theirs]]
        if self.originals and link.theirs in self.originals.entries:
            original = self.originals.read(link.theirs)
            if original.dtype == dtype and all(map(same_bits, link.to_ours(original.float()), ours)):
                return original
        theirs = link.to_theirs(ours).to(dtype)
        self.rounded += not all(map(same_bits, link.to_ours(theirs.float()), ours))
        return theirs

    def _write_config(self, path: Path) -> None:
        """The config.json that came with the model where it still describes it, else a new one."""
        commonest = Counter(self.dtypes.values()).most_common(1)[0][0]
        dtype, carried = TORCH_NAMES[commonest], path / "config.json"
        if carried.exists():
            said = published.read_json(carried)
            if said.get("dtype", said.get("torch_dtype")) in (dtype, None):
                return
            carried.unlink()
            said |= {key: dtype for key in ("dtype", "torch_dtype") if key in said}
        else:
            info = self.tokenizer.info
            said = {"architectures": [self.family.architecture], "model_type": self.family.name, "dtype": dtype}
            said |= {"bos_token_id": info.bos_id, "eos_token_id": info.eos_id, "pad_token_id": None}
            said |= self.family.write(self.model)
        published.write_json(carried, said)

    def _write_tokenizer(self, path: Path) -> None:
        """The tokenizer's own file, and what transformers needs to load it, where they did not come along."""
        info = self.tokenizer.info
        if info.file is None or (path / info.file).exists():
            return
        content = (self.folder.tokenizer / info.file).read_text(encoding="utf-8")
        published.write_text(path / info.file, content)
        ids = {token["id"]: token["content"] for token in json.loads(content).get("added_tokens", [])}
        said = {"tokenizer_class": "PreTrainedTokenizerFast"}
        said |= {key: ids[i] for key, i in (("bos_token", info.bos_id), ("eos_token", info.eos_id)) if i in ids}
        published.write_json(path / "tokenizer_config.json", said)

    def _card(self, target: Path) -> str:
        origin = f"Step {self.manifest.step} of the run `{self.folder.path.name}`, converted by longscan {__version__}."
        loading = (
            "```python\n"
            f"from transformers import {self.family.architecture}\n\n"
            f'model = {self.family.architecture}.from_pretrained("{target.name}")\n'
            "```"
        )
        notes = [tokenizer_note(self.tokenizer)]
        return published.model_card(target.name, "transformers", self.family, self.model, origin, loading, notes)

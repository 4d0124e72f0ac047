"""A model of transformers into a run folder: what its weights would not give back bit for bit is kept beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ... import __version__
from ...data import save_tokenizer
from ...durable import sync_folder
from ...models import convert as published
from ...models import num_params
from ...parallel import checkpoint as checkpoints
from ..config import Config, to_yaml
from ..run_folder import RunFolder
from .converted import Converted
from .folders import CARRIED_FOLDER, carry_files, new_folder
from .tokenizer import check_vocabulary, source_tokenizer, tokenizer_note
from .weights import same_bits, write_checkpoint


class Importing:
    """A model of transformers on its way into a run folder with one checkpoint; making one checks the source."""

    def __init__(self, source: Path, tokenizer: str | None) -> None:
        said = published.read_json(source / "config.json")
        self.source = source
        self.family = published.family_named(said, str(source / "config.json"))
        self.model = self.family.config(said)
        self.config = Config(model=self.model)
        self.links = self.family.links(self.model)
        self.weights = published.Weights(source)
        self.stored = published.check_tensors(self.family, self.links, self.weights, str(source))
        self.tokenizer = source_tokenizer(source, said, tokenizer)
        check_vocabulary(self.tokenizer, self.model, source)
        self.shapes = {name: shape for link in self.links for name, shape in zip(link.ours, link.shapes, strict=True)}
        self.drawn: list[str] = []
        self.rounded: list[str] = []

    def write(self, target: Path, shard_bytes: int) -> Converted:
        """Writes the run folder `target`: config.yaml, checkpoints/step-0, the tokenizer and what came with it."""
        meta = {
            "step": 0,
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.info.fingerprint,
            "converted": {link.theirs: self._entry(link).dtype for link in self.links},
            "versions": {"longscan": __version__, "torch": torch.__version__},
        }
        with new_folder(target) as path:
            folder = RunFolder(path)
            checkpoint = checkpoints.step_folder(folder.checkpoints, 0)
            checkpoint.mkdir(parents=True)
            manifest = write_checkpoint(checkpoint, self.shapes, self._tensors(), meta, shard_bytes)
            published.write_text(folder.path / "config.yaml", to_yaml(self.config))
            save_tokenizer(self.tokenizer, folder.tokenizer)
            carry_files(self.source, path / CARRIED_FOLDER)
            self._keep_rounded(path / CARRIED_FOLDER)
            published.write_text(path / "README.md", self._card(target))
            sync_folder(folder.checkpoints)
        size = sum(file.bytes for file in manifest.files)
        counts = (num_params(self.config.model), len(manifest.tensors), size, len(self.rounded), len(self.drawn))
        return Converted(str(self.source), str(target), "longscan", self.family.name, *counts, 0.0)

    def _entry(self, link: published.Link) -> published.Entry:
        return self.weights.entries[self.stored[link.theirs]]

    def read(self, link: published.Link) -> list[Tensor]:
        """The parameters of `link` in fp32."""
        return link.to_ours(self.weights.read(self.stored[link.theirs]).float())

    def _tensors(self) -> Iterator[Tensor]:
        """The parameters in fp32, in the order of `shapes`; notes those that would not come back as they were."""
        for link in self.links:
            theirs = self.weights.read(self.stored[link.theirs])
            ours = link.to_ours(theirs.float())
            if not same_bits(link.to_theirs(ours).to(theirs.dtype), theirs):
                self.rounded.append(link.theirs)
            yield from ours

    def _keep_rounded(self, folder: Path) -> None:
        if self.rounded:
            entries = [replace(self.weights.entries[self.stored[name]], name=name) for name in self.rounded]
            tensors = (self.weights.read(self.stored[name]) for name in self.rounded)
            published.write_file(folder / published.SINGLE, entries, tensors)

    def _card(self, target: Path) -> str:
        origin = f"Converted by longscan {__version__} from the {self.family.architecture} in `{self.source.name}`."
        loading = "\n".join(("```sh", *self._commands(target.name), "```"))
        notes = ["One checkpoint of fp32 weights, without optimizer state.", tokenizer_note(self.tokenizer)]
        notes += self._remarks()
        return published.model_card(target.name, "longscan", self.family, self.config.model, origin, loading, notes)

    def _commands(self, name: str) -> list[str]:
        """What to do with it."""
        return [
            f"longscan generate {name} 'Once upon a time'",
            training_command(name, "{seq_len: 8192, tokens: 1B}"),
            f"longscan convert {name} NEW_FOLDER",
        ]

    def _remarks(self) -> list[str]:
        """Further sentences for the card."""
        return []


def training_command(name: str, *stages: str) -> str:
    """The command that trains on from the run folder `name`."""
    return f"longscan train {name} data.corpora=CORPUS 'stages=[{', '.join(stages)}]' --init-from {name} --run NEW_RUN"

"""`longscan convert`: models of transformers into run folders, and checkpoints into models of transformers.

A Llama becomes a transformer, or its linearized twin with what that adds as training would begin with it.
One tensor is in memory at a time. Invariant: everything that can be wrong with the source is said before anything is
written, and the target is whole or absent; what exists is never written over.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import __version__
from ..data import Tokenizer, load_tokenizer, open_tokenizer, save_tokenizer
from ..durable import sync, sync_folder
from ..errors import ConfigError, UserError
from ..models import ModelConfig, num_params
from ..models import convert as published
from ..models.config import LoRAConfig
from ..models.convert.files import DTYPES
from ..models.linearize import added_parameters, first_values, twin_config
from ..parallel import checkpoint as checkpoints
from ..parallel.checkpoint.boxes import Box
from ..parallel.checkpoint.load import check_fit
from ..parallel.checkpoint.manifest import MANIFEST, Chunk, DataFile, Manifest, write_manifest
from ..parallel.checkpoint.storage import MappedFiles, narrow
from .config import Config, RunConfig, checkpoint_config, flatten, resolve, to_yaml
from .run_folder import RunFolder
from .trained import find_checkpoint

DIRECTIONS = ("huggingface", "longscan")
OUTPUT_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
SHARD_BYTES = 5 * 10**9
# Rows of the embedding beyond the tokenizer's ids: padding for divisibility, and no sign of another tokenizer.
PADDING = 1024
# The family that can be linearized, the configuration that says how by default, and what may be said otherwise of a
# twin that is not trained.
LINEARIZABLE = "llama"
LINEARIZE = "linearize"
TWIN_KEYS = ("model.linearized_attention.", "run.seed=")
# Where a run folder keeps what came with the model and is no part of it here, and the tensors that its weights would
# not give back bit for bit, as they came.
CARRIED_FOLDER = "huggingface"
CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    `rounded` counts the tensors of which it does not hold every bit, `drawn` those that a twin adds to its teacher.
    """

    source: str
    target: str
    to: str
    family: str
    parameters: int
    tensors: int
    bytes: int
    rounded: int
    drawn: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)

    def show(self, console: Console) -> None:
        """Prints where the model is, its size, whether bits were lost, and what is not trained."""
        size = f"{self.parameters:,} parameters in {self.tensors} tensors, {self.bytes / 2**20:,.1f} MiB"
        console.print(f"{self.target} ({self.family}): {size}, {self.seconds:.1f} s", markup=False, soft_wrap=True)
        if self.rounded:
            console.print(f"{self.rounded} tensors were rounded")
        if self.drawn:
            console.print(f"{self.drawn} tensors are the twin's own: drawn from run.seed, not trained")


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


def training_command(name: str, *stages: str) -> str:
    """The command that trains on from the run folder `name`."""
    return f"longscan train {name} data.corpora=CORPUS 'stages=[{', '.join(stages)}]' --init-from {name} --run NEW_RUN"


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


def source_tokenizer(source: Path, said: dict[str, Any], name: str | None) -> Tokenizer:
    """The tokenizer `name`, else the source's, with the begin and end of document that config.json says."""
    if name == "bytes":
        return load_tokenizer(name)
    if name is None and not (source / "tokenizer.json").exists():
        raise ConfigError(
            f"{source} has no tokenizer.json; save it with transformers' AutoTokenizer, or give --tokenizer (a "
            "tokenizer.json, or bytes)"
        )
    file = Path(name) if name else source / "tokenizer.json"
    bos, eos = (_special(file, key, said.get(key)) for key in ("bos_token_id", "eos_token_id"))
    return load_tokenizer(str(file), bos, eos)


def _special(file: Path, key: str, said: int | list[int] | None) -> str | None:
    """The token whose id config.json gives under `key`, the first where it gives several; None where it gives none."""
    from tokenizers import Tokenizer as Engine

    wanted = said[0] if isinstance(said, list) and said else said
    if wanted is None:
        return None
    try:
        engine = Engine.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file} is not a Hugging Face tokenizer.json ({error})") from error
    if not isinstance(wanted, int) or not 0 <= wanted < 2**32 or (token := engine.id_to_token(wanted)) is None:
        raise ConfigError(f"config.json says {key}={said!r}, an id that {file} does not have; give the model's own")
    return token


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig, where: Path) -> None:
    """Returns nothing; ConfigError where the embedding was not made for that tokenizer."""
    rows, ids = model.vocab_size, tokenizer.info.vocab_size
    if not ids <= rows <= ids + PADDING:
        raise ConfigError(
            f"{where}: the embedding has {rows} rows and the tokenizer {ids} tokens, so one is not the other's "
            f"(up to {PADDING} rows more are taken for padding); put the model's own tokenizer.json there"
        )


def tokenizer_note(tokenizer: Tokenizer) -> str:
    """A sentence on how text becomes ids."""
    info = tokenizer.info
    if info.kind == "bytes":
        return "Ids are the bytes of UTF-8; 256 begins and ends a document. There are no tokenizer files."
    return f"Ids are tokenizer.json's ({info.vocab_size:,}); {info.bos_id} begins a document and {info.eos_id} ends it."


def carry_files(source: Path, target: Path) -> None:
    """Copies the files of CARRIED that `source` has into `target`, durably."""
    found = [path for pattern in CARRIED for path in sorted(source.glob(pattern)) if path.is_file()]
    if found:
        target.mkdir(exist_ok=True)
    for path in found:
        with open(path, "rb") as original, open(target / path.name, "xb") as copy:
            shutil.copyfileobj(original, copy)
            sync(copy)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder under a temporary name that becomes `target` when the block ends well, and is removed when not."""
    unfinished = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for folder in (unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())):
            sync_folder(folder)
        if target.exists():
            raise ConfigError(f"{target} has come to exist meanwhile and is never written over; name another folder")
        unfinished.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; nothing is left of it") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

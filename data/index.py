"""What a prepared corpus consists of: its manifest, and per shard the table of document offsets and lengths.

A corpus is a folder (or URL) with `manifest.json`, one WebDataset tar per shard and beside each tar a `.npy` table.
Everything about order, packing and resume is computed from these tables; token bytes are read only to fill rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError

FORMAT = 1
MANIFEST = "manifest.json"

# One row a document: where its tokens begin in the shard's tar (bytes), how many tokens it has, and how many bytes of
# source text they stand for. Tokens are little-endian unsigned integers of the manifest's dtype, without separators.
DOCUMENT = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("bytes", "<u4")])


# Where an unfinished preparation keeps its plan and finished units; gone from a finished corpus.
WORK_FOLDER = ".prepare"


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids. `file` lies beside the manifest; it is None for raw bytes."""

    kind: str
    file: str | None
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    @property
    def dtype(self) -> str:
        """The smallest dtype that holds every stored id; the byte tokenizer's 256 is never stored."""
        if self.kind == "bytes":
            return "uint8"
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ShardInfo:
    """One shard: paths relative to the corpus, totals, and the checksums of both files."""

    file: str
    index: str
    documents: int
    tokens: int
    bytes: int
    size: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, in the order they were written."""

    shards: tuple[ShardInfo, ...]

    @property
    def documents(self) -> int:
        """How many documents the split holds."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Stored tokens; a row adds one begin-of-document token to each document."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """How many bytes of source text the stored tokens stand for."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus as its manifest states it."""

    location: str
    tokenizer: TokenizerInfo
    dtype: str
    splits: dict[str, Split]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which tokens a document holds; the location is not part of it."""
        return hashlib.sha256(json.dumps(self.to_manifest(), sort_keys=True).encode()).hexdigest()[:16]

    def url(self, file: str) -> str:
        """Where one of the corpus's files is: a local path, or what webdataset's gopen opens."""
        return file_url(self.location, file)

    def to_manifest(self) -> dict[str, Any]:
        """The manifest's fields that define the corpus (a written manifest may carry more, for people to read)."""
        return {
            "format": FORMAT,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "dtype": self.dtype,
            "splits": {
                name: [dataclasses.asdict(shard) for shard in split.shards] for name, split in self.splits.items()
            },
        }

    @staticmethod
    def from_manifest(location: str, manifest: dict[str, Any]) -> Corpus:
        """Builds the corpus from a parsed manifest; raises ConfigError where it is not one of ours."""
        if manifest.get("format") != FORMAT:
            raise ConfigError(
                f"{location} holds a corpus of format {manifest.get('format')!r}; this version reads {FORMAT}. "
                "Prepare it again with `longscan prepare`."
            )
        try:
            splits = {
                name: Split(tuple(ShardInfo(**shard) for shard in shards))
                for name, shards in manifest["splits"].items()
            }
            return Corpus(location, TokenizerInfo(**manifest["tokenizer"]), manifest["dtype"], splits)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{location}/{MANIFEST} is damaged ({error}); prepare the corpus again.") from error


def open_corpus(location: str | Path) -> Corpus:
    """Returns the corpus at `location`: a local folder, or any URL that webdataset's gopen opens.

    A URL is the folder's (`http://host/corpus`, `file:/data/corpus`). In a `pipe:` URL `{}` stands for the file's name
    (`pipe:ssh host cat /data/corpus/{}`); without `{}` the name is appended after a slash.

    Raises:
        ConfigError: nothing is there, it cannot be read, or it is no corpus of this format.
    """
    location = str(location)
    try:
        manifest = json.loads(read_url(file_url(location, MANIFEST)))
    except OSError as error:
        raise ConfigError(_why_unreadable(location, error)) from error
    except ValueError as error:
        raise ConfigError(f"{location}/{MANIFEST} is damaged ({error}); prepare the corpus again.") from error
    if not isinstance(manifest, dict):
        raise ConfigError(
            f"{location}/{MANIFEST} is not a corpus manifest; prepare the corpus with `longscan prepare`."
        )
    return Corpus.from_manifest(location, manifest)


def is_url(location: str) -> bool:
    """Whether `location` goes through gopen rather than the file system."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", location) is not None


def file_url(location: str, file: str) -> str:
    """The path or URL of `file` in the corpus folder at `location`."""
    if location.startswith("pipe:") and "{}" in location:
        return location.replace("{}", file)
    return f"{location.rstrip('/')}/{file}"


def read_url(url: str) -> bytes:
    """The whole content behind a path or URL; OSError where it cannot be had."""
    if not is_url(url):
        return Path(url).read_bytes()
    from webdataset.gopen import gopen  # takes a second to import; local corpora do without

    try:
        with gopen(url) as stream:
            return stream.read()
    except ValueError as error:
        raise OSError(f"no way to open {url}: {error}") from error


def _why_unreadable(location: str, error: OSError) -> str:
    """One sentence on why no manifest could be read at `location`, with the remedy."""
    if is_url(location):
        return f"cannot read {file_url(location, MANIFEST)}: {error}; check the URL, or `longscan prepare` the corpus."
    folder = Path(location)
    if (folder / WORK_FOLDER).is_dir():
        return f"the corpus {location} is not finished; run the `longscan prepare` command that began it again."
    if not folder.exists():
        return f"there is no corpus at {location}; check the path, or make it with `longscan prepare`."
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{location} holds no corpus (no {MANIFEST}); check the path, or make it with `longscan prepare`."
    return f"cannot read {location}/{MANIFEST}: {error.strerror or error}; check its permissions."

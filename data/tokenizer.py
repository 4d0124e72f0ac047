"""Tokenizers: raw bytes, or any Hugging Face `tokenizer.json`.

Encoding gives the text's own tokens and nothing else: no special token is added, and text that spells one
(`<|endoftext|>` in a web page) is encoded as the letters it is. So no stored id equals bos_id or eos_id by accident.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..durable import write_durably
from ..errors import ConfigError
from .index import Corpus, TokenizerInfo, read_url

TOKENIZER_FILE = "tokenizer.json"
INFO_FILE = "info.json"
BYTES = TokenizerInfo(kind="bytes", file=None, vocab_size=257, bos_id=256, eos_id=256, fingerprint="bytes")

_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")

# `tokenizers` keeps about 110 bytes for each byte of the text it encodes; longer texts are encoded in pieces.
_PIECE_CHARACTERS = 8 << 20


class Tokenizer(ABC):
    """Text to ids and back; `info` is what a corpus manifest records of it."""

    info: TokenizerInfo

    @property
    def dtype(self) -> str:
        """The dtype of encoded ids."""
        return self.info.dtype

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text."""
        return self.encode_documents([text.encode()])[0]

    @abstractmethod
    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of many texts, each valid UTF-8, as arrays of `dtype`."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for; begin and end of document are left out, broken UTF-8 becomes U+FFFD."""


class ByteTokenizer(Tokenizer):
    """An id a byte of UTF-8."""

    info = BYTES

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The bytes themselves, without a copy."""
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the bytes spell."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """What a `tokenizer.json` does to text, less its truncation, its padding and its added special tokens.

    A text above 8 Mi characters is encoded in pieces that end at a newline between two letters, digits or signs. A
    byte-level BPE gives the same ids as for the whole; one that marks the beginning of a text marks each piece.
    """

    def __init__(self, content: bytes, info: TokenizerInfo):
        from tokenizers import Tokenizer as Engine

        self.info, self.content = info, content
        self._engine = Engine.from_str(content.decode())
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text; the library spreads the batch over threads unless TOKENIZERS_PARALLELISM is false."""
        strings = [text.decode() for text in texts]
        if max(map(len, strings), default=0) > _PIECE_CHARACTERS:
            return [self._encode_in_pieces(text) for text in strings]
        return self._encode(strings)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens left out."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=True)

    def _encode(self, strings: list[str]) -> list[np.ndarray]:
        encodings = self._engine.encode_batch_fast(strings, add_special_tokens=False)
        return [np.fromiter(encoding.ids, self.dtype, len(encoding)) for encoding in encodings]

    def _encode_in_pieces(self, text: str) -> np.ndarray:
        return np.concatenate([self._encode([piece])[0] for piece in _pieces(text, _PIECE_CHARACTERS)])


def load_tokenizer(name: str, bos: str | None = None, eos: str | None = None) -> Tokenizer:
    """Returns the tokenizer called `name`: "bytes", a `tokenizer.json`, or a folder that holds one.

    Args:
        name: which tokenizer.
        bos: the token put before a document; found under its usual names where None.
        eos: the token predicted at a document's end; likewise.

    Raises:
        ConfigError: no such file, not a tokenizer, or no begin and end of document known.
    """
    if name == "bytes":
        if bos or eos:
            raise ConfigError(
                "the byte tokenizer has its own begin and end of document (256): leave --bos and --eos out."
            )
        return ByteTokenizer()
    content = read_tokenizer_file(name)
    return HuggingFaceTokenizer(content, describe_tokenizer(content, name, bos, eos))


def read_tokenizer_file(name: str) -> bytes:
    """The content of a `tokenizer.json`, given its path or its folder's."""
    path = Path(name)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the tokenizer {path}: {error.strerror}; give `bytes` or the path of a tokenizer.json."
        ) from error


def corpus_tokenizer(corpus: Corpus) -> Tokenizer:
    """Returns the tokenizer a corpus was made with, from the file beside its manifest."""
    info = corpus.tokenizer
    if info.file is None:
        return ByteTokenizer()
    where = corpus.url(info.file)
    try:
        content = read_url(where)
    except OSError as error:
        raise ConfigError(f"cannot read {where}: {error}; the corpus is incomplete, prepare it again.") from error
    if _fingerprint(content) != info.fingerprint:
        raise ConfigError(f"{where} is not the tokenizer that made the corpus ({info.fingerprint}); put that one back.")
    return HuggingFaceTokenizer(content, info)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Puts into `folder` what `open_tokenizer` needs, unless it is there."""
    if (folder / INFO_FILE).exists():
        return
    folder.mkdir(exist_ok=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        write_durably(folder / TOKENIZER_FILE, tokenizer.content)
    write_durably(folder / INFO_FILE, json.dumps(asdict(tokenizer.info)).encode())


def open_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer that `save_tokenizer` put into `folder`; ConfigError where it is not whole."""
    try:
        info = TokenizerInfo(**json.loads((folder / INFO_FILE).read_bytes()))
        content = b"" if info.kind == "bytes" else (folder / TOKENIZER_FILE).read_bytes()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot read the tokenizer in {folder}: {error}; copy it from the run it belongs to."
        ) from error
    if info.kind == "bytes":
        return ByteTokenizer()
    if _fingerprint(content) != info.fingerprint:
        raise ConfigError(f"{folder / TOKENIZER_FILE} is not {info.fingerprint}; copy it from the run it belongs to.")
    return HuggingFaceTokenizer(content, info)


def describe_tokenizer(content: bytes, where: str, bos: str | None, eos: str | None) -> TokenizerInfo:
    """Returns what a manifest records of the `tokenizer.json` whose content is given; ConfigError where it is none."""
    from tokenizers import Tokenizer as Engine

    try:
        vocabulary = Engine.from_str(content.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{where} is not a Hugging Face tokenizer.json ({error}).") from error
    bos_id, eos_id = _special_ids(vocabulary, bos, eos, where)
    return TokenizerInfo(
        kind="huggingface",
        file=TOKENIZER_FILE,
        vocab_size=max(vocabulary.values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        fingerprint=_fingerprint(content),
    )


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _special_ids(vocabulary: dict[str, int], bos: str | None, eos: str | None, where: str) -> tuple[int, int]:
    """The ids of begin and end of document: those asked for, else those of the usual names, one serving for both."""
    for option, token in (("--bos", bos), ("--eos", eos)):
        if token is not None and token not in vocabulary:
            raise ConfigError(f"{option} {token!r} is not in the vocabulary of {where}; name one of its tokens.")
    bos = bos or next((name for name in _BOS_NAMES if name in vocabulary), None)
    eos = eos or next((name for name in _EOS_NAMES if name in vocabulary), None)
    bos, eos = bos or eos, eos or bos
    if bos is None or eos is None:
        usual = ", ".join(_EOS_NAMES + _BOS_NAMES)
        raise ConfigError(f"{where} has no token that marks a document's end ({usual}); name one with --eos.")
    return vocabulary[bos], vocabulary[eos]


def _pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of about `size` characters, cut only after a newline with no space on either side of it."""
    begin = 0
    boundary = re.compile(r"(?<=\S)\n(?=\S)")
    while len(text) - begin > size:
        cut = boundary.search(text, begin + size)
        if cut is None:
            break
        yield text[begin : cut.end()]
        begin = cut.end()
    yield text[begin:]

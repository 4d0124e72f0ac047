"""The tokenizer that a model came with, and whether its embedding was made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data import Tokenizer, load_tokenizer
from ...errors import ConfigError
from ...models import ModelConfig

# Rows of the embedding beyond the tokenizer's ids: padding for divisibility, and no sign of another tokenizer.
PADDING = 1024


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

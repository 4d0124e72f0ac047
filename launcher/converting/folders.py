"""The folder that a conversion makes is whole or absent, and what came with a model goes along with it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...durable import sync, sync_folder
from ...errors import ConfigError, UserError

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

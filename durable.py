"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Puts `data` at `path` in one step: after a crash at any moment the file is the old one or the new one.

    A crash may leave a temporary file, in the folder `scratch` of the same disk (beside `path` where None).
    """
    temporary = (scratch or path.parent) / f"{path.name}.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync(file) -> None:
    """Returns once everything written to the open `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Returns once the names in a folder (renames, new files) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

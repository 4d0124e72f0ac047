"""The run folder: where a run keeps its configuration, its records and its checkpoints.

It knows no training. Invariant: nothing in it is ever rewritten. A record is one fsync'd line; a step run again is a
new line with a higher incarnation, and the highest stands; a changed configuration is a further file, and the newest
stands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable import sync, sync_folder
from ..errors import ConfigError, UserError

LOCK = ".lock"
# What a start that was killed before config.yaml was written may have left.
OWN = {LOCK, "checkpoints", "tensorboard", "evals"}


class JsonLines:
    """One append-only file of JSON objects, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds `record` and returns once it is on disk.

        A number that is not finite is written as null. A line left torn by a crash is closed first, so that it never
        swallows the new one. Costs one fsync.
        """
        record = {key: None if _not_finite(value) else value for key, value in record.items()}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        created = not self.path.exists()
        handle = _open_or_say(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(handle, line) != len(line):
                raise UserError(f"cannot write to {self.path}: the disk is full. Free some space and start again.")
            os.fsync(handle)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}.") from error
        finally:
            os.close(handle)
        if created:
            sync_folder(self.path.parent)

    def read(self) -> list[dict[str, Any]]:
        """Every whole record in the order written; a torn line is left out with a warning that names it."""
        if not self.path.exists():
            return []
        records = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                warnings.warn(f"{self.path}:{number} is not a whole record and is left out", stacklevel=2)
        return records

    def standing(self, key: str = "step") -> list[dict[str, Any]]:
        """The records that stand, by rising `key`: of each step the line of the highest incarnation."""
        return standing(self.read(), key)


def standing(records: Iterable[dict[str, Any]], key: str = "step") -> list[dict[str, Any]]:
    """Of each value of `key` the record of the highest incarnation (of equals the last written), by rising `key`."""
    best: dict[Any, dict[str, Any]] = {}
    for record in records:
        known = best.get(record[key])
        if known is None or record.get("incarnation", 0) >= known.get("incarnation", 0):
            best[record[key]] = record
    return [best[value] for value in sorted(best)]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; `create` and `open` give one that is there."""

    path: Path

    @staticmethod
    def create(path: str | os.PathLike[str], *, fresh: bool = False) -> RunFolder:
        """The run folder at `path`, made if it is not there, entered if it holds a run.

        With `fresh` a folder whose run took a step is refused; a folder that holds something else always is.
        """
        folder = RunFolder(Path(path))
        if fresh and folder.exists and folder.began:
            raise ConfigError(
                f"{path} already holds a run and --fresh never overwrites one; "
                "choose another folder with --run, or leave out --fresh to resume it."
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            strangers = sorted({entry.name for entry in folder.path.iterdir()} - OWN)
            if strangers and not folder.exists:
                raise ConfigError(
                    f"{path} holds {strangers[0]} but no config.yaml, so it is no run folder; choose one with --run."
                )
            for part in (folder.checkpoints, folder.tensorboard, folder.evals):
                part.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}.") from error
        return folder

    @staticmethod
    def open(path: str | os.PathLike[str]) -> RunFolder:
        """The existing run folder at `path`."""
        folder = RunFolder(Path(path))
        if not folder.exists:
            what = "holds no run (no config.yaml)" if folder.path.is_dir() else "does not exist"
            raise ConfigError(f"{path} {what}; name the folder that `longscan train` wrote.")
        return folder

    @property
    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return (self.path / "config.yaml").is_file()

    @property
    def began(self) -> bool:
        """Whether the run took a step; one that failed before has only its configuration."""
        return self.metrics.path.is_file() or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    @property
    def config_file(self) -> Path:
        """The configuration that stands: the newest of config.yaml, config-2.yaml, ..."""
        return self._config_files()[-1]

    @property
    def metrics(self) -> JsonLines:
        """One object a step."""
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def ledger(self) -> JsonLines:
        """Which rows entered which step."""
        return JsonLines(self.path / "ledger.jsonl")

    @property
    def events(self) -> JsonLines:
        """What happened to the run: starts, saves, faults, stops."""
        return JsonLines(self.path / "events.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Where `step-N` folders lie."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the model was trained with, so that the run can be read without its corpus."""
        return self.path / "tokenizer"

    @property
    def evals(self) -> Path:
        """Results of evaluations."""
        return self.path / "evals"

    def save_config(self, text: str) -> Path:
        """Writes the configuration unless it is the one that stands; returns the file that holds it."""
        known = self._config_files()
        if known and known[-1].read_text(encoding="utf-8") == text:
            return known[-1]
        return write_new(self.path / (f"config-{len(known) + 1}.yaml" if known else "config.yaml"), text)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; refuses while another holds it, naming its pid."""
        handle = _open_or_say(self.path / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{self.path} is in use by {owner}; wait for it, stop it, or choose another folder with --run."
                ) from error
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def _config_files(self) -> list[Path]:
        later = [file for file in self.path.glob("config-*.yaml") if file.stem[7:].isdigit()]
        first = [self.path / "config.yaml"] if self.exists else []
        return first + sorted(later, key=lambda file: int(file.stem[7:]))


def _open_or_say(path: Path, flags: int) -> int:
    """The file descriptor of `path`; UserError where it may not be written."""
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; give a run folder you may write.") from error


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def write_new(path: Path, text: str) -> Path:
    """Writes a file that was not there, whole or not at all: temporary name, fsync, link, which never replaces."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        os.link(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path

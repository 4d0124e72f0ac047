"""A run's checkpoints folder: which steps are there, which is the newest that is whole, which may go.

`step-N` is a checkpoint; `step-N.tmp-<unique>` is one being written or removed, or what a dead run left of that.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from ...durable import sync_folder
from ...errors import UserError
from .manifest import verify

_STEP = re.compile(r"step-(\d+)")
_UNFINISHED = re.compile(r"step-\d+\.tmp-[0-9a-f]+")


def step_folder(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of `step` lies."""
    return folder / f"step-{step}"


def unfinished_folder(folder: Path, step: int) -> Path:
    """Returns a name of its own for a checkpoint that is being written or removed."""
    return folder / f"step-{step}.tmp-{uuid.uuid4().hex[:12]}"


def list_steps(folder: Path | str) -> list[int]:
    """Returns the steps that have a checkpoint, whole or not, in ascending order."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)))


def find_latest(
    folder: Path | str, steps: list[int] | None = None, check: Callable[[Path], object] = verify
) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that verifies, None where there is none, and a warning for each one passed over.

    Args:
        folder: the checkpoints folder.
        steps: those to look at, ascending; by default all that are there.
        check: raises UserError for a checkpoint that is damaged.
    """
    warnings = []
    for step in reversed(list_steps(folder) if steps is None else steps):
        path = step_folder(Path(folder), step)
        try:
            check(path)
        except UserError as error:
            warnings.append(f"checkpoint {path.name} is passed over: {error}")
        else:
            return path, warnings
    return None, warnings


def publish(unfinished: Path, folder: Path, step: int) -> Path:
    """Renames a finished checkpoint to its place and returns that; one already there steps aside and is removed.

    That one is either damaged or the same step of this run, taken again after going back to an older checkpoint.
    """
    path = step_folder(folder, step)
    aside = unfinished_folder(folder, step)
    if path.exists():
        path.rename(aside)
    unfinished.rename(path)
    sync_folder(folder)
    shutil.rmtree(aside, ignore_errors=True)
    return path


def prune(folder: Path | str, keep_last: int, keep_every: int = 0, newest_valid: Path | None = None) -> list[int]:
    """Removes checkpoints and what dead runs left unfinished; returns the steps removed.

    Kept are the newest `keep_last` (0 keeps all), each step that `keep_every` divides (0: none for this reason) and
    always the newest one that is whole. Call it while nothing is being saved here.

    Args:
        folder: the checkpoints folder.
        keep_last, keep_every: what to keep.
        newest_valid: that checkpoint, where the caller has just written or verified it; else it is looked for.
    """
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    steps = list_steps(folder)
    going = [s for s in steps[:-keep_last] if not (keep_every and s % keep_every == 0)] if keep_last else []
    if going:
        valid = newest_valid or find_latest(folder)[0]
        going = [step for step in going if valid != step_folder(folder, step)]
    for step in going:
        doomed = unfinished_folder(folder, step)
        step_folder(folder, step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return going

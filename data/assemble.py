"""The last step of a preparation: finished units become a corpus.

Each move is done once or found done, so that a kill at any point loses nothing; the manifest is written last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..durable import sync, sync_folder, write_durably
from ..errors import UserError
from .index import MANIFEST, Corpus, ShardInfo, Split
from .sources import Skipped
from .tokenizer import TOKENIZER_FILE
from .units import HELDOUT, SKIPPED, TRAIN, Job, Record, Unit, folder_name, merge_shards, read_record, skipped_line

LOG = "prepare.log.jsonl"
PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What a preparation will do, worked out from its arguments and the look of its inputs.

    `skipped` is what was found unreadable while planning; the rest is skipped, and logged, by the units.
    """

    arguments: dict[str, Any]
    inputs: str
    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as it is written down: some sixty bytes a file, so that ten million files fit in memory."""
        units = [[(piece.file.name, piece.begin, piece.end) for piece in unit.slices] for unit in self.units]
        return {"arguments": self.arguments, "inputs": self.inputs, "units": units}


def assemble(output: Path, job: Job, plan: Plan, records: Sequence[Record]) -> tuple[Corpus, dict[str, int]]:
    """Returns the finished corpus and what was skipped by reason; the work folder is gone afterwards.

    Args:
        output: the corpus folder, `job.work` in it.
        job: what the units shared.
        plan: what was to be done.
        records: what each unit did, in their order.

    Raises:
        UserError: no document came out of it.
    """
    skipped = _count_skipped(plan, records)
    if not any(record.documents(split) for record in records for split in (TRAIN, HELDOUT)):
        _give_up(output, job, plan, skipped)
    splits = {
        TRAIN: _install(output, TRAIN, _parts(job, records, TRAIN)),
        HELDOUT: _install(output, HELDOUT, _merged_heldout(job, records)),
    }
    if job.tokenizer.file:
        write_durably(output / TOKENIZER_FILE, (job.work / TOKENIZER_FILE).read_bytes(), scratch=job.work)
    if skipped:
        _install_log(output, job, plan)
    corpus = Corpus(str(output), job.tokenizer, job.tokenizer.dtype, splits)
    manifest = corpus.to_manifest() | {
        "counts": {
            "documents": sum(split.documents for split in splits.values()),
            "tokens": sum(split.tokens for split in splits.values()),
            "bytes": sum(split.bytes for split in splits.values()),
            "skipped": skipped,
        },
        "prepared": {"arguments": plan.arguments, "inputs": plan.inputs},
    }
    write_durably(output / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode(), scratch=job.work)
    shutil.rmtree(job.work)
    return corpus, skipped


def _count_skipped(plan: Plan, records: Sequence[Record]) -> dict[str, int]:
    """How many documents were skipped for each reason."""
    counts = Counter(item.reason for item in plan.skipped)
    for record in records:
        counts.update(record.skipped)
    return dict(sorted(counts.items()))


def _give_up(output: Path, job: Job, plan: Plan, skipped: dict[str, int]) -> NoReturn:
    """Leaves nothing behind and says why there is no corpus."""
    example = next(_log_lines(job, plan), b"").decode().strip()
    (job.work / PLAN).unlink()  # first: a kill while the rest is removed must not leave units that look finished
    shutil.rmtree(job.work)
    if not any(output.iterdir()):
        output.rmdir()
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "nothing to read"
    raise UserError(
        f"no document in {', '.join(plan.arguments['sources'])} (skipped: {reasons}{'; the first: ' if example else ''}"
        f"{example}); check the path, and --field for JSON lines and Parquet."
    )


def _parts(job: Job, records: Sequence[Record], split: str) -> list[tuple[Path, ShardInfo]]:
    """The shards of a split as the units made them, each with its folder."""
    return [
        (job.work / folder_name(number), shard)
        for number, record in enumerate(records)
        for shard in record.splits[split]
    ]


def _merged_heldout(job: Job, records: Sequence[Record]) -> list[tuple[Path, ShardInfo]]:
    """The held-out shards; where there is a little one from each unit, their documents in shards of full size."""
    parts = _parts(job, records, HELDOUT)
    if len(parts) < 2:
        return parts
    folder = job.work / "merged"
    record = read_record(folder)
    if record is None:
        merge_shards(job, parts, job.tokenizer.dtype, folder)
        record = read_record(folder)
        assert record is not None
    return [(folder, shard) for shard in record.splits[HELDOUT]]


def _install(output: Path, split: str, parts: Sequence[tuple[Path, ShardInfo]]) -> Split:
    """Moves the shards to `<split>/00000.tar` and so on, those that are not there yet."""
    folder = output / split
    folder.mkdir(exist_ok=True)
    shards = []
    for number, (source, shard) in enumerate(parts):
        named = dataclasses.replace(shard, file=f"{split}/{number:05d}.tar", index=f"{split}/{number:05d}.npy")
        for old, new in ((shard.file, named.file), (shard.index, named.index)):
            if (source / old).exists():
                os.replace(source / old, output / new)
        shards.append(named)
    sync_folder(folder)
    sync_folder(output)
    return Split(tuple(shards))


def _install_log(output: Path, job: Job, plan: Plan) -> None:
    """Writes the log of everything that was skipped."""
    path = job.work / LOG
    with open(path, "wb") as log:
        log.writelines(_log_lines(job, plan))
        sync(log)
    os.replace(path, output / LOG)


def _log_lines(job: Job, plan: Plan) -> Iterator[bytes]:
    """What was skipped while planning, then by each unit in turn."""
    yield from map(skipped_line, plan.skipped)
    for unit in plan.units:
        with open(job.work / folder_name(unit.number) / SKIPPED, "rb") as log:
            yield from log

"""Preparation: text to a corpus of token shards, by many processes, from wherever it was killed.

The output depends on the input and the arguments alone. The work is cut into numbered units and written down first
(`.prepare/plan.json`); each unit is done whole or not at all (units.py); when all are there their shards get their
names, and `manifest.json` comes last. A folder without manifest is no corpus, and the same command goes on with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..durable import write_durably
from ..errors import ConfigError, UserError
from .assemble import PLAN, Plan, assemble
from .bpe import SMALLEST_BPE, sample_texts, train_byte_level_bpe
from .encoded import check_ids
from .index import MANIFEST, WORK_FOLDER, Corpus, Split, TokenizerInfo, open_corpus
from .sources import ALL_FILES, ID_KINDS, STDLIB, EncodedDocument, cut, find_files, read_slice
from .tokenizer import BYTES, TOKENIZER_FILE, describe_tokenizer, load_tokenizer, read_tokenizer_file
from .units import (
    HELDOUT,
    TRAIN,
    Job,
    Record,
    Unit,
    folder_name,
    full_disk,
    is_full,
    read_record,
    run_unit,
)
from .workers import Progress, run_units

SHARD_BYTES = 64 << 20
LOCK = "lock"

# Places at which ids are held against the tokenizer before anything is written, and documents looked at in each.
_LOOKS = 32

# Text that keeps a process busy for a few seconds, which is what it takes to start one.
_WORTH_A_PROCESS = {"bytes": 256 << 20, "huggingface": 8 << 20}


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation made: totals by split, what was skipped by reason, and how long it took."""

    corpus: Corpus
    skipped: dict[str, int]
    seconds: float
    already_there: bool = False

    @property
    def splits(self) -> dict[str, Split]:
        """The corpus's splits, with their documents, tokens and bytes."""
        return self.corpus.splits

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON, for `--json`."""
        totals = {
            name: {
                "shards": len(split.shards),
                "documents": split.documents,
                "tokens": split.tokens,
                "bytes": split.bytes,
            }
            for name, split in self.splits.items()
        }
        return {
            "corpus": self.corpus.location,
            "tokenizer": dataclasses.asdict(self.corpus.tokenizer),
            "splits": totals,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "already_there": self.already_there,
        }


def prepare_corpus(
    sources: Sequence[str],
    output: str | Path,
    *,
    tokenizer: str = "bytes",
    train_bpe: int | None = None,
    bos: str | None = None,
    eos: str | None = None,
    field: str = "text",
    pattern: str = ALL_FILES,
    heldout: float = 0.02,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Returns what it made of the sources: a corpus in the folder `output`, begun or gone on with.

    Args:
        sources: each `python-stdlib`, a folder, a glob, or a file: text, `.jsonl`, `.jsonl.gz`, `.parquet`, MDS shards,
            or Megatron's `.bin` with `.idx`.
        output: a folder that is new, empty, or holds this very preparation.
        tokenizer: "bytes", or the path of a Hugging Face `tokenizer.json`: for sources that hold ids, the one that made
            them.
        train_bpe: instead, the vocabulary size of a byte-level BPE to train on the sources first.
        bos: the token put before each document, where the tokenizer calls it by no usual name.
        eos: the token predicted at each document's end, likewise.
        field: the JSON field, Parquet or MDS column that holds the text; an MDS column may also hold ids.
        pattern: which files of a folder to take.
        heldout: the share of documents kept for evaluation, chosen by a hash of their names.
        shard_bytes: how many bytes of tokens a shard aims at.
        workers: how many processes; where None, as many as there are cores and the input is worth.
        progress: called with (bytes of input done, bytes in all).

    Raises:
        ConfigError: the sources, options or the output folder do not allow it; nothing was written.
        UserError: it could not be finished (a full disk, an input that changed); what is done stays.
    """
    started = time.monotonic()
    output = Path(output)
    _check_options(sources, output, heldout, shard_bytes, workers, tokenizer, train_bpe)
    content, info = _choose_tokenizer(tokenizer, bos, eos, train_bpe)
    arguments = {
        "sources": [source if source == STDLIB else os.path.abspath(source) for source in sources],
        "tokenizer": f"bpe-{train_bpe}" if train_bpe else info.fingerprint,
        "bos_id": info.bos_id,
        "eos_id": info.eos_id,
        "field": field,
        "pattern": pattern,
        "heldout": heldout,
        "shard_bytes": shard_bytes,
    }
    plan = _make_plan(sources, pattern, field, shard_bytes, output, arguments)
    _check_encoded(plan, field, BYTES if train_bpe else info)
    if (output / MANIFEST).exists():
        return _already_there(output, plan, started)
    with _work_folder(output) as work:
        if (output / MANIFEST).exists():  # another process finished it while this one waited to begin
            return _already_there(output, plan, started)
        _begin(output, work, plan)
        with _disk_errors(output):
            if train_bpe:
                info = _trained_tokenizer(work, plan, train_bpe, heldout, field)
            elif content is not None:
                write_durably(work / TOKENIZER_FILE, content)
            job = Job(work, info, heldout, field, shard_bytes)
            records = _run(job, plan.units, workers or _worth_workers(plan, info), progress)
            corpus, skipped = assemble(output, job, plan, records)
    return PrepareReport(corpus, skipped, time.monotonic() - started)


def _check_options(
    sources: Sequence[str],
    output: Path,
    heldout: float,
    shard_bytes: int,
    workers: int | None,
    tokenizer: str,
    bpe: int | None,
) -> None:
    """Raises ConfigError for values that make no sense, and for an output folder that is something else."""
    if not sources:
        raise ConfigError(f"no source is given; name a file, a folder, a glob or `{STDLIB}`.")
    if not 0 <= heldout <= 0.5:
        raise ConfigError(f"the held-out share is {heldout}; give a number from 0 to 0.5.")
    if shard_bytes < 1 << 16:
        raise ConfigError(f"a shard of {shard_bytes} bytes is too small; give at least {1 << 16}.")
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} workers cannot work; give 1 or more.")
    if bpe and tokenizer != "bytes":
        raise ConfigError(f"a BPE of {bpe} tokens to train and the tokenizer {tokenizer} exclude each other; give one.")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give the folder that the corpus shall be in.")
    if output.is_dir():
        entries = {entry.name for entry in output.iterdir()}
        if entries and not entries & {MANIFEST, WORK_FOLDER}:
            raise ConfigError(
                f"{output} holds something that is no corpus ({min(entries)}); give a new or empty folder."
            )


def _choose_tokenizer(
    name: str, bos: str | None, eos: str | None, bpe: int | None
) -> tuple[bytes | None, TokenizerInfo]:
    """The tokenizer file's content (None for bytes, or where it is yet to be trained) and what is known of it."""
    if bpe:
        if bpe < SMALLEST_BPE:
            raise ConfigError(f"a byte-level BPE needs at least {SMALLEST_BPE} tokens; {bpe} were asked for.")
        return None, TokenizerInfo("huggingface", TOKENIZER_FILE, bpe, 0, 0, "")
    if name == "bytes":
        return None, load_tokenizer(name, bos, eos).info
    content = read_tokenizer_file(name)
    return content, describe_tokenizer(content, name, bos, eos)


def _make_plan(
    sources: Sequence[str], pattern: str, field: str, shard_bytes: int, output: Path, arguments: dict[str, Any]
) -> Plan:
    """Looks at the inputs and cuts them into units of about a shard's worth of text."""
    files, skipped = find_files(sources, pattern, exclude=output)
    # Two bytes an id and three to four bytes of text a token: one and a half times a shard's bytes fill it about.
    unit_bytes = shard_bytes if arguments["tokenizer"] == BYTES.fingerprint else shard_bytes * 3 // 2
    units = cut(files, unit_bytes, field, skipped)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.mtime_ns}\n".encode(errors="surrogateescape"))
    numbered = tuple(Unit(number, tuple(pieces)) for number, pieces in enumerate(units))
    return Plan(arguments, digest.hexdigest()[:16], numbered, tuple(skipped))


def _check_encoded(plan: Plan, field: str, tokenizer: TokenizerInfo) -> None:
    """Raises ConfigError where ids of the sources are not the tokenizer's, as a look at some places shows.

    The others are checked when they are read.
    """
    pieces = [piece for unit in plan.units for piece in unit.slices if piece.file.kind in ID_KINDS]
    for piece in pieces[:: max(1, len(pieces) // _LOOKS)]:
        for item in islice(read_slice(piece, field), _LOOKS):
            if isinstance(item, EncodedDocument):
                check_ids(item, tokenizer)


def _already_there(output: Path, plan: Plan, started: float) -> PrepareReport:
    """The report of a finished corpus, provided it is the one asked for."""
    corpus = open_corpus(output)
    manifest = json.loads((output / MANIFEST).read_bytes())
    _compare(output, manifest.get("prepared", {}), plan, "holds a corpus prepared")
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    return PrepareReport(corpus, manifest["counts"]["skipped"], time.monotonic() - started, already_there=True)


def _compare(output: Path, found: dict[str, Any], plan: Plan, what: str) -> None:
    """Raises ConfigError unless the plan found in the folder is this one."""
    then = found.get("arguments", {})
    changes = [
        f"{name} {then.get(name)!r}, now {value!r}" for name, value in plan.arguments.items() if then.get(name) != value
    ]
    if not changes and found.get("inputs") != plan.inputs:
        changes = ["the input files have changed since"]
    if changes:
        raise ConfigError(
            f"{output} {what} otherwise ({'; '.join(changes)}); give another folder, or remove this one first."
        )


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """The folder of unfinished work, held so that no other preparation writes there."""
    work = output / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / LOCK, "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"cannot write to {output}: {error.strerror}; give a folder you may write.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another preparation is writing {output}; wait for it, or stop it.") from error
        yield work


def _begin(output: Path, work: Path, plan: Plan) -> None:
    """Writes the plan down, or checks that the one found is the same, and clears what belongs to no plan."""
    path = work / PLAN
    if path.exists():
        _compare(output, json.loads(path.read_bytes()), plan, "holds a preparation begun")
        leftovers = work.glob("*.tmp-*")
    else:
        leftovers = (entry for entry in work.iterdir() if entry.name != LOCK)
    for leftover in leftovers:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not path.exists():
        with _disk_errors(output):
            write_durably(path, json.dumps(plan.to_dict()).encode())


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Turns a full disk into one sentence."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise full_disk(output) from error
        raise


def _trained_tokenizer(work: Path, plan: Plan, vocab_size: int, heldout: float, field: str) -> TokenizerInfo:
    """The BPE of this preparation, trained now unless an earlier start did."""
    path = work / TOKENIZER_FILE
    if not path.exists():
        write_durably(path, train_byte_level_bpe(sample_texts(plan.units, field, heldout), vocab_size))
    return describe_tokenizer(path.read_bytes(), str(path), None, None)


def _worth_workers(plan: Plan, info: TokenizerInfo) -> int:
    """How many processes to start for the plan's input when the user does not say."""
    size = sum(unit.size for unit in plan.units)
    return max(1, min(os.cpu_count() or 1, size // _WORTH_A_PROCESS[info.kind]))


def _run(job: Job, units: Sequence[Unit], workers: int, progress: Progress | None) -> list[Record]:
    """Does the units that are missing and returns the records of all, both splits filled where that is possible."""
    run_units(job, units, workers, progress)
    records = [_record(job, unit) for unit in units]
    moved = _document_to_move(records, job.heldout)
    if moved is not None:
        number, name, split = moved
        run_unit(job, dataclasses.replace(units[number], moved=(name, split)))
        records[number] = _record(job, units[number])
    return records


def _record(job: Job, unit: Unit) -> Record:
    record = read_record(job.work / folder_name(unit.number))
    assert record is not None, f"unit {unit.number} was done and is not there"
    return record


def _document_to_move(records: Sequence[Record], heldout: float) -> tuple[int, str, str] | None:
    """(unit, document, split) of the one document to put elsewhere so that no split is empty, None where none is.

    The only document of a corpus is trained on; of two or more at least one is held out and one trained on.
    """
    trained, held = (sum(record.documents(split) for record in records) for split in (TRAIN, HELDOUT))
    if held and not trained:
        (_, name), number = max((record.highest, n) for n, record in enumerate(records) if record.highest)
        return number, name, TRAIN
    if heldout and not held and trained > 1:
        (_, name), number = min((record.lowest, n) for n, record in enumerate(records) if record.lowest)
        return number, name, HELDOUT
    return None

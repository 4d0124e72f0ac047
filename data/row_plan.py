"""What row r of a stage holds: a pure function of a DataPlan, found from the corpora's tables without reading text.

The life of a row: its stage renumbers it past skipped rows, the stage's mixture says from which corpus it comes and
as the how-manieth of that corpus, and the packing finds its pieces in what earlier stages left of the corpus's stream.
No number of workers enters. Changing any of it changes `VERSION`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ..errors import ConfigError
from .cache import ShardCache, SplitFiles
from .index import Corpus
from .mixing import Mixture
from .packing import PACKINGS, BestFitRows, ConcatRows, PackingReport, compare_packings
from .plan_changes import agree, differences, skip_past
from .streams import CorpusStream, Pieces, Remaining

VERSION = 1

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stage:
    """Some rows of one length.

    Attributes:
        seq_len: positions a row.
        rows: how many rows are trained; None in the last stage means without end.
        packing: "concat" or "best_fit".
        weights: of the corpora in this stage, 0 for one that rests; None takes the plan's.
    """

    seq_len: int
    rows: int | None = None
    packing: str = "concat"
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, order=True)
class Cursor:
    """Where training stands: `row` rows of stage `stage`, and all of those before it, have been trained."""

    stage: int = 0
    row: int = 0


@dataclass(frozen=True)
class Row:
    """One row: its place among the trained rows, its place in the plan (skipped rows counted), and what it holds."""

    stage: int
    row: int
    plan_row: int
    pieces: Pieces

    @property
    def corpus(self) -> int:
        """The corpus that all pieces of the row come from."""
        return self.pieces.corpus


@dataclass(frozen=True, eq=False)
class DataPlan:
    """The order of training. Compare plans by `fingerprint`.

    Rows have two numbers. A *plan row* counts every row of a stage; what it holds does not depend on what is skipped.
    A *row* (in a Cursor, a Batch, a Stage's `rows`) counts the rows trained: it is the plan row less the skipped ones
    before it. A skipped row's positions are dropped, so a stage of R rows with S skipped uses R + S rows of the stream.

    Attributes:
        corpora: what is mixed. A plan knows them by fingerprint, never by location.
        stages: seq_len, rows and packing, in order. Each goes on in every corpus's stream where the last one ended.
        weights: share of the rows of each corpus; None means in proportion to its positions.
        seed: decides the order of shards, documents and packed rows.
        shuffle_window: how many shards are shuffled together. Memory: 12 bytes a document of two windows a corpus.
        skipped_rows: for each stage the (first, end) ranges of plan rows left out.
        split: which split is trained on.
        version: of this arithmetic.
        cache: opens the corpora's files; not part of the plan.
    """

    corpora: tuple[Corpus, ...]
    stages: tuple[Stage, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0
    shuffle_window: int = 16
    skipped_rows: tuple[Ranges, ...] = ()
    split: str = "train"
    version: int = VERSION
    cache: ShardCache | None = None

    def __post_init__(self):
        _validate(self)
        weights = self.weights or tuple(float(stream.total) for stream in self.streams)
        skipped = tuple(_merge_ranges(ranges) for ranges in self.skipped_rows)
        skipped += ((),) * (len(self.stages) - len(skipped))
        object.__setattr__(self, "weights", tuple(map(float, weights)))
        object.__setattr__(self, "skipped_rows", skipped)
        _validate_stages(self)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @cached_property
    def files(self) -> tuple[SplitFiles, ...]:
        """The files of each corpus's split."""
        max_open = 2 * self.shuffle_window + 2
        return tuple(SplitFiles(corpus, self.split, self.cache, max_open) for corpus in self.corpora)

    @cached_property
    def streams(self) -> tuple[CorpusStream, ...]:
        """The endless stream of documents of each corpus."""
        return tuple(
            CorpusStream(files, corpus, self.seed, self.shuffle_window) for corpus, files in enumerate(self.files)
        )

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """How each stage mixes the corpora."""
        return tuple(
            Mixture.of(stage.weights or self.weights or (), f"weights of stage {number}")
            for number, stage in enumerate(self.stages)
        )

    def plan_row(self, stage: int, row: int) -> int:
        """The number of a trained row in the plan, skipped rows counted."""
        return skip_past(self.skipped_rows[stage], row)

    def row(self, stage: int, row: int) -> Row:
        """What the `row`-th trained row of a stage holds; costs at most two windows (see `streams`)."""
        rows = self.stages[stage].rows
        assert row >= 0 and (rows is None or row < rows), f"row {row} of stage {stage}, which has {rows}"
        number = self.plan_row(stage, row)
        corpus, k = self.mixtures[stage].locate(number)
        return Row(stage, row, number, self._rows(stage, corpus).row(k))

    def remaining(self, cursor: Cursor) -> int | None:
        """How many rows of the cursor's stage are still to be trained; None means without end."""
        rows = self.stages[cursor.stage].rows
        return None if rows is None else rows - cursor.row

    def finished(self, cursor: Cursor) -> bool:
        """Whether every row of every stage has been trained."""
        return cursor.stage == len(self.stages) - 1 and self.remaining(cursor) == 0

    def advance(self, cursor: Cursor, rows: int) -> Cursor:
        """The cursor after `rows` more rows; where a stage ends, the next one begins."""
        left = self.remaining(cursor)
        if left is None or rows < left:
            return Cursor(cursor.stage, cursor.row + rows)
        if cursor.stage + 1 < len(self.stages):
            return self.advance(Cursor(cursor.stage + 1), rows - left)
        assert rows == left, f"{rows} rows from {cursor}, where the plan has {left} left"
        return Cursor(cursor.stage, cursor.row + rows)

    def positions(self, cursor: Cursor) -> int:
        """How many positions have been trained up to the cursor."""
        earlier = sum((stage.rows or 0) * stage.seq_len for stage in self.stages[: cursor.stage])
        return earlier + cursor.row * self.stages[cursor.stage].seq_len

    def epochs(self, cursor: Cursor) -> list[float]:
        """How often training has gone through each corpus up to the cursor, skipped rows counted as gone through."""
        used = [0] * len(self.corpora)
        for number, stage in enumerate(self.stages[: cursor.stage + 1]):
            rows = self._extent(number, cursor.row if number == cursor.stage else None)
            for corpus in range(len(used)):
                used[corpus] += self.mixtures[number].rows(corpus, rows) * stage.seq_len
        return [positions / stream.total for positions, stream in zip(used, self.streams, strict=True)]

    def packing_reports(self, stage: int) -> list[PackingReport]:
        """What each packing does to the documents of a stage, over the first 256 rows of every corpus in it."""
        totals: dict[str, PackingReport] = {}
        for corpus, count in enumerate(self.mixtures[stage].counts):
            if count:
                source = self._rows(stage, corpus).source
                for report in compare_packings(self.streams[corpus], source, self.stages[stage].seq_len, stage):
                    totals[report.packing] = totals[report.packing] + report if report.packing in totals else report
        return list(totals.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides what each row holds."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON, the corpora as their fingerprints."""
        return {
            "version": self.version,
            "seed": self.seed,
            "shuffle_window": self.shuffle_window,
            "split": self.split,
            "corpora": [corpus.fingerprint for corpus in self.corpora],
            "weights": list(self.weights or ()),
            "stages": [
                {
                    "seq_len": stage.seq_len,
                    "rows": stage.rows,
                    "packing": stage.packing,
                    "weights": None if stage.weights is None else list(stage.weights),
                }
                for stage in self.stages
            ],
            "skipped_rows": [[list(bounds) for bounds in ranges] for ranges in self.skipped_rows],
        }

    @staticmethod
    def from_dict(saved: dict[str, Any], corpora: tuple[Corpus, ...], cache: ShardCache | None = None) -> DataPlan:
        """The plan that `to_dict` wrote, over corpora opened again; raises ConfigError where they are not the same."""
        found = [corpus.fingerprint for corpus in corpora]
        if found != saved["corpora"]:
            raise ConfigError(f"The plan was made for corpora {saved['corpora']}; those given are {found}.")
        return DataPlan(
            corpora=tuple(corpora),
            stages=tuple(_stage_from(stage) for stage in saved["stages"]),
            weights=tuple(saved["weights"]),
            seed=saved["seed"],
            shuffle_window=saved["shuffle_window"],
            skipped_rows=tuple(tuple((first, end) for first, end in ranges) for ranges in saved["skipped_rows"]),
            split=saved["split"],
            version=saved["version"],
            cache=cache,
        )

    def describe_difference(self, saved: dict[str, Any]) -> list[str]:
        """What changed since the plan that `to_dict` wrote, a sentence each."""
        return differences(saved, self.to_dict())

    def agrees_with(self, saved: dict[str, Any], cursor: Cursor) -> bool:
        """Whether the rows before the cursor, saved under another plan, are the same in this one.

        So more rows in the stage where training stands, further stages, corpora that only they use, and skipped rows
        still to come are accepted.
        """
        return agree(saved, self.to_dict(), cursor.stage, cursor.row)

    @cached_property
    def _rows(self):
        """(stage, corpus) -> the rows that the stage makes of what the stages before it left of the corpus."""
        return lru_cache(None)(self._make_rows)

    def _make_rows(self, stage: int, corpus: int) -> ConcatRows | BestFitRows:
        source = Remaining.all()
        if stage:
            used = self.mixtures[stage - 1].rows(corpus, self._extent(stage - 1))
            source = self._rows(stage - 1, corpus).after(used)
        packing = PACKINGS[self.stages[stage].packing]
        return packing(self.streams[corpus], source, self.stages[stage].seq_len, stage)

    def _extent(self, stage: int, rows: int | None = None) -> int:
        """How many plan rows the first `rows` trained rows (None: all) of a stage span."""
        rows = self.stages[stage].rows if rows is None else rows
        assert rows is not None
        return self.plan_row(stage, rows - 1) + 1 if rows else 0


def _validate(plan: DataPlan) -> None:
    """Raises ConfigError for corpora and numbers that no plan can have."""
    if plan.version != VERSION:
        raise ConfigError(f"The data plan has version {plan.version}; this code makes rows by version {VERSION} only.")
    if not plan.corpora:
        raise ConfigError("The data plan names no corpus; name at least one.")
    if not 0 <= plan.seed < 1 << 64:
        raise ConfigError(f"seed is {plan.seed}; choose one from 0 to 2^64 - 1.")
    if plan.shuffle_window < 1:
        raise ConfigError(f"shuffle_window is {plan.shuffle_window}; it counts shards and is at least 1.")
    first = plan.corpora[0]
    for corpus, stream in zip(plan.corpora, plan.streams, strict=True):
        if stream.total == 0:
            raise ConfigError(f"{corpus.location} has no document in its {plan.split} split; prepare one with text.")
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(
                f"{corpus.location} was prepared with tokenizer {corpus.tokenizer.fingerprint}, {first.location} with "
                f"{first.tokenizer.fingerprint}; prepare them with the same."
            )
    if plan.weights is not None and (len(plan.weights) != len(plan.corpora) or 0 in plan.weights):
        raise ConfigError(f"weights are {list(plan.weights)}; give {len(plan.corpora)} positive numbers, one a corpus.")


def _validate_stages(plan: DataPlan) -> None:
    """Raises ConfigError for stages that the corpora cannot fill or that contradict one another."""
    if not plan.stages:
        raise ConfigError("The data plan has no stage; give at least one seq_len.")
    if len(plan.skipped_rows) > len(plan.stages):
        raise ConfigError(f"skipped_rows are given for {len(plan.skipped_rows)} stages; there are {len(plan.stages)}.")
    for number, stage in enumerate(plan.stages):
        if stage.seq_len < 1:
            raise ConfigError(f"seq_len of stage {number} is {stage.seq_len}; it is at least 1.")
        if stage.rows is None and number + 1 < len(plan.stages):
            raise ConfigError(f"Stage {number} has no number of rows; only the last stage may go on without end.")
        if stage.rows is not None and stage.rows < 1:
            raise ConfigError(f"Stage {number} has {stage.rows} rows; it needs at least 1.")
        if stage.packing not in PACKINGS:
            raise ConfigError(f"packing of stage {number} is {stage.packing!r}; use {' or '.join(PACKINGS)}.")
        if stage.weights is not None and len(stage.weights) != len(plan.corpora):
            raise ConfigError(
                f"weights of stage {number} are {list(stage.weights)}; give {len(plan.corpora)} of them, "
                "0 for a corpus that rests."
            )
        for corpus, count in enumerate(plan.mixtures[number].counts):
            positions = plan.streams[corpus].total
            if count and positions < stage.seq_len:
                raise ConfigError(
                    f"{plan.corpora[corpus].location} has {positions} positions in its {plan.split} split, less than "
                    f"one row of {stage.seq_len} (stage {number}); prepare more text or lower seq_len."
                )
        for first, end in plan.skipped_rows[number]:
            if stage.rows is not None and first >= plan._extent(number):
                last = plan._extent(number) - 1
                raise ConfigError(f"Skipped rows {first} to {end} of stage {number} lie behind its last row {last}.")


def _merge_ranges(ranges: Ranges) -> Ranges:
    """The same rows as ascending ranges that do not touch; raises ConfigError for one that holds no row."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted((int(first), int(end)) for first, end in ranges):
        if not 0 <= first < end:
            raise ConfigError(
                f"Skipped rows ({first}, {end}) are no range; give the first row and the one behind the last."
            )
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)


def _stage_from(saved: dict[str, Any]) -> Stage:
    weights = saved["weights"]
    return Stage(saved["seq_len"], saved["rows"], saved["packing"], None if weights is None else tuple(weights))

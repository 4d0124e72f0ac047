"""From the configuration to rows: the data plan of a run, and the held-out rows it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ...data import Corpus, DataPlan, HeldoutRows, ShardCache, Stage
from ...parallel import Engine
from ..config import Config
from ..validate import SKIPPED
from .schedule import TrainingSchedule


def make_plan(config: Config, corpora: Sequence[Corpus], schedule: TrainingSchedule) -> DataPlan:
    """The data plan of a run. Its last stage has no end, so that training longer changes no row."""
    rows: list[int | None] = [*schedule.stage_rows()[:-1], None]
    stages = [
        Stage(
            stage.seq_len,
            count,
            stage.packing or config.data.packing,
            tuple(stage.weights) if stage.weights else None,
        )
        for stage, count in zip(config.stages, rows, strict=True)
    ]
    return DataPlan(
        corpora=tuple(corpora),
        stages=tuple(stages),
        weights=tuple(corpus.weight for corpus in config.data.corpora),
        seed=config.data.seed,
        shuffle_window=config.data.shuffle_window,
        skipped_rows=tuple(_skipped(config, number) for number in range(len(stages))),
        cache=make_cache(config),
    )


def make_cache(config: Config) -> ShardCache:
    """The cache of shards that lie behind URLs."""
    directory = config.data.cache or "~/.cache/longscan"
    verify = "checksum" if config.data.verify == "checksum" else "size"
    return ShardCache(directory, max_bytes=int(config.data.cache_gib * 2**30), verify=verify)


def _skipped(config: Config, stage: int) -> tuple[tuple[int, int], ...]:
    """The (first, end) ranges of plan rows that the configuration leaves out of a stage."""
    found = [SKIPPED.fullmatch(text) for text in config.data.skipped_rows]
    return tuple((int(m[2]), int(m[3]) + 1) for m in found if m and int(m[1]) == stage)


class Validation:
    """The loss on held-out rows: the first `validation.rows` rows, dealt to the corpora in turn; always the same."""

    def __init__(self, config: Config, corpora: Sequence[Corpus]):
        self.rows = config.validation.rows
        self._corpora = [corpus for corpus in corpora if corpus.splits["heldout"].documents]
        self._cache = make_cache(config)
        self._held: dict[int, list[HeldoutRows]] = {}

    def score(self, engine: Engine, seq_len: int, replica: int, replicas: int) -> tuple[float, float]:
        """The mean loss a token and the bits a byte (0 where bytes are unknown) at `seq_len`; collective."""
        if seq_len not in self._held:
            self._held[seq_len] = [HeldoutRows(corpus, seq_len, cache=self._cache) for corpus in self._corpora]
        held = self._held[seq_len]
        places = ((rows, number) for number in range(max(map(len, held))) for rows in held if number < len(rows))
        batches = [rows.read([number]) for rows, number in islice(places, replica, self.rows, replicas)]
        loss, tokens, text_bytes = engine.sum(
            engine.evaluate(batches), sum(b.valid_tokens for b in batches), sum(b.text_bytes for b in batches)
        )
        return loss / tokens, loss / text_bytes if text_bytes else 0.0

    @property
    def possible(self) -> bool:
        """Whether there is held-out text at all."""
        return bool(self._corpora)

"""What `longscan prepare` shows: a progress bar while it works and a table of what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from ..data import PrepareReport, prepare_corpus
from ..errors import ConfigError


@dataclass(frozen=True)
class Summary:
    """The report of a preparation, for a person or as JSON."""

    report: PrepareReport

    def to_json(self) -> dict[str, Any]:
        """The report's own form."""
        return self.report.to_dict()

    def show(self, console: Console) -> None:
        """Prints a row a split, what was skipped and why, and where the corpus is."""
        table = Table(box=None, pad_edge=False)
        table.add_column("split")
        for name in ("documents", "tokens", "text bytes", "shards"):
            table.add_column(name, justify="right")
        for name, split in self.report.splits.items():
            table.add_row(name, *(f"{n:,}" for n in (split.documents, split.tokens, split.bytes, len(split.shards))))
        console.print(table)
        for reason, count in self.report.skipped.items():
            console.print(f"skipped {count:,}: {reason}", markup=False)
        corpus = self.report.corpus
        done = "was there already" if self.report.already_there else f"written in {self.report.seconds:.1f} s"
        console.print(f"{corpus.location} {done} ({corpus.tokenizer.kind} tokenizer)", markup=False, soft_wrap=True)


def prepare_with_progress(sources: Sequence[str], output: Path, shard_mib: float, **options: Any) -> Summary:
    """What `prepare_corpus` made of the sources, with a bar on standard error while it works."""
    if not 0 < shard_mib < 2**20:
        raise ConfigError(f"--shard-mib is {shard_mib}; give the size of a shard in MiB, say 64.")
    columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing", total=None)
        report = prepare_corpus(
            sources,
            output,
            shard_bytes=int(shard_mib * 2**20),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )
    return Summary(report)

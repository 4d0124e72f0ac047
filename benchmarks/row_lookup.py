"""Seconds to find random rows of a 10^9-document index, each by a plan that has nothing in memory.

The index is 8000 shards of 125,000 documents whose tables are links to one file, so the tables are in the page cache
after the first: what is timed is the lookup, not the disk (16 tables of 2 MB a window).

    python -m benchmarks.row_lookup [--lookups 10] [--shuffle-window 16]
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from longscan.data import Corpus, DataPlan, ShardInfo, Split, Stage, TokenizerInfo
from longscan.data.index import DOCUMENT

from .record import record

SHARDS, DOCUMENTS = 8000, 125_000
FLOOR = 1.0


def write_index(folder: Path) -> Corpus:
    """A corpus of 10^9 documents whose token files do not exist."""
    table = np.zeros(DOCUMENTS, DOCUMENT)
    table["tokens"] = np.random.default_rng(0).lognormal(6.0, 1.2, DOCUMENTS).astype(np.uint32) + 1
    np.save(folder / "table.npy", table)
    tokens = int(table["tokens"].sum())
    shards = []
    for number in range(SHARDS):
        (folder / f"{number:05}.npy").symlink_to(folder / "table.npy")
        shards.append(ShardInfo(f"{number:05}.tar", f"{number:05}.npy", DOCUMENTS, tokens, tokens, 0, "", ""))
    tokenizer = TokenizerInfo("bytes", None, 257, 256, 256, "benchmark")
    return Corpus(str(folder), tokenizer, "uint8", {"train": Split(tuple(shards))})


def measure(corpus: Corpus, packing: str, lookups: int, shuffle_window: int) -> tuple[list[float], list[float], int]:
    """Seconds of each lookup by the clock and of the processor, and the largest resident size so far in bytes."""
    rows = corpus.splits["train"].tokens // 32768
    stages = (Stage(8192, rows // 2 + 77, packing), Stage(32768, rows, packing))
    numbers = np.random.default_rng(1).integers(0, rows, lookups)
    seconds, processor = [], []
    for number, row in enumerate(numbers.tolist()):
        plan = DataPlan((corpus,), stages, seed=1, shuffle_window=shuffle_window)
        start, started = time.perf_counter(), time.process_time()
        plan.row(number % 2, min(row, rows // 2))
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - started)
        del plan
        gc.collect()
    return seconds, processor, peak_bytes()


def peak_bytes() -> int:
    """The largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measures both packings and records the slowest lookup."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lookups", type=int, default=10)
    parser.add_argument("--shuffle-window", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, before = write_index(Path(folder)), peak_bytes()
        for packing in ("concat", "best_fit"):
            seconds, processor, peak = measure(corpus, packing, arguments.lookups, arguments.shuffle_window)
            work = f"10^9 documents, rows of 8192 and 32768, {packing}, window {arguments.shuffle_window}"
            record("row_lookup", work, "longscan", "slowest", max(seconds), "s", FLOOR)
            record("row_lookup", work, "longscan", "median", statistics.median(seconds), "s", FLOOR)
            record("row_lookup", work, "longscan", "slowest, processor time", max(processor), "s", FLOOR)
            record("row_lookup", work, "longscan", "resident growth", peak - before, "bytes")


if __name__ == "__main__":
    main()

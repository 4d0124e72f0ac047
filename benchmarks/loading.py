"""Tokens a second at which one thread turns packed rows of 32K positions into batches, packing included.

Documents have lognormal lengths (median 400 tokens, or 40 for the many-small-documents case); shards are in the page
cache. Rows are read in training order, so best-fit pays for packing each group of 256 rows once. Processor time is
counted, since other work on the machine disturbs the clock's.

    python -m benchmarks.loading [--rows 512]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from longscan.data import Corpus, DataPlan, RowLoader, ShardInfo, Split, Stage, TokenizerInfo
from longscan.data.index import DOCUMENT

from .record import record

SEQ_LEN, BATCH = 32768, 4
FLOOR = 5e6
TOKENS_A_SHARD = 4_000_000


def write_corpus(folder: Path, dtype: str, median: int, tokens: int) -> Corpus:
    """A corpus of random tokens."""
    rng, item, shards = np.random.default_rng(0), np.dtype(dtype).itemsize, []
    vocab_size = 257 if dtype == "uint8" else 50_000
    for number in range(-(-tokens // TOKENS_A_SHARD)):
        lengths = rng.lognormal(np.log(median), 1.2, 2 * TOKENS_A_SHARD // median).astype(np.int64) + 1
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), TOKENS_A_SHARD)]
        payload = rng.integers(0, vocab_size - 1, int(lengths.sum())).astype(dtype).tobytes()
        path = folder / f"{number:04}.tar"
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("documents.bin")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
        table = np.zeros(len(lengths), DOCUMENT)
        table["tokens"], table["bytes"] = lengths, lengths
        table["offset"] = 512 + (np.cumsum(lengths) - lengths) * item
        np.save(path.with_suffix(".npy"), table)
        total, sha256 = int(lengths.sum()), hashlib.sha256(payload).hexdigest()
        shards.append(
            ShardInfo(path.name, f"{number:04}.npy", len(lengths), total, total, path.stat().st_size, sha256, sha256)
        )
    tokenizer = TokenizerInfo("bytes", None, vocab_size, vocab_size - 1, vocab_size - 1, dtype)
    return Corpus(str(folder), tokenizer, dtype, {"train": Split(tuple(shards))})


def tokens_a_second(corpus: Corpus, packing: str, rows: int) -> float:
    """Reads `rows` rows in batches of four with a loader that has just been made."""
    loader = RowLoader(DataPlan((corpus,), (Stage(SEQ_LEN, rows, packing),), seed=1))
    start = time.process_time()
    for first in range(0, rows, BATCH):
        loader.read(0, range(first, first + BATCH))
    return rows * SEQ_LEN / (time.process_time() - start)


def main() -> None:
    """Measures both packings for bytes and for 16-bit tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    rows = parser.parse_args().rows // BATCH * BATCH
    torch.set_num_threads(1)
    for dtype, median in (("uint8", 400), ("uint16", 400), ("uint8", 40), ("uint16", 40)):
        with tempfile.TemporaryDirectory() as folder:
            corpus = write_corpus(Path(folder), dtype, median, rows * SEQ_LEN)
            tokens_a_second(corpus, "concat", BATCH)
            for packing in ("concat", "best_fit"):
                work = f"{rows} rows of {SEQ_LEN}, {dtype}, documents of {median} tokens in the median, {packing}"
                rate = tokens_a_second(corpus, packing, rows)
                record("loading", work, "longscan", "tokens per second and core", rate, "tokens/s", FLOOR)


if __name__ == "__main__":
    main()

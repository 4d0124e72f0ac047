"""Text a second that `prepare` turns into shards on one core: bytes, and a BPE beside the bare `tokenizers` library.

The text is the Python standard library's, in files or as one JSON lines file; everything is in the page cache, one
process, one thread. What is timed is the whole call, from arguments to manifest. The bare library encodes the same
texts with `encode_batch` in batches of about a MiB, and its ids are thrown away. Each figure is the best of some
repetitions, those of the BPE taken in turns and in processor time, since other work on the machine disturbs them.

    python -m benchmarks.prepare [--repeat 5]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers

from longscan.data.bpe import train_bpe
from longscan.data.prepare import prepare_corpus
from longscan.data.sources import find_files

from .record import record

BYTES_FLOOR, BPE_FLOOR = 50.0, 0.9
COPIES = 8


def read_texts() -> list[str]:
    """The standard library's good files."""
    texts = []
    for file in find_files(["python-stdlib"])[0]:
        try:
            texts.append(Path(file.path).read_bytes().decode())
        except UnicodeDecodeError:
            continue
    return [text for text in texts if text]


def megabytes_a_second(work: Callable[[], int], clock: Callable[[], float] = time.perf_counter) -> float:
    """The rate of `work`, which returns how many bytes of text it did."""
    started = clock()
    size = work()
    return size / (clock() - started) / 1e6


def prepare(source: Path, tokenizer: str) -> int:
    """Prepares a corpus in a new folder and returns the bytes of text in it."""
    with tempfile.TemporaryDirectory() as folder:
        report = prepare_corpus([str(source)], Path(folder, "corpus"), tokenizer=tokenizer, workers=1)
    return sum(split.bytes for split in report.splits.values())


def encode(engine: tokenizers.Tokenizer, batches: list[list[str]], size: int) -> int:
    """Encodes with the bare library."""
    for batch in batches:
        engine.encode_batch(batch, add_special_tokens=False)
    return size


def batched(texts: list[str]) -> Iterator[list[str]]:
    """The texts in batches of about a MiB."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= 1 << 20:
            yield batch
            batch, size = [], 0
    yield batch


def measure_bytes(folder: Path, texts: list[str], repeat: int) -> None:
    """Records the byte tokenizer's rate from files and from JSON lines."""
    files = folder / "files"
    files.mkdir()
    with open(folder / "lines.jsonl", "w") as lines:
        for copy in range(COPIES):
            for number, text in enumerate(texts):
                (files / f"{copy}-{number:05d}.txt").write_text(text, newline="")
                lines.write(json.dumps({"text": text}) + "\n")
    size = COPIES * sum(len(text.encode()) for text in texts)
    for source, form in ((files, f"{COPIES * len(texts)} files"), (folder / "lines.jsonl", "one JSON lines file")):
        rate = max(megabytes_a_second(lambda source=source: prepare(source, "bytes")) for _ in range(repeat))
        work = f"bytes, {size / 1e6:.0f} MB of Python source in {form}"
        record("prepare", work, "longscan", "text per second and core", rate, "MB/s", BYTES_FLOOR)


def measure_bpe(folder: Path, texts: list[str], repeat: int, vocab_size: int) -> None:
    """Records the rate with a BPE, the bare library's, and their ratio, on every fourth text."""
    texts = texts[::4]
    source = folder / "bpe.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = str(train_bpe([str(source)], folder / "tokenizer.json", vocab_size))
    engine = tokenizers.Tokenizer.from_file(path)
    batches, size = list(batched(texts)), sum(len(text.encode()) for text in texts)
    ours = bare = 0.0
    for _ in range(repeat):
        ours = max(ours, megabytes_a_second(lambda: prepare(source, path), time.process_time))
        bare = max(bare, megabytes_a_second(lambda: encode(engine, batches, size), time.process_time))
    work = f"byte-level BPE of {vocab_size}, {size / 1e6:.0f} MB of Python source, one thread"
    peer = f"tokenizers {importlib.metadata.version('tokenizers')}"
    metric = "text per second of processor time"
    record("prepare", work, peer, metric, bare, "MB/s")
    record("prepare", work, "longscan", metric, ours, "MB/s")
    record("prepare", work, "longscan", "share of the bare library's rate", ours / bare, "ratio", BPE_FLOOR)


def main() -> None:
    """Measures both claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8192)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = read_texts()
    with tempfile.TemporaryDirectory() as folder:
        measure_bytes(Path(folder), texts, arguments.repeat)
        measure_bpe(Path(folder), texts, arguments.repeat, arguments.vocab_size)


if __name__ == "__main__":
    main()

"""Tiny corpora, written without `prepare`: a tar a shard, its table, and the manifest's dataclasses."""

import hashlib
import io
import itertools
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from longscan.data import Corpus, ShardInfo, Split, TokenizerInfo
from longscan.data.index import DOCUMENT

# Lets the tests here import the helpers beside them by name.
sys.path.insert(0, str(Path(__file__).parent))


def _write_shard(folder, name, documents, dtype, bytes_a_token):
    payload = b"".join(tokens.astype(dtype).tobytes() for tokens in documents)
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        member = tarfile.TarInfo("documents.bin")
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    lengths = np.array([len(tokens) for tokens in documents], np.int64)
    table = np.zeros(len(documents), DOCUMENT)
    table["tokens"], table["bytes"] = lengths, lengths * bytes_a_token
    table["offset"] = 512 + (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    np.save(folder / f"{name}.npy", table)
    tar_bytes, table_bytes = (folder / f"{name}.tar").read_bytes(), (folder / f"{name}.npy").read_bytes()
    return ShardInfo(
        file=f"{name}.tar",
        index=f"{name}.npy",
        documents=len(documents),
        tokens=int(lengths.sum()),
        bytes=int(lengths.sum()) * bytes_a_token,
        size=len(tar_bytes),
        sha256=hashlib.sha256(tar_bytes).hexdigest(),
        index_sha256=hashlib.sha256(table_bytes).hexdigest(),
    )


@pytest.fixture(scope="session")
def write_corpus(tmp_path_factory):
    """(lengths of the documents of each train shard, ...) -> Corpus. Tokens are drawn from `seed` below 255."""
    numbers = itertools.count()

    def write(train, heldout=(), dtype="uint8", seed=0, vocab_size=257, bytes_a_token=1, folder=None):
        folder = folder or tmp_path_factory.mktemp(f"corpus{next(numbers)}")
        rng = np.random.default_rng(seed)
        splits = {}
        for split, shards in (("train", train), ("heldout", heldout)):
            splits[split] = Split(
                tuple(
                    _write_shard(
                        folder, f"{split}-{i:03}", [rng.integers(0, 255, n) for n in lengths], dtype, bytes_a_token
                    )
                    for i, lengths in enumerate(shards)
                )
            )
        tokenizer = TokenizerInfo("bytes", None, vocab_size, vocab_size - 1, vocab_size - 1, f"test-{vocab_size}")
        return Corpus(str(folder), tokenizer, dtype, splits)

    return write


@pytest.fixture(scope="session")
def stored():
    """(corpus, split, shard, document) -> its tokens, read from the tar by other means than the loader's."""

    def read(corpus, split, shard, document):
        info = corpus.splits[split].shards[shard]
        with tarfile.open(f"{corpus.location}/{info.file}") as tar:
            payload = tar.extractfile("documents.bin").read()
        tokens = np.frombuffer(payload, corpus.dtype)
        lengths = np.load(f"{corpus.location}/{info.index}")["tokens"].astype(int)
        begin = int(lengths[:document].sum())
        return tokens[begin : begin + lengths[document]].astype(np.int64)

    return read

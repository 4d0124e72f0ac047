"""A shard is a WebDataset tar whose table can be rebuilt from it, and equal documents make equal bytes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longscan.data import shards
from longscan.data.index import DOCUMENT
from longscan.data.shards import ShardWriter, SplitWriter, read_documents, rebuild_index
from longscan.errors import UserError


def write(stem: Path, documents, dtype="uint16"):
    writer = ShardWriter(stem, "key-000000")
    for tokens, size in documents:
        writer.add(np.asarray(tokens, dtype), size)
    return writer.close()


def random_documents(count, seed=0, longest=3000):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 60000, rng.integers(1, longest)), int(rng.integers(1, 9000))) for _ in range(count)]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 700), max_size=40),
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
    block=st.sampled_from([1, 512, 1000, 1 << 20]),
)
def test_documents_come_back_and_the_index_is_rebuilt(tmp_path, monkeypatch, lengths, dtype, block):
    monkeypatch.setattr(shards, "BLOCK_BYTES", block)
    documents = [(np.arange(n) % 251, 3 * n + 1) for n in lengths]
    info = write(tmp_path / "s", documents, dtype)
    table = np.load(tmp_path / "s.npy", mmap_mode="r")
    assert table.dtype == DOCUMENT
    np.testing.assert_array_equal(rebuild_index(tmp_path / "s.tar"), table)
    found = list(read_documents(tmp_path / "s.tar", tmp_path / "s.npy", dtype)) if lengths else []
    assert [size for _, size in found] == [size for _, size in documents]
    for (tokens, _), (expected, _) in zip(found, documents, strict=True):
        np.testing.assert_array_equal(tokens, expected)
    assert (info.documents, info.tokens) == (len(lengths), sum(lengths))
    assert info.bytes == sum(size for _, size in documents)


def test_info_states_size_and_checksums(tmp_path):
    info = write(tmp_path / "s", random_documents(20))
    tar, index = (tmp_path / info.file).read_bytes(), (tmp_path / info.index).read_bytes()
    assert info.size == len(tar)
    assert info.sha256 == hashlib.sha256(tar).hexdigest()
    assert info.index_sha256 == hashlib.sha256(index).hexdigest()


def test_equal_documents_make_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "s", random_documents(50))
    assert (tmp_path / "a/s.tar").read_bytes() == (tmp_path / "b/s.tar").read_bytes()


def test_webdataset_reads_the_blocks_as_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 4096)
    documents = random_documents(40, longest=900)
    write(tmp_path / "s", documents)
    samples = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False, nodesplitter=None))
    assert len(samples) > 3
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    tokens = np.concatenate([np.frombuffer(sample["tokens"], "<u2") for sample in samples])
    lengths = np.concatenate([np.frombuffer(sample["lengths"], "<u4") for sample in samples])
    np.testing.assert_array_equal(tokens, np.concatenate([document for document, _ in documents]))
    np.testing.assert_array_equal(lengths, [len(document) for document, _ in documents])


def test_a_long_document_is_a_block_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)
    write(tmp_path / "s", [([1] * 10, 10), ([2] * 5000, 5000), ([3] * 10, 10)])
    samples = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    assert [len(sample["lengths"]) // 4 for sample in samples] == [1, 1, 1]


def test_a_split_goes_on_in_a_new_shard(tmp_path):
    writer = SplitWriter(tmp_path, "train", 4000, "train-000000")
    for _ in range(10):
        writer.add(np.zeros(1500, np.uint8), 1500)
    infos = writer.close()
    assert [info.documents for info in infos] == [2] * 5
    assert all((tmp_path / info.file).exists() for info in infos)
    assert SplitWriter(tmp_path, "none", 4000, "k").close() == []


@pytest.mark.parametrize("keep", [700, 5000])
def test_a_truncated_shard_is_told(tmp_path, keep):
    write(tmp_path / "s", random_documents(20))
    data = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(data[:keep])
    with pytest.raises(UserError, match="damaged"):
        rebuild_index(tmp_path / "s.tar")


def test_a_foreign_tar_is_told(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as tar:
        tar.write({"__key__": "a", "json": json.dumps({}).encode()})
    with pytest.raises(UserError, match="damaged"):
        rebuild_index(tmp_path / "s.tar")

"""MosaicML's shards: written here by their published layout, one column read back, and refused when damaged."""

import os
import shutil
import sys

import numpy as np
import pytest
from stored_formats import write_mds

from longscan.data.sources import Document, EncodedDocument, Skipped, cut, find_files, read_slice
from longscan.errors import ConfigError


def read(source, unit_bytes=1 << 20, field="text"):
    files, skipped = find_files([str(source)])
    units = cut(files, unit_bytes, field, skipped)
    return skipped + [item for unit in units for piece in unit for item in read_slice(piece, field)]


def texts(items):
    return [item.text.decode() for item in items if isinstance(item, Document)]


def ids_of(items):
    assert all(isinstance(item, EncodedDocument) for item in items)
    return [item.ids.tolist() for item in items]


TEXTS = [{"text": f"sample {i} " + "☕" * (i % 40), "id": i, "extra": b"x" * (i % 3)} for i in range(100)]
TEXT_COLUMNS = {"text": "str", "id": "int", "extra": "bytes"}


@pytest.mark.parametrize("unit_bytes", [1, 300, 1 << 20])
def test_a_column_of_text(tmp_path, unit_bytes):
    write_mds(tmp_path / "a", TEXT_COLUMNS, TEXTS[:64], [], TEXTS[64:])
    items = read(tmp_path / "a", unit_bytes)
    assert texts(items) == [s["text"] for s in TEXTS]
    assert [item.name for item in items[62:66]] == [
        "shard.00000.mds:62", "shard.00000.mds:63", "shard.00002.mds:0", "shard.00002.mds:1",
    ]  # fmt: skip
    extras = read(tmp_path / "a", unit_bytes, field="extra")
    assert [item.text for item in extras] == [s["extra"] for s in TEXTS]


@pytest.mark.parametrize(
    ("encoding", "column"),
    [
        ("ndarray", "tokens"),
        ("ndarray:uint16", "input_ids"),
        ("ndarray:uint32", "tokens"),
        ("ndarray:int64:6", "input_ids"),
        ("ndarray:int32:2,3", "tokens"),
        ("uint32", "input_ids"),
        ("bytes", "tokens"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_a_column_of_ids(tmp_path, encoding, column, unit_bytes):
    same = ":6" in encoding or "," in encoding
    rows = [[(7 * i + k) % 999 for k in range(6 if same else 1 + i * 9 % 301)] for i in range(50)]
    stored = [np.array(row, "<i8").tobytes() if encoding == "bytes" else row for row in rows]
    if "," in encoding:
        stored = [[row[:3], row[3:]] for row in rows]
    samples = [{column: value, "domain": "web" * (i % 4)} for i, value in enumerate(stored)]
    write_mds(tmp_path / "a", {column: encoding, "domain": "str"}, samples)
    assert ids_of(read(tmp_path / "a", unit_bytes)) == rows
    assert ids_of(read(tmp_path / "a", unit_bytes, field=column)) == rows


def test_an_index_says_what_belongs_to_its_folder(tmp_path):
    write_mds(tmp_path / "a", TEXT_COLUMNS, TEXTS[:5], sub="0-0/")
    shutil.copy(tmp_path / "a/index.json", tmp_path / "a/0-0/index.json")
    (tmp_path / "a/notes.txt").write_text("no document")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/index.json").write_text('{"shards": 3}')
    assert [item.name for item in read(tmp_path)][4:] == ["a/0-0/shard.00000.mds:4", "b/index.json"]
    assert len(read(tmp_path / "a/0-0/shard.00000.mds")) == 5
    write_mds(tmp_path / "c", TEXT_COLUMNS, TEXTS[:5])
    assert [item.name for item in read(tmp_path / "c/*")][-1] == "shard.00000.mds:4"


@pytest.mark.parametrize(
    ("field", "message"),
    [("body", "no column 'body'; its columns are extra, id, text"), ("id", "int in column 'id', neither text nor ids")],
)
def test_another_column_is_asked_for(tmp_path, field, message):
    write_mds(tmp_path, TEXT_COLUMNS, TEXTS)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, field=field)


def test_a_truncated_or_foreign_shard_is_refused(tmp_path):
    write_mds(tmp_path, TEXT_COLUMNS, TEXTS[:9])
    shard = tmp_path / "shard.00000.mds"
    whole = shard.read_bytes()
    for size in [*range(0, 400, 7), len(whole) - 1]:
        shard.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"lists shard.00000.mds of {len(whole)} bytes, which holds {size}"):
            read(tmp_path)
        with pytest.raises(ConfigError, match=r"is truncated|is no"):
            read(shard)
    for foreign in (b"PAR1" * 500, b"\0" * 500, b"\1" + b"\0" * 500, whole[:40] + b"{" * (len(whole) - 40)):
        shard.write_bytes(foreign)
        with pytest.raises(ConfigError, match=r"shard.00000.mds (is truncated|is no)"):
            read(shard)
    shard.unlink()
    with pytest.raises(ConfigError, match="lists shard.00000.mds, which is not there"):
        read(tmp_path)


def test_damage_inside_is_counted_and_what_came_before_kept(tmp_path):
    write_mds(tmp_path, TEXT_COLUMNS, TEXTS)
    shard = tmp_path / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    at = int(np.frombuffer(data, "<u4", 1, 4 * 41)[0])
    data[at : at + 4] = b"\xff" * 4
    shard.write_bytes(data)
    items = read(tmp_path)
    assert len(items) == 41
    assert isinstance(items[-1], Skipped) and "sample 40" in items[-1].detail


def test_zipped_shards_need_zstandard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    write_mds(tmp_path, TEXT_COLUMNS, TEXTS, zipped=lambda data: data)
    with pytest.raises(ConfigError, match="zstandard is not installed: pip install zstandard"):
        read(tmp_path)


@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_zipped_shards_are_read_as_a_stream(tmp_path, unit_bytes):
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    write_mds(tmp_path / "a", TEXT_COLUMNS, TEXTS[:60], TEXTS[60:], zipped=compress)
    assert texts(read(tmp_path / "a", unit_bytes)) == [s["text"] for s in TEXTS]
    large = [{"text": os.urandom(2000).hex(), "id": 0, "extra": b""} for _ in range(200)]
    write_mds(tmp_path / "b", TEXT_COLUMNS, large, zipped=compress)
    shard = tmp_path / "b/shard.00000.mds.zstd"
    shard.write_bytes(shard.read_bytes()[:-1000])
    items = read(shard)
    assert isinstance(items[-1], Skipped) and 100 < len(items) < 200
    assert texts(items) == [s["text"] for s in large[: len(items) - 1]]
    shard.write_bytes(b"no zstd at all")
    with pytest.raises(ConfigError, match=r"mds.zstd is damaged"):
        read(shard)

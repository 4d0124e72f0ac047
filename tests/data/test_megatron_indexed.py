"""Megatron's .bin and .idx: read back as they were written, cut anywhere, and refused when damaged."""

import shutil
import struct

import pytest
from stored_formats import write_pair

from longscan.data.megatron_indexed import IndexedTokens
from longscan.data.sources import EncodedDocument, Skipped, cut, find_files, read_slice
from longscan.errors import ConfigError

DOCUMENTS = [[[1, 2, 3], [4]], [[5] * 100], [], [[6, 7]], [[]], [list(range(60))], [[8, 9, 10], [], [11]]]
FLAT = [[i for ids in document for i in ids] for document in DOCUMENTS]


def read(source, unit_bytes=1 << 20):
    files, skipped = find_files([str(source)])
    units = cut(files, unit_bytes, "text", skipped)
    return skipped + [item for unit in units for piece in unit for item in read_slice(piece, "text")]


@pytest.mark.parametrize("unit_bytes", [3, 30, 200, 1 << 20])
@pytest.mark.parametrize(("layout", "modes"), [("mapped", False), ("mapped", True), ("listed", False)])
@pytest.mark.parametrize("dtype", ["u1", "<i2", "<i4", "<i8", "<u2"])
def test_documents_come_back_whatever_the_slices(tmp_path, dtype, layout, modes, unit_bytes):
    stem = write_pair(tmp_path / "a", DOCUMENTS, dtype, layout, modes)
    items = read(stem, unit_bytes)
    assert all(isinstance(item, EncodedDocument) for item in items)
    assert [item.ids.tolist() for item in items] == FLAT
    assert [item.name for item in items] == [f"a.idx:{i}" for i in range(len(FLAT))]


@pytest.mark.parametrize("source", ["a", "a.bin", "a.idx", ".", "*", "a.v2"])
def test_a_pair_is_one_source_by_whatever_name(tmp_path, source):
    write_pair(tmp_path / "a", DOCUMENTS)
    if source == "a.v2":
        shutil.copy(tmp_path / "a.idx", tmp_path / "a.v2.idx")
        shutil.copy(tmp_path / "a.bin", tmp_path / "a.v2.bin")
    assert [item.ids.tolist() for item in read(tmp_path / source)] == FLAT


def test_data_without_an_index_are_not_taken_for_text(tmp_path):
    write_pair(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.idx").unlink()
    (item,) = read(tmp_path / "a.bin")
    assert item == Skipped("unreadable", "a.bin", "Megatron's .bin is read through its .idx, which is not beside it")


@pytest.mark.parametrize("layout", ["mapped", "listed"])
def test_an_index_of_nothing_gives_nothing(tmp_path, layout):
    write_pair(tmp_path / "a", [], layout=layout)
    assert len(IndexedTokens(str(tmp_path / "a.idx"))) == 0
    assert read(tmp_path / "a") == []


def test_a_slice_is_about_as_large_as_asked(tmp_path):
    stem = write_pair(tmp_path / "a", [[[i % 90] * (i % 7)] for i in range(2000)])
    ranges = list(IndexedTokens(f"{stem}.idx").cut(100))
    assert [a for a, _, _ in ranges[1:]] == [b for _, b, _ in ranges[:-1]]
    assert sum(tokens for *_, tokens in ranges) == sum(i % 7 for i in range(2000))
    assert all(95 <= tokens <= 106 for *_, tokens in ranges[:-1])


@pytest.mark.parametrize("layout", ["mapped", "listed"])
def test_a_truncated_index_is_refused_at_any_byte(tmp_path, layout):
    write_pair(tmp_path / "a", DOCUMENTS, layout=layout)
    whole = (tmp_path / "a.idx").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "a.idx").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"a\.idx (is truncated|is damaged|is no Megatron index)"):
            read(tmp_path / "a")


def overwrite(path, at, content):
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.with_suffix(".bin").unlink(), r"has no .*a\.bin beside it"),
        (lambda a: a.with_suffix(".bin").write_bytes(b"xx"), r"describes \d+ bytes and .*a\.bin holds 2"),
        (lambda a: a.with_suffix(".idx").write_bytes(b"\xfftOc" * 100), "is no Megatron index"),
        (lambda a: overwrite(a.with_suffix(".idx"), 9, b"\2"), "is of version 2"),
        (lambda a: overwrite(a.with_suffix(".idx"), 17, b"\6"), "dtype code 6"),
        (lambda a: overwrite(a.with_suffix(".idx"), 18, b"\xff" * 6), "is truncated"),
        (lambda a: overwrite(a.with_suffix(".idx"), 26, b"\3"), "takes"),
    ],
)
def test_files_that_cannot_serve_are_told(tmp_path, change, message):
    change(write_pair(tmp_path / "a", DOCUMENTS))
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "a.idx")


def test_damage_inside_is_counted_and_the_rest_kept(tmp_path):
    write_pair(tmp_path / "a", [[[i] * 50] for i in range(20)])
    overwrite(tmp_path / "a.idx", 34 + 4 * 3, struct.pack("<i", 49))
    items = read(tmp_path / "a", unit_bytes=500)
    assert [item.name for item in items if isinstance(item, Skipped)] == ["a.idx"]
    kept = [item.ids[0] for item in items if isinstance(item, EncodedDocument)]
    assert 10 < len(kept) < 20 and 3 not in kept

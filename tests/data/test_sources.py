"""Each source gives its documents in a fixed order, whatever slices it is read in, and drops nothing in silence."""

import gzip
import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longscan.data.sources import Document, Skipped, cut, find_files, read_slice
from longscan.errors import ConfigError, UserError


def read(source, unit_bytes=1 << 20, field="text", pattern="**/*"):
    """Every item of a source in order, read unit by unit."""
    files, skipped = find_files([str(source)], pattern)
    units = cut(files, unit_bytes, field, skipped)
    return skipped + [item for unit in units for piece in unit for item in read_slice(piece, field)]


def texts(items):
    return [item.text.decode() for item in items if isinstance(item, Document)]


def reasons(items):
    return Counter(item.reason for item in items if isinstance(item, Skipped))


def make(folder: Path, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_folder_is_read_sorted_without_hidden_files_or_links_to_folders(tmp_path):
    make(tmp_path / "a", **{"b.txt": "2", "a__z.txt": "1", ".git__x": "no", "c.md": "3", "a__.hidden": "no"})
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    assert texts(read(tmp_path / "a")) == ["1", "2", "3"]
    assert texts(read(tmp_path / "a", pattern="**/*.txt")) == ["1", "2"]
    assert texts(read(tmp_path / "a", pattern="a/*.txt")) == ["1"]
    assert [item.name for item in read(tmp_path / "a")] == ["a/z.txt", "b.txt", "c.md"]


def test_a_glob_names_its_matches_below_its_fixed_part(tmp_path):
    make(tmp_path, **{"x__1.txt": "1", "x__2.txt": "2", "y__deep__3.txt": "3", "x__n.md": "no"})
    items = read(tmp_path / "*/*.txt")
    assert [item.name for item in items] == ["x/1.txt", "x/2.txt"]
    assert [item.name for item in read(tmp_path / "**/*.txt")] == ["x/1.txt", "x/2.txt", "y/deep/3.txt"]
    assert [item.name for item in read(tmp_path / "*")] == ["x/1.txt", "x/2.txt", "x/n.md", "y/deep/3.txt"]


def test_the_corpus_being_written_is_no_input(tmp_path):
    make(tmp_path, **{"a.txt": "1", "out__train__0.tar.txt": "no"})
    files, _ = find_files([str(tmp_path)], exclude=tmp_path / "out")
    assert [file.name for file in files] == ["a.txt"]


def test_the_standard_library_without_installed_packages():
    files, skipped = find_files(["python-stdlib"])
    names = [file.name for file in files]
    assert names == sorted(names)
    assert "os.py" in names and "json/decoder.py" in names
    assert not [name for name in names if "-packages/" in name or not name.endswith(".py")]
    assert not skipped
    assert all(file.path.startswith(sysconfig.get_path("stdlib")) for file in files)


BAD_LINES = [
    (b"\n", "empty"),
    (b"{oops\n", "bad_json"),
    (b'{"other": 1}\n', "missing_field"),
    (b"[1]\n", "missing_field"),
    (b'{"text": null}\n', "missing_field"),
    (b'{"text": 3}\n', "not_text"),
    (b'{"text": "\xff"}\n', "bad_utf8"),
    (b'{"text": "\\ud800"}\n', "bad_utf8"),
    (b"[" * 100_000 + b"\n", "bad_json"),
]


@pytest.mark.parametrize(
    ("line", "reason"), BAD_LINES, ids=[reason + str(i) for i, (_, reason) in enumerate(BAD_LINES)]
)
def test_a_bad_line_is_skipped_with_its_reason_and_place(tmp_path, line, reason):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + line + good)
    items = read(tmp_path / "a.jsonl")
    assert texts(items) == ["good", "good"]
    assert [(item.reason, item.name) for item in items if isinstance(item, Skipped)] == [(reason, "a.jsonl:17")]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(lines=st.lists(st.text(max_size=30), min_size=1, max_size=20), unit=st.integers(1, 200), end=st.booleans())
def test_json_lines_give_the_same_documents_in_any_slices(tmp_path, lines, unit, end):
    data = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines) + "\n" * end
    (tmp_path / "a.jsonl").write_text(data, newline="")
    whole = read(tmp_path / "a.jsonl")
    assert texts(whole) == lines
    assert read(tmp_path / "a.jsonl", unit_bytes=unit) == whole


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz"])
def test_zipped_lines(tmp_path, suffix):
    lines = [f"line {i}" for i in range(2000)]
    data = gzip.compress("".join(json.dumps({"body": line}) + "\n" for line in lines).encode())
    (tmp_path / f"a{suffix}").write_bytes(data)
    assert texts(read(tmp_path / f"a{suffix}", field="body")) == lines
    (tmp_path / f"a{suffix}").write_bytes(data[: len(data) // 2])
    items = read(tmp_path / f"a{suffix}", field="body")
    assert reasons(items) == {"unreadable": 1}
    assert texts(items) == lines[: len(texts(items))] != []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_parquet_rows_by_row_group(tmp_path, kind, unit_bytes):
    values = [None if i % 50 == 7 else f"row {i} ☕" for i in range(500)]
    column = pa.array(values, pa.string()).cast(kind)
    pq.write_table(pa.table({"n": range(500), "text": column}), tmp_path / "a.parquet", row_group_size=64)
    items = read(tmp_path / "a.parquet", unit_bytes)
    assert texts(items) == [value for value in values if value]
    assert reasons(items) == {"missing_field": 10}
    assert [item.name for item in items] == [f"a.parquet:{i}" for i in range(500)]


def test_parquet_that_cannot_serve_is_told(tmp_path):
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="no column 'text'; its columns are n, body"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="'n' holds int64, not text"):
        read(tmp_path / "a.parquet", field="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really PAR1")
    assert reasons(read(tmp_path / "b.parquet")) == {"unreadable": 1}


def test_damaged_parquet_keeps_what_came_before(tmp_path):
    table = pa.table({"text": [os.urandom(400).hex() for _ in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50, compression="zstd", use_dictionary=False)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\0" * 4000
    (tmp_path / "a.parquet").write_bytes(data)
    items = read(tmp_path / "a.parquet")
    assert reasons(items) == {"unreadable": 1}
    assert len(texts(items)) >= 50


@pytest.mark.parametrize("source", ["absent", "absent/*.txt", "empty", "fifo", "a.jsonl.zst"])
def test_a_source_that_gives_nothing_is_told(tmp_path, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=source.partition("/")[0]):
        read(tmp_path / source)


def test_links_to_nothing_and_pipes_in_a_folder_are_counted(tmp_path):
    make(tmp_path, **{"a.txt": "1"})
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    items = read(tmp_path)
    assert texts(items) == ["1"]
    assert reasons(items) == {"unreadable": 2}


def test_an_unreadable_file_is_told(tmp_path, monkeypatch):
    make(tmp_path, **{"a.txt": "1", "b.txt": "2"})
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("b.txt") and allowed(path, mode))
    assert reasons(read(tmp_path)) == {"unreadable": 1}
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "b.txt")


def test_a_file_that_changes_after_planning_stops_the_work(tmp_path):
    make(tmp_path, **{"a.txt": "1"})
    files, skipped = find_files([str(tmp_path)])
    ((piece,),) = cut(files, 1 << 20, "text", skipped)
    (tmp_path / "a.txt").write_text("longer")
    with pytest.raises(UserError, match="changed while"):
        list(read_slice(piece, "text"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="cannot read"):
        list(read_slice(piece, "text"))


def test_units_are_consecutive_and_near_their_size(tmp_path):
    make(tmp_path, **{f"{i:03d}.txt": "x" * (i % 7 * 100 + 1) for i in range(100)})
    files, skipped = find_files([str(tmp_path)])
    units = cut(files, 2000, "text", skipped)
    assert [piece.file for unit in units for piece in unit] == files
    assert all(sum(piece.size for piece in unit) <= 2000 for unit in units)
    assert len(units) < 25

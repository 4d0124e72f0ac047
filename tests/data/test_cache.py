import fcntl
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from longscan.data import Corpus, DataPlan, RowLoader, ShardCache, Stage, TokenizerInfo, row_digest
from longscan.data.cache import SplitFiles
from longscan.errors import ConfigError, UserError


@pytest.fixture
def corpus(write_corpus):
    return write_corpus([[3000, 10], [2000], [4000], [1000, 1000]], seed=4)


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.failures > 0:
            self.server.failures -= 1
            return self.send_error(404)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(corpus):
    """A web server on the corpus's folder; the first `failures` requests fail."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=corpus.location))
    server.asked, server.failures = [], 0
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    server.corpus = replace(corpus, location=f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def read(corpus, cache, rows=range(20)):
    plan = DataPlan((corpus,), (Stage(500, 20, "best_fit"),), shuffle_window=1, cache=cache)
    return row_digest(RowLoader(plan).read(0, rows))


def kept(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")


def test_local_shards_are_used_in_place(corpus, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    expected = read(corpus, cache)
    assert read(replace(corpus, location=f"file:{corpus.location}"), cache) == expected
    assert read(replace(corpus, location=f"file://{corpus.location}"), None) == expected
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_missing_or_cut_local_shard_is_named(corpus, damage):
    path = Path(corpus.location, corpus.splits["train"].shards[2].file)
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, size - 100)
    found = "No such file" if damage == "missing" else f"holds {size - 100} bytes"
    with pytest.raises(UserError, match=rf"{path}.*{found}.*expected {size}"):
        read(corpus, None)


def test_a_changed_shard_is_found_by_checksum(corpus):
    path = Path(corpus.location, corpus.splits["train"].shards[1].file)
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    read(corpus, ShardCache())
    with pytest.raises(UserError, match=f"{path} has sha256"):
        read(corpus, ShardCache(verify="checksum"))
    with pytest.raises(ConfigError, match="verify is 'never'"):
        ShardCache(verify="never")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"no table", b"\x93NUMPY\x01\x00"])
def test_a_damaged_table_is_named(corpus, content):
    path = Path(corpus.location, corpus.splits["train"].shards[1].index)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} should be a table of 1 documents"):
        read(corpus, None)


def test_a_table_cut_short_is_named(corpus):
    path = Path(corpus.location, corpus.splits["train"].shards[0].index)
    os.truncate(path, path.stat().st_size - 16)
    with pytest.raises(UserError, match="should be a table of 2 documents"):
        read(corpus, None)


def test_urls_are_fetched_once_and_equal_the_local_shards(corpus, server, tmp_path):
    cache = ShardCache(tmp_path, backoff=0)
    assert read(server.corpus, cache) == read(corpus, None)
    assert len(server.asked) == len(set(server.asked)) == 8
    read(server.corpus, ShardCache(tmp_path))
    assert len(server.asked) == 8
    assert len(kept(tmp_path)) == 8 and not [name for name in kept(tmp_path) if name.endswith(".part")]


def test_pipes_are_urls(corpus, tmp_path):
    piped = replace(corpus, location=f"pipe:cat {corpus.location}")
    assert read(piped, ShardCache(tmp_path)) == read(corpus, None)


def test_a_url_needs_a_folder(server):
    with pytest.raises(ConfigError, match="is a URL; name a cache folder"):
        read(server.corpus, None)


def test_transfers_are_tried_again(server, tmp_path):
    server.failures = 3
    read(server.corpus, ShardCache(tmp_path, backoff=0.01))
    assert len(server.asked) == 8 + 3


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_hopeless_transfer_ends_in_one_sentence_and_leaves_nothing(corpus, server, tmp_path, damage):
    shard = corpus.splits["train"].shards[0]
    path, match = Path(corpus.location, shard.file), "exit 22"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, 1000)
        match = f"it has 1000 bytes, expected {shard.size}"
    else:
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
        match = "it has sha256"
    with pytest.raises(UserError, match=f"{shard.file} could not be fetched in 3 tries: .*{match}"):
        SplitFiles(server.corpus, "train", ShardCache(tmp_path, retries=2, backoff=0)).data(0)
    assert server.asked == [f"/{shard.file}"] * 3
    assert kept(tmp_path) == []


def test_the_least_recently_used_shard_goes_and_an_open_one_stays(server, tmp_path):
    shards = server.corpus.splits["train"].shards
    size = shards[0].size
    assert {shard.size for shard in shards} == {size}, "tar pads to blocks of 10 KiB"
    cache = ShardCache(tmp_path, max_bytes=2 * size)

    def use(number):
        return cache.open(server.corpus, shards[number].file, size, shards[number].sha256)

    def there():
        return [number for number in range(4) if shards[number].file in kept(tmp_path)]

    for number in (0, 1, 0):
        use(number).close()
    assert there() == [0, 1]
    use(2).close()
    assert there() == [0, 2]
    with use(0):
        use(3).close()
        assert there() == [0, 3]
        use(1).close()
        assert there() == [0, 1]
        with (
            use(1),
            pytest.raises(UserError, match=f"may hold {2 * size} bytes.*Raise its bound or lower shuffle_window"),
        ):
            use(2)
    assert there() == [0, 1]
    use(2).close()
    assert there() == [1, 2]


def test_a_mapped_shard_is_in_use(server, tmp_path):
    shards = server.corpus.splits["train"].shards
    cache = ShardCache(tmp_path, max_bytes=shards[0].size)
    files = SplitFiles(server.corpus, "train", cache)
    files.data(0)
    with pytest.raises(UserError, match="are in use"):
        SplitFiles(server.corpus, "train", cache).data(1)
    del files
    SplitFiles(server.corpus, "train", cache).data(1)
    assert kept(tmp_path) == [shards[1].file]


def test_what_a_killed_process_left_is_taken_over(corpus, server, tmp_path):
    name = corpus.splits["train"].shards[0].file
    folder = tmp_path / corpus.fingerprint
    folder.mkdir()
    (folder / f"{name}.part").write_bytes(b"half")
    assert (
        len(SplitFiles(server.corpus, "train", ShardCache(tmp_path)).data(0)) == corpus.splits["train"].shards[0].size
    )
    assert kept(tmp_path) == [name]


READER = """
import json, sys
from longscan.data import Corpus, DataPlan, RowLoader, ShardCache, Stage, row_digest
location, folder, manifest = json.load(sys.stdin)
cache = ShardCache(folder, max_bytes=50_000)
corpus = Corpus.from_manifest(location, manifest)
plan = DataPlan((corpus,), (Stage(500, 20, "best_fit"),), shuffle_window=1, cache=cache)
print(json.dumps(row_digest(RowLoader(plan).read(0, range(20)))))
"""


def test_processes_share_a_folder(corpus, server, tmp_path):
    given = json.dumps([server.corpus.location, str(tmp_path), corpus.to_manifest()])
    process = subprocess.Popen([sys.executable, "-c", READER], stdin=-1, stdout=-1, stderr=-1, text=True)
    here = read(server.corpus, ShardCache(tmp_path, max_bytes=50_000), rows=range(0, 20, 2))
    output, errors = process.communicate(given)
    there = json.loads(output or "null")
    assert there == read(corpus, None), errors
    assert here == there[::2]
    assert len(server.asked) == len(set(server.asked)) == 8


def test_a_second_reader_waits_for_the_first_transfer(corpus, server, tmp_path):
    """While another holds the part file, nobody fetches; once it is gone, one does."""
    name = corpus.splits["train"].shards[0].file
    part = tmp_path / corpus.fingerprint / f"{name}.part"
    part.parent.mkdir()
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        files = [SplitFiles(server.corpus, "train", ShardCache(tmp_path)) for _ in range(3)]
        threads = [threading.Thread(target=f.data, args=(0,)) for f in files]
        for thread in threads:
            thread.start()
        assert server.asked == []
    for thread in threads:
        thread.join(30)
    assert server.asked == [f"/{name}"]


def test_a_full_disk_is_said_so(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="is full while fetching"):
        SplitFiles(server.corpus, "train", ShardCache(tmp_path, backoff=0)).data(0)
    assert kept(tmp_path) == [] and len(server.asked) == 1


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a;b.tar", "a/../../b"])
def test_names_that_leave_the_folder_are_refused(corpus, name):
    with pytest.raises(UserError, match="may leave its folder"):
        ShardCache().open(corpus, name, None, "")


def test_tokens_are_mapped_not_copied(corpus):
    files = SplitFiles(corpus, "train")
    assert not files.table(0).flags.owndata and not files.table(0).flags.writeable
    assert np.frombuffer(files.data(0), np.uint8).base is not None


def test_the_home_folder_is_found_and_a_cache_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache("~/cache").directory == tmp_path / "cache"
    (tmp_path / "cache").write_text("a file")
    corpus = Corpus("pipe:cat /nowhere/{}", TokenizerInfo("bytes", None, 257, 256, 256, "bytes"), "uint8", {})
    with pytest.raises(UserError, match="cannot write to the cache .*cache"):
        ShardCache("~/cache").open(corpus, "a.tar", 1, "")

"""A corpus depends on its input and arguments alone: not on workers, nor on where and how often it was killed."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset

from longscan.data import shards
from longscan.data.bpe import train_bpe
from longscan.data.index import open_corpus
from longscan.data.prepare import prepare_corpus
from longscan.data.shards import read_documents, rebuild_index
from longscan.data.tokenizer import corpus_tokenizer
from longscan.data.units import split_position
from longscan.errors import ConfigError, UserError

SHARD = 1 << 16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Some 1.2 MB of text in 150 files and a JSON lines file, a few of them bad."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    words = ["scan", "state", "gate", "décaye", "carry", "\n", "row", "☕"]
    for i in range(150):
        (folder / f"f{i:03d}.txt").write_text(" ".join(rng.choice(words, rng.integers(1, 2000))))
    (folder / "empty.txt").write_text("")
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    lines = [json.dumps({"text": f"line {i} " + "x" * (i % 300)}) for i in range(2000)]
    (folder / "z.jsonl").write_text("\n".join([*lines, "{", '{"other": 1}']) + "\n")
    return folder


@pytest.fixture(scope="module")
def bpe_file(source, tmp_path_factory):
    return train_bpe([str(source)], tmp_path_factory.mktemp("bpe") / "tokenizer.json", 300)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The corpus that an uninterrupted preparation makes."""
    output = tmp_path_factory.mktemp("whole") / "corpus"
    prepare(source, output)
    return output


def prepare(source, output, **options):
    return prepare_corpus([str(source)], output, **{"shard_bytes": SHARD, "workers": 1, **options})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(location, split):
    corpus = open_corpus(location)
    tokenizer = corpus_tokenizer(corpus)
    for shard in corpus.splits[split].shards:
        for tokens, size in read_documents(Path(location, shard.file), Path(location, shard.index), corpus.dtype):
            text = tokenizer.decode(tokens)
            assert len(text.encode()) == size
            yield text


def expected_texts(source):
    """(name, text) of every good document in order."""
    for path in sorted(source.iterdir()):
        if path.suffix == ".txt" and path.stem not in ("empty", "bad"):
            yield path.name, path.read_text()
    position = 0
    for line in (source / "z.jsonl").read_bytes().splitlines(keepends=True)[:2000]:
        yield f"z.jsonl:{position}", json.loads(line)["text"]
        position += len(line)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_in_its_split_in_order(source, bpe_file, tmp_path, tokenizer):
    report = prepare(source, tmp_path / "c", tokenizer=str(bpe_file) if tokenizer == "bpe" else "bytes")
    documents = list(expected_texts(source))
    train = [text for name, text in documents if split_position(name) >= 0.02]
    heldout = [text for name, text in documents if split_position(name) < 0.02]
    assert list(texts_of(tmp_path / "c", "train")) == train
    assert list(texts_of(tmp_path / "c", "heldout")) == heldout != []
    assert report.splits["train"].documents == len(train)
    assert report.splits["train"].bytes == sum(len(text.encode()) for text in train)


def test_what_is_skipped_is_counted_in_report_manifest_and_log(source, tmp_path):
    report = prepare(source, tmp_path / "c")
    counts = {"bad_json": 1, "bad_utf8": 1, "empty": 1, "missing_field": 1}
    assert report.skipped == counts
    assert json.loads((tmp_path / "c/manifest.json").read_text())["counts"]["skipped"] == counts
    log = [json.loads(line) for line in (tmp_path / "c/prepare.log.jsonl").read_text().splitlines()]
    assert sorted(entry["reason"] for entry in log) == sorted(counts)
    assert {entry["path"] for entry in log} == {str(source / name) for name in ("bad.txt", "empty.txt", "z.jsonl")}


def test_shards_are_sound_and_webdataset_reads_them(whole):
    corpus = open_corpus(whole)
    assert len(corpus.splits["train"].shards) > 10
    assert len(corpus.splits["heldout"].shards) == 1
    names = [shard.file for shard in corpus.splits["train"].shards]
    assert names == [f"train/{i:05d}.tar" for i in range(len(names))]
    for split in corpus.splits.values():
        for shard in split.shards:
            np.testing.assert_array_equal(rebuild_index(whole / shard.file), np.load(whole / shard.index))
            assert (whole / shard.file).stat().st_size == shard.size
            assert shard.tokens <= SHARD
    urls = [str(whole / name) for name in names]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sum(len(sample["tokens"]) for sample in samples) == corpus.splits["train"].tokens
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    assert {path.name for path in whole.iterdir()} == {"manifest.json", "prepare.log.jsonl", "train", "heldout"}


def test_worker_processes_make_the_same_bytes(source, whole, tmp_path):
    seen = []
    prepare(source, tmp_path / "c", workers=2, progress=lambda done, total: seen.append((done, total)))
    assert files_of(tmp_path / "c") == files_of(whole)
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


KILLED = """
import sys
from longscan.data.prepare import prepare_corpus
if __name__ == "__main__":
    prepare_corpus([sys.argv[1]], sys.argv[2], shard_bytes=1 << 16, workers=2)
"""


def test_killed_in_the_middle_it_continues(source, whole, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    output = tmp_path / "c"
    process = subprocess.Popen([sys.executable, script, source, output])
    deadline = time.monotonic() + 60
    while not (output / ".prepare/unit-000003").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (output / "manifest.json").exists()
    with pytest.raises(ConfigError, match="not finished"):
        open_corpus(output)
    finished = {path.name: path.stat().st_mtime_ns for path in (output / ".prepare").glob("unit-00000[0-3]")}
    assert finished
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    redone = []
    prepare(source, output, progress=lambda done, total: redone.append(done))
    assert redone[0] > 0, "finished units are not done again"
    assert files_of(output) == files_of(whole)


def crash_at(step: int, source, output, **options) -> bool:
    """Runs a preparation in a child that dies at its `step`-th change of a name; True where it came to its end."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(change):
            def changed(*arguments, **options):
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return change(*arguments, **options)

            return changed

        os.replace, os.rename, os.rmdir = map(counted, (os.replace, os.rename, os.rmdir))
        try:
            prepare(source, output, **options)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


@pytest.fixture
def few(tmp_path):
    """Enough files for three units, one of them bad."""
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(18):
        (folder / f"{i}.txt").write_text(f"document {i} " * 700)
    (folder / "empty.txt").write_text("")
    return folder


def test_killed_at_any_step_it_continues(few, tmp_path):
    prepare(few, tmp_path / "whole", heldout=0.3)
    expected = files_of(tmp_path / "whole")
    step, finished = 0, False
    while not finished:
        step += 1
        finished = crash_at(step, few, tmp_path / f"c{step}", heldout=0.3)
        prepare(few, tmp_path / f"c{step}", heldout=0.3)
        assert files_of(tmp_path / f"c{step}") == expected, f"killed at step {step}"
    assert step > 15


def test_killed_again_and_again_it_gets_there(few, tmp_path):
    prepare(few, tmp_path / "whole", heldout=0.3)
    while not crash_at(4, few, tmp_path / "c", heldout=0.3):
        pass
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


def test_prepared_again_it_is_already_there(source, tmp_path):
    first = prepare(source, tmp_path / "c")
    before = files_of(tmp_path / "c")
    again = prepare(source, tmp_path / "c", workers=2)
    assert again.already_there and not first.already_there
    assert again.skipped == first.skipped
    assert again.to_dict()["splits"] == first.to_dict()["splits"]
    assert files_of(tmp_path / "c") == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_or_inputs_are_refused(tmp_path, finished):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text("x" * 9000)
    prepare(folder, tmp_path / "c") if finished else crash_at(5, folder, tmp_path / "c")
    before = files_of(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"heldout 0\.02, now 0\.1"):
        prepare(folder, tmp_path / "c", heldout=0.1)
    (folder / "0.txt").write_text("longer than before")
    with pytest.raises(ConfigError, match="input files have changed"):
        prepare(folder, tmp_path / "c")
    assert files_of(tmp_path / "c") == before


def test_two_preparations_of_one_folder_are_refused(source, tmp_path):
    import fcntl

    (tmp_path / "c/.prepare").mkdir(parents=True)
    with open(tmp_path / "c/.prepare/lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another preparation"):
            prepare(source, tmp_path / "c")


def test_a_full_disk_is_told_and_what_is_finished_stays(source, whole, tmp_path, monkeypatch):
    write, room = shards._Sink.write, [300_000]

    def limited(sink, data):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(sink, data)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", pytest.PytestUnraisableExceptionWarning)
        patch.setattr(shards._Sink, "write", limited)
        with pytest.raises(UserError, match="no room left on the disk .* run again"):
            prepare(source, tmp_path / "c")
    assert len(list((tmp_path / "c/.prepare").glob("unit-*"))) >= 2
    assert not list((tmp_path / "c/.prepare").glob("*.tmp-*"))
    prepare(source, tmp_path / "c")
    assert files_of(tmp_path / "c") == files_of(whole)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.5])
def test_no_split_is_empty_where_two_documents_allow(tmp_path, count, share):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"document {i} " * 3000)
    report = prepare(folder, tmp_path / "c", heldout=share)
    documents = {name: split.documents for name, split in report.splits.items()}
    assert sum(documents.values()) == count
    assert documents["train"] >= 1
    assert (documents["heldout"] >= 1) == (count > 1 and share > 0)


def test_the_only_document_is_trained_on_even_if_its_name_is_held_out(tmp_path):
    name = next(f"{i}.txt" for i in range(1000) if split_position(f"{i}.txt") < 0.02)
    (tmp_path / name).write_text("text")
    report = prepare(tmp_path / name, tmp_path / "c")
    assert (report.splits["train"].documents, report.splits["heldout"].documents) == (1, 0)


def test_a_bpe_is_trained_first_and_kept_through_a_crash(source, tmp_path):
    report = prepare(source, tmp_path / "c", train_bpe=290)
    assert report.corpus.tokenizer.vocab_size == 290
    assert report.corpus.dtype == "uint16"
    assert len(list(texts_of(tmp_path / "c", "train"))) == report.splits["train"].documents
    assert prepare(source, tmp_path / "c", train_bpe=290).already_there


def test_an_empty_corpus_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match="no document in .*1 missing_field.*--field"):
        prepare(tmp_path / "a.jsonl", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    prepare(tmp_path / "a.jsonl", tmp_path / "c", field="body")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout": 0.9}, "held-out share is 0.9"),
        ({"workers": 0}, "0 workers"),
        ({"shard_bytes": 10}, "10 bytes is too small"),
        ({"train_bpe": 10}, "10 were asked for"),
        ({"train_bpe": 300, "tokenizer": "x.json"}, "exclude each other"),
        ({"tokenizer": "x.json"}, "cannot read the tokenizer"),
    ],
)
def test_bad_options_write_nothing(source, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(source, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_a_folder_that_holds_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"no corpus \(notes.txt\)"):
        prepare(source, tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        prepare(source, tmp_path / "notes.txt")
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(ConfigError, match="no source"):
        prepare_corpus([], tmp_path / "c")

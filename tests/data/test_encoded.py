"""Corpora that come as ids become the corpus that their text makes, however they were stored."""

import json
from pathlib import Path

import numpy as np
import pytest
from stored_formats import write_mds, write_pair

from longscan.data import load_tokenizer
from longscan.data.bpe import train_bpe
from longscan.data.prepare import prepare_corpus
from longscan.data.shards import read_documents
from longscan.data.units import split_position
from longscan.errors import ConfigError

TEXTS = [f"Document {i}: " + "naïve ☕ scan, state\n" * (i * 13 % 47) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return train_bpe([str(folder / "texts.jsonl")], folder / "tokenizer.json", 400)


@pytest.fixture(scope="module")
def encoded(tokenizer_file):
    """The ids of each text."""
    return [ids.tolist() for ids in load_tokenizer(str(tokenizer_file)).encode_documents([t.encode() for t in TEXTS])]


@pytest.fixture
def stored(tmp_path, encoded, tokenizer_file):
    """Stores the ids in a format, an end token after each document: the folder or stem to prepare from."""
    end = load_tokenizer(str(tokenizer_file)).info.eos_id

    def store(form: str, documents=encoded):
        ended = [[*ids, end] for ids in documents]
        if form == "megatron":
            (tmp_path / "m").mkdir()
            return write_pair(tmp_path / "m/text_document", [[ids] for ids in ended])
        if form == "packed":  # samples of 1000 ids that begin and end inside documents
            flat = [i for ids in ended for i in ids]
            samples = [{"tokens": flat[i : i + 1000]} for i in range(0, len(flat), 1000)]
            return write_mds(tmp_path / "p", {"tokens": "ndarray:uint16"}, samples[:9], samples[9:])
        samples = [{"input_ids": np.array(ids, "<i8").tobytes()} for ids in ended]
        return write_mds(tmp_path / "s", {"input_ids": "bytes"}, samples[:100], samples[100:])

    return store


def prepare(source, output, tokenizer_file, **options):
    options = {"shard_bytes": 1 << 16, "workers": 1, "heldout": 0.1, "tokenizer": str(tokenizer_file), **options}
    return prepare_corpus([str(source)], output, **options)


def documents_of(report, split):
    """(ids, bytes of text) of each document."""
    corpus = report.corpus
    return [
        (tokens.tolist(), size)
        for shard in corpus.splits[split].shards
        for tokens, size in read_documents(
            Path(corpus.location, shard.file), Path(corpus.location, shard.index), corpus.dtype
        )
    ]


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("megatron", [f"text_document.idx:{i}" for i in range(300)]),
        ("samples", [f"shard.00000.mds:{i}" for i in range(100)] + [f"shard.00001.mds:{i}" for i in range(200)]),
    ],
)
def test_ids_give_the_corpus_of_their_text(tmp_path, stored, encoded, tokenizer_file, form, names):
    report = prepare(stored(form), tmp_path / "c", tokenizer_file)
    for split, held in (("train", False), ("heldout", True)):
        chosen = [i for i, name in enumerate(names) if (split_position(name) < 0.1) == held]
        assert documents_of(report, split) == [(encoded[i], len(TEXTS[i].encode())) for i in chosen] != []
    assert report.skipped == {}


def test_packed_samples_come_apart_into_documents(tmp_path, stored, encoded, tokenizer_file):
    report = prepare(stored("packed"), tmp_path / "c", tokenizer_file, heldout=0)
    documents = documents_of(report, "train")
    assert [i for ids, _ in documents for i in ids] == [i for ids in encoded for i in ids]
    whole = [(ids, len(text.encode())) for ids, text in zip(encoded, TEXTS, strict=True)]
    cuts = sum(map(len, encoded)) // 1000 + 1
    assert sum(document in whole for document in documents) >= len(TEXTS) - cuts
    assert len(documents) <= len(TEXTS) + cuts


@pytest.mark.parametrize("form", ["megatron", "packed"])
def test_workers_and_an_interruption_change_nothing(tmp_path, stored, tokenizer_file, form, monkeypatch):
    from longscan.data import units, workers

    source = stored(form)
    report = prepare(source, tmp_path / "whole", tokenizer_file)
    assert len(report.splits["train"].shards) > 1
    finish, left = units.run_unit, [1]

    def stopping(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        finish(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers, "run_unit", stopping)
        prepare(source, tmp_path / "c", tokenizer_file)
    assert list((tmp_path / "c/.prepare").glob("unit-*"))
    prepare(source, tmp_path / "c", tokenizer_file, workers=2 if form == "megatron" else 1)
    files = [
        sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (tmp_path / "whole", tmp_path / "c")
    ]
    assert files[0] == files[1]
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "c" / name).read_bytes() for name in files[0])
    assert prepare(source, tmp_path / "c", tokenizer_file).already_there


@pytest.mark.parametrize("form", ["megatron", "packed", "samples"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bytes"}, ":0 holds token ids, which need the tokenizer they were made with: give --tokenizer"),
        ({"tokenizer": "bytes", "train_bpe": 300}, "holds token ids"),
    ],
)
def test_ids_without_their_tokenizer_are_refused(tmp_path, stored, tokenizer_file, form, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(stored(form), tmp_path / "c", tokenizer_file, **options)
    assert not (tmp_path / "c").exists()


def test_ids_of_another_tokenizer_are_refused_before_anything_is_written(tmp_path, stored, tokenizer_file, encoded):
    with pytest.raises(ConfigError, match=r"idx:5 holds id 400, but the tokenizer has 400 tokens; give with --tok"):
        prepare(stored("megatron", [*encoded[:5], [3, 400]]), tmp_path / "c", tokenizer_file)
    assert not (tmp_path / "c").exists()


def test_an_id_that_no_look_found_stops_the_work(tmp_path, stored, tokenizer_file, encoded):
    with pytest.raises(ConfigError, match=r"idx:290 holds id 65535, but the tokenizer has 400 tokens"):
        prepare(
            stored("megatron", [*encoded[:290], [65535], *encoded[290:]]), tmp_path / "c", tokenizer_file,
            shard_bytes=1 << 20,
        )  # fmt: skip
    assert not (tmp_path / "c/manifest.json").exists()


def test_documents_of_end_tokens_alone_are_counted_as_empty(tmp_path, stored, tokenizer_file, encoded):
    report = prepare(stored("megatron", [*encoded[:9], [], encoded[9]]), tmp_path / "c", tokenizer_file)
    assert report.skipped == {"empty": 1}
    assert sum(split.documents for split in report.splits.values()) == 10


def test_text_and_ids_make_one_corpus(tmp_path, stored, tokenizer_file, encoded):
    (tmp_path / "notes.txt").write_text(TEXTS[7])
    report = prepare_corpus(
        [str(stored("megatron")), str(tmp_path / "notes.txt")], tmp_path / "c", tokenizer=str(tokenizer_file),
        heldout=0, shard_bytes=1 << 20,
    )  # fmt: skip
    assert [ids for ids, _ in documents_of(report, "train")] == [*encoded, encoded[7]]


def test_long_documents_are_measured_in_pieces(monkeypatch, tokenizer_file, encoded):
    from longscan.data import encoded as module
    from longscan.data.sources import EncodedDocument

    monkeypatch.setattr(module, "_DECODED", 50)
    tokenizer = load_tokenizer(str(tokenizer_file))
    longest = max(range(300), key=lambda i: len(encoded[i]))
    document = EncodedDocument("a", np.array([i for i in encoded[longest] if i < 256]))
    ((_, _, size),) = module.encode([document], tokenizer)
    assert abs(size - len(tokenizer.decode(document.ids).encode())) <= 4 * len(document.ids) // 50

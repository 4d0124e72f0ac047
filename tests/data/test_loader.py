import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from longscan.data import IGNORED_LABEL, PACKINGS, DataPlan, HeldoutRows, RowLoader, Split, Stage, documents, row_digest
from longscan.data.index import DOCUMENT
from longscan.errors import ConfigError, UserError
from longscan.kernels import Segments


@pytest.fixture(scope="module", params=["uint8", "uint16", "uint32"])
def corpus(request, write_corpus):
    rng = np.random.default_rng(3)
    train = [[*rng.integers(0, 60, 20), 0, 1] for _ in range(4)]
    vocab_size = 257 if request.param == "uint8" else 300
    return write_corpus(train, [[5, 0, 40], [33]], request.param, 3, vocab_size, bytes_a_token=3)


def expected_row(corpus, stored, pieces):
    """Inputs, labels and bytes of a row, spelt out from the documents."""
    info, inputs, labels, text_bytes = corpus.tokenizer, [], [], 0
    for _, shard, document, start, length in pieces:
        tokens = stored(corpus, "train", shard, document).tolist()
        inputs += [info.bos_id, *tokens][start : start + length]
        labels += [*tokens, info.eos_id][start : start + length]
        text_bytes += 3 * len(tokens[start : start + length])
    return inputs, labels, text_bytes


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_hold_what_the_documents_say(corpus, stored, packing):
    plan = DataPlan((corpus,), (Stage(37, 300, packing),), seed=1, shuffle_window=3)
    rows = [0, 299, 17, 18, 130]
    batch = RowLoader(plan).read(0, rows)
    assert batch.inputs.dtype == batch.labels.dtype == torch.int64
    assert batch.rows == tuple((0, row) for row in rows)
    expected = [expected_row(corpus, stored, plan.row(0, row).pieces) for row in rows]
    assert batch.inputs.tolist() == [row[0] for row in expected]
    assert batch.labels.tolist() == [row[1] for row in expected]
    assert batch.text_bytes == sum(row[2] for row in expected)
    lengths = [[piece.length for piece in plan.row(0, row).pieces] for row in rows]
    segments = Segments.from_lengths(lengths)
    for name in ("cu_seqlens", "continues", "doc_start"):
        got, wanted = getattr(batch, name), getattr(segments, name)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted), name


def test_every_token_and_every_document_end_is_a_label_once_an_epoch(corpus):
    positions = corpus.splits["train"].tokens + corpus.splits["train"].documents
    plan = DataPlan((corpus,), (Stage(1, positions),), shuffle_window=2)
    batch = RowLoader(plan).read(0, range(positions))
    assert int((batch.labels == corpus.tokenizer.eos_id).sum()) == corpus.splits["train"].documents
    assert batch.text_bytes == corpus.splits["train"].bytes


def test_two_corpora_and_dummy_rows(corpus, write_corpus):
    info = corpus.tokenizer
    other = write_corpus([[200, 3]], seed=9, vocab_size=info.vocab_size)
    plan = DataPlan((corpus, other), (Stage(16, 40),), weights=(1, 1))
    loader = RowLoader(plan)
    whole = loader.read(0, range(6))
    assert {plan.row(0, row).corpus for row in range(6)} == {0, 1}
    batch = loader.read(0, [None, 4, None])
    assert torch.equal(batch.inputs[1], whole.inputs[4]) and torch.equal(batch.labels[1], whole.labels[4])
    assert (batch.labels[[0, 2]] == IGNORED_LABEL).all() and (batch.inputs[[0, 2]] == info.bos_id).all()
    assert batch.rows == ((), (0, 4), ())
    assert batch.valid_tokens == 16
    only = loader.read(0, [None])
    assert only.text_bytes == 0 and only.cu_seqlens.tolist() == [0, 16] and not only.doc_start.any()


def test_the_same_rows_however_they_are_dealt(corpus):
    """A step's rows on 1, 2 and 3 replicas, with dummies where they do not divide."""
    plan = DataPlan((corpus,), (Stage(37, 300, "best_fit"),), seed=1)
    digests = []
    for replicas in (1, 2, 3):
        share = -(-10 // replicas)
        seen = {}
        for replica in range(replicas):
            rows = [r if r < 10 else None for r in range(replica, replica + share * replicas, replicas)]
            batch = RowLoader(plan).read(0, rows)
            seen |= {name: digest for name, digest in zip(batch.rows, row_digest(batch), strict=True) if name}
        digests.append(dict(sorted(seen.items())))
    assert digests[0] == digests[1] == digests[2] and len(digests[0]) == 10


def test_row_digest_sees_inputs_and_labels(corpus):
    batch = RowLoader(DataPlan((corpus,), (Stage(16, 4),))).read(0, [0, 1])
    first = row_digest(batch)
    assert len(set(first)) == 2
    labels = batch.labels.clone()
    labels[1, 3] += 1
    assert [a == b for a, b in zip(first, row_digest(replace(batch, labels=labels)), strict=True)] == [True, False]


# Held-out rows


def test_heldout_rows_are_the_split_in_order_with_padding_of_its_own(corpus, stored):
    heldout = HeldoutRows(corpus, 32)
    info = corpus.tokenizer
    order = [(0, 0), (0, 1), (0, 2), (1, 0)]
    inputs, labels = [], []
    for shard, document in order:
        tokens = stored(corpus, "heldout", shard, document).tolist()
        inputs += [info.bos_id, *tokens]
        labels += [*tokens, info.eos_id]
    assert len(heldout) == 3 and len(inputs) == 82
    batch = heldout.read([0, 1, 2, None])
    padding = 4 * 32 - 82
    assert batch.inputs.flatten().tolist() == inputs + [info.bos_id] * padding
    assert batch.labels.flatten().tolist() == labels + [IGNORED_LABEL] * padding
    assert batch.text_bytes == 3 * 78
    assert batch.cu_seqlens.tolist() == [0, 6, 7, 32, 48, 64, 82, 96, 128]
    assert batch.rows == ((-1, 0), (-1, 1), (-1, 2), ())
    assert batch.doc_start.tolist()[82:96] == [18] * 14


def test_whole_documents(corpus, stored):
    found = list(documents(corpus, "heldout", min_tokens=6))
    assert [(d.shard, d.document, d.text_bytes) for d in found] == [(0, 2, 120), (1, 0, 99)]
    assert all(np.array_equal(d.tokens, stored(corpus, "heldout", d.shard, d.document)) for d in found)
    assert [len(d.tokens) for d in documents(corpus)] == [5, 0, 40, 33]


def test_a_missing_or_empty_split_is_named(corpus, write_corpus):
    with pytest.raises(ConfigError, match="no split 'test'"):
        HeldoutRows(corpus, 8, split="test")
    with pytest.raises(ConfigError, match="no document in its heldout split"):
        HeldoutRows(write_corpus([[9]]), 8)


# Prefetch


def test_prefetch_gives_the_schedule_in_order(corpus):
    loader = RowLoader(DataPlan((corpus,), (Stage(16, 100),)))
    schedule = [(0, [step, None, step + 50]) for step in range(30)]
    with loader.prefetch(schedule, depth=3) as batches:
        got = [batch.rows for batch in batches]
    assert got == [((0, step), (), (0, step + 50)) for step in range(30)]
    assert not [thread for thread in threading.enumerate() if thread.name == "row-loader"]


def test_prefetch_of_an_endless_schedule_closes(corpus):
    loader = RowLoader(DataPlan((corpus,), (Stage(16),)))
    batches = loader.prefetch(((0, [step]) for step in iter(int, 1)), depth=1)
    next(batches)
    batches.close()
    assert not batches._thread.is_alive()
    with pytest.raises(StopIteration):
        next(batches)


def test_an_abandoned_prefetch_ends_its_thread(corpus):
    loader = RowLoader(DataPlan((corpus,), (Stage(16),)))
    batches = loader.prefetch((0, [0]) for _ in iter(int, 1))
    thread = batches._thread
    del batches
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_of_the_thread_reaches_the_consumer_after_the_batches_before_it(corpus):
    loader = RowLoader(DataPlan((corpus,), (Stage(16, 2),)))
    batches = loader.prefetch([(0, [0]), (0, [1]), (0, [2])])
    assert [next(batches).rows, next(batches).rows] == [((0, 0),), ((0, 1),)]
    with pytest.raises(AssertionError, match="row 2 of stage 0"):
        next(batches)
    assert not batches._thread.is_alive()


# Damage


def test_pinning_without_a_gpu_is_refused(corpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="pin_memory"):
        RowLoader(DataPlan((corpus,), (Stage(16, 2),)), pin_memory=True)


def test_a_token_outside_the_vocabulary_is_refused(write_corpus):
    corpus = write_corpus([[50]], vocab_size=9)
    with pytest.raises(UserError, match="its vocabulary has 9"):
        RowLoader(DataPlan((corpus,), (Stage(16, 2),))).read(0, [0])


def test_a_table_that_points_outside_its_shard_is_refused(write_corpus):
    corpus = write_corpus([[50]], [[50]])
    for split in ("train", "heldout"):
        shard = corpus.splits[split].shards[0]
        table = np.load(f"{corpus.location}/{shard.index}")
        assert table.dtype == DOCUMENT
        table["offset"] = shard.size - 49
        np.save(f"{corpus.location}/{shard.index}", table)
    match = "points to byte [0-9]+ of .*, which has"
    with pytest.raises(UserError, match=match):
        RowLoader(DataPlan((corpus,), (Stage(16, 2),))).read(0, [0])
    with pytest.raises(UserError, match=match):
        list(documents(corpus))


def test_splits_share_nothing(write_corpus):
    corpus = write_corpus([[20]], [[20]])
    assert isinstance(corpus.splits["train"], Split)
    train = RowLoader(DataPlan((corpus,), (Stage(21, 1),))).read(0, [0])
    assert not torch.equal(train.labels, HeldoutRows(corpus, 21).read([0]).labels)

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longscan.data import Corpus, Cursor, DataPlan, ShardInfo, Split, Stage, TokenizerInfo
from longscan.data.cache import SplitFiles
from longscan.data.mixing import SLOTS, Mixture
from longscan.data.streams import CorpusStream, permutation
from longscan.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def corpora(write_corpus):
    """Three corpora of different shape; one has an empty shard and documents without tokens."""
    rng = np.random.default_rng(1)
    return (
        write_corpus([rng.integers(0, 40, 20) for _ in range(5)], seed=1),
        write_corpus([rng.integers(0, 9, 50), [], rng.integers(0, 300, 4)], seed=2),
        write_corpus([[500]], seed=3),
    )


def pieces_of(plan, stage, rows):
    return [list(plan.row(stage, row).pieces) for row in range(rows)]


def covered(rows):
    """The stream positions that rows hold, ascending."""
    pieces = [p for row in rows for p in zip(row.pieces.position.tolist(), row.pieces.length.tolist(), strict=True)]
    return np.sort(np.concatenate([np.arange(a, a + n) for a, n in pieces])) if pieces else np.zeros(0, int)


# The stream of one corpus


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_an_epoch_holds_every_position_of_every_document_once(corpora, window):
    for corpus in corpora:
        stream = CorpusStream(SplitFiles(corpus, "train"), 0, 7, window)
        for epoch in range(3):
            pieces = stream.resolve(np.array([epoch * stream.total]), np.array([(epoch + 1) * stream.total]))
            assert (pieces.start == 0).all() and (pieces.length == pieces.total).all()
            documents = sorted(zip(pieces.shard.tolist(), pieces.document.tolist(), strict=True))
            shards = corpus.splits["train"].shards
            assert documents == [(s, d) for s, shard in enumerate(shards) for d in range(shard.documents)]


def test_epochs_differ_and_windows_keep_their_shards_together(corpora):
    stream = CorpusStream(SplitFiles(corpora[0], "train"), 0, 7, 2)
    orders = []
    for epoch in range(2):
        pieces = stream.resolve(np.array([epoch * stream.total]), np.array([(epoch + 1) * stream.total]))
        orders.append(list(zip(pieces.shard.tolist(), pieces.document.tolist(), strict=True)))
        assert [len(set(pieces.shard[a:b].tolist())) for a, b in ((0, 40), (40, 80), (80, 100))] == [2, 2, 1]
    assert orders[0] != orders[1]


def test_any_interval_is_the_slice_of_the_epoch(corpora):
    stream = CorpusStream(SplitFiles(corpora[1], "train"), 0, 3, 2)

    def walk(pieces):
        return [(s, d, start + i) for _, s, d, start, n in pieces for i in range(n)]

    whole = walk(stream.resolve(np.array([0]), np.array([2 * stream.total])))
    rng = np.random.default_rng(0)
    for _ in range(50):
        bounds = np.sort(rng.choice(2 * stream.total, 6, replace=False))
        begins, ends = bounds[::2], bounds[1::2]
        expected = [p for a, b in zip(begins, ends, strict=True) for p in whole[a:b]]
        assert walk(stream.resolve(begins, ends)) == expected


def test_permutation_is_a_permutation_with_fixed_keys():
    assert sorted(permutation(1000, 5, 1).tolist()) == list(range(1000))
    assert permutation(8, 5, 1).tolist() != permutation(8, 1, 5).tolist()
    assert permutation(9, 2, 3, 2**64 - 1).tolist() == sorted(range(9), key=lambda i: key(i, 2, 3, 2**64 - 1))


def key(i, *words):
    """splitmix64 in plain integers: the (i + 1)-th output from a state that the words have stirred."""

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    state = 0
    for word in words:
        state = mix(((state ^ word) + 0x9E3779B97F4A7C15) % 2**64)
    return mix((state + 0x9E3779B97F4A7C15 * (i + 1)) % 2**64)


# Mixing


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=30))
def test_mixture_is_shared_evenly_and_found_in_closed_form(weights):
    mixture = Mixture.of(tuple(weights), "weights")
    assert sum(mixture.counts) == SLOTS
    shares = np.array(weights) / sum(weights)
    assert (np.abs(np.array(mixture.counts) - shares * SLOTS) < 1).all()
    taken = np.cumsum(mixture.pattern[:, None] == np.arange(len(weights)), axis=0)
    expected = np.arange(1, SLOTS + 1)[:, None] * np.array(mixture.counts) / SLOTS
    bound = 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0
    assert np.abs(taken - expected).max() <= bound + 1e-9
    for row in (0, 1, SLOTS - 1, SLOTS, 3 * SLOTS + 17):
        corpus, k = mixture.locate(row)
        blocks, slot = divmod(row, SLOTS)
        assert k == blocks * mixture.counts[corpus] + np.sum(mixture.pattern[:slot] == corpus)
        assert mixture.rows(corpus, row + 1) == k + 1


PATTERNS = ["f8a9e965c14a0583", "510c70ccdcc9c686", "d7892d4840d18772"]


def test_the_pattern_is_frozen():
    """As with the order of rows: whoever changes it changes every saved run that mixes corpora."""
    patterns = [Mixture.of(weights, "weights").pattern for weights in ((2.0, 1.0), (5.0, 3.0, 1.0, 0.7), (1.0,) * 33)]
    digests = [hashlib.sha256(pattern.astype("<i8").tobytes()).hexdigest()[:16] for pattern in patterns]
    assert digests == PATTERNS


def test_a_weight_without_a_slot_is_refused(corpora):
    with pytest.raises(ConfigError, match="1e-05 for corpus 1"):
        DataPlan(corpora, (Stage(8, 10),), (1.0, 1e-5, 1.0))
    with pytest.raises(ConfigError, match="positive"):
        DataPlan(corpora, (Stage(8, 10),), (1.0, 0.0, 1.0))


# Plans


@st.composite
def plans(draw):
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        seq_len, rows = draw(st.sampled_from([1, 7, 16, 33])), draw(st.integers(1, 400))
        weights = draw(st.sampled_from([None, (1.0, 1.0, 1.0), (5.0, 0.0, 1.0)]))
        stages.append(Stage(seq_len, rows, draw(st.sampled_from(["concat", "best_fit"])), weights))
    return {
        "stages": tuple(stages),
        "weights": draw(st.sampled_from([None, (1.0, 2.0, 3.0)])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "shuffle_window": draw(st.integers(1, 6)),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_every_position_once_across_stages_packings_and_mixes(corpora, options):
    plan = DataPlan(corpora, **options)
    rows = [plan.row(s, r) for s, stage in enumerate(plan.stages) for r in range(stage.rows or 0)]
    for row in rows:
        assert int(row.pieces.length.sum()) == plan.stages[row.stage].seq_len
    last = len(plan.stages) - 1
    for corpus in range(len(corpora)):
        used = covered([row for row in rows if row.corpus == corpus])
        assert len(np.unique(used)) == len(used), "a position twice"
        count = plan.mixtures[last].rows(corpus, plan.stages[last].rows)
        left = plan._rows(last, corpus).after(count)
        left_over = [np.arange(a, b) for a, b in zip(left.begins, left.ends, strict=True)]
        assert np.array_equal(np.sort(np.concatenate([used, *left_over])), np.arange(left.tail)), "a position skipped"
    end = Cursor(last, plan.stages[last].rows)
    used = [len(covered([row for row in rows if row.corpus == corpus])) for corpus in range(len(corpora))]
    assert plan.epochs(end) == [n / stream.total for n, stream in zip(used, plan.streams, strict=True)]
    assert plan.positions(end) == sum(used)


TWO_STAGES = (Stage(16, 300, "best_fit"), Stage(40, 90, "concat"), Stage(8, None, "best_fit"))


ANOTHER_PROCESS = """
import json, sys
from longscan.data import Corpus, DataPlan
given = json.load(sys.stdin)
plan = DataPlan.from_dict(given["plan"], tuple(Corpus.from_manifest(*corpus) for corpus in given["corpora"]))
print(json.dumps([list(plan.row(*at).pieces) for at in given["asked"]]))
"""


def test_rows_do_not_depend_on_who_asks_nor_in_which_order(corpora):
    plan = DataPlan(corpora, TWO_STAGES, seed=4, shuffle_window=2)
    asked = [(s, r) for s in range(3) for r in range(0, 90, 7)]
    expected = [list(plan.row(*at).pieces) for at in asked]
    order = np.random.default_rng(0).permutation(len(asked)).tolist()
    again = DataPlan(corpora, TWO_STAGES, seed=4, shuffle_window=2)
    got = {i: list(again.row(*asked[i]).pieces) for i in order}
    assert [got[i] for i in range(len(asked))] == expected
    manifests = [(corpus.location, corpus.to_manifest()) for corpus in corpora]
    given = json.dumps({"plan": plan.to_dict(), "corpora": manifests, "asked": asked})
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS], input=given, capture_output=True, text=True, check=True
    )
    assert [[tuple(piece) for piece in row] for row in json.loads(done.stdout)] == expected


def test_a_plan_travels_without_what_it_has_loaded(corpora):
    plan = DataPlan(corpora, TWO_STAGES)
    plan.row(0, 0)
    again = pickle.loads(pickle.dumps(plan))
    assert again.fingerprint == plan.fingerprint and "streams" not in again.__dict__


def test_resume_at_any_cursor_is_going_on(corpora):
    """Steps of 7 rows, cut where a stage ends; a plan made afresh at each cursor reads the row that follows."""
    stages = (Stage(16, 30, "best_fit"), Stage(40, 20), Stage(8, 11, "best_fit"))
    plan, cursor, seen = DataPlan(corpora, stages, seed=4), Cursor(), []
    while not plan.finished(cursor):
        plan = DataPlan(corpora, stages, seed=4)
        rows = min(7, plan.remaining(cursor))
        seen += [
            (cursor.stage, cursor.row + i, list(plan.row(cursor.stage, cursor.row + i).pieces)) for i in range(rows)
        ]
        cursor = plan.advance(cursor, rows)
    straight = [(s, r, p) for s, stage in enumerate(stages) for r, p in enumerate(pieces_of(plan, s, stage.rows))]
    assert seen == straight


def test_advance(corpora):
    plan = DataPlan(corpora, (Stage(16, 30), Stage(40, 20)))
    assert plan.advance(Cursor(), 29) == Cursor(0, 29)
    assert plan.advance(Cursor(), 30) == Cursor(1, 0)
    assert plan.advance(Cursor(), 50) == Cursor(1, 20) and plan.finished(Cursor(1, 20))
    with pytest.raises(AssertionError):
        plan.advance(Cursor(), 51)
    endless = DataPlan(corpora, (Stage(16),))
    assert endless.advance(Cursor(), 10**9) == Cursor(0, 10**9) and endless.remaining(Cursor()) is None


def test_skipped_rows_renumber_and_change_no_other_row(corpora):
    plain = DataPlan(corpora, (Stage(16, 100, "best_fit"), Stage(8, 10)), seed=1)
    skipping = DataPlan(
        corpora, (Stage(16, 95, "best_fit"), Stage(8, 10)), seed=1, skipped_rows=(((3, 5), (10, 12), (12, 13)),)
    )
    kept = [r for r in range(100) if r not in (3, 4, 10, 11, 12)]
    assert [skipping.plan_row(0, r) for r in range(95)] == kept
    for row, number in enumerate(kept):
        assert list(skipping.row(0, row).pieces) == list(plain.row(0, number).pieces)
        assert skipping.row(0, row).plan_row == number
    assert pieces_of(skipping, 1, 10) == pieces_of(plain, 1, 10), "what is skipped is not given to the next stage"
    assert skipping.skipped_rows == (((3, 5), (10, 13)), ())


# Identity


BASE = {"stages": TWO_STAGES, "seed": 4, "shuffle_window": 2, "weights": (1.0, 2.0, 1.0)}
CHANGES = {
    "seed": ({"seed": 5}, "seed was 4, is 5"),
    "window": ({"shuffle_window": 3}, "shuffle_window was 2, is 3"),
    "weights": ({"weights": (1.0, 1.0, 1.0)}, "weights was [1.0, 2.0, 1.0], is [1.0, 1.0, 1.0]"),
    "seq_len": ({"stages": (replace(TWO_STAGES[0], seq_len=32), *TWO_STAGES[1:])}, "stage 0: seq_len was 16, is 32"),
    "packing": ({"stages": (replace(TWO_STAGES[0], packing="concat"), *TWO_STAGES[1:])}, "stage 0: packing was"),
    "rows": (
        {"stages": (TWO_STAGES[0], replace(TWO_STAGES[1], rows=91), TWO_STAGES[2])},
        "stage 1: rows was 90, is 91",
    ),
    "stage weights": (
        {"stages": (replace(TWO_STAGES[0], weights=(1.0, 1.0, 0.0)), *TWO_STAGES[1:])},
        "stage 0: weights",
    ),
    "fewer stages": ({"stages": TWO_STAGES[:2]}, "stage 2 (endless rows of 8, best_fit) is gone"),
    "skipped": ({"skipped_rows": ((), ((3, 9),))}, "stage 1: skipped rows were none, are [[3, 9]]"),
}


@pytest.mark.parametrize("change, sentence", CHANGES.values(), ids=CHANGES)
def test_each_change_shows_in_the_fingerprint_and_in_words(corpora, change, sentence):
    plan, other = DataPlan(corpora, **BASE), DataPlan(corpora, **{**BASE, **change})
    assert plan.fingerprint != other.fingerprint
    found = other.describe_difference(plan.to_dict())
    assert len(found) == 1 and sentence in found[0]
    assert plan.describe_difference(json.loads(json.dumps(plan.to_dict()))) == []


def test_corpora_count_by_content_and_not_by_place(corpora, tmp_path):
    plan = DataPlan(corpora, **BASE)
    shutil.copytree(corpora[0].location, tmp_path / "moved")
    moved = (replace(corpora[0], location=str(tmp_path / "moved")), *corpora[1:])
    assert DataPlan(moved, **BASE).fingerprint == plan.fingerprint
    assert list(DataPlan(moved, **BASE).row(0, 5).pieces) == list(plan.row(0, 5).pieces)
    swapped = DataPlan((corpora[1], corpora[0], corpora[2]), **BASE)
    assert swapped.fingerprint != plan.fingerprint
    assert [s.split(" was")[0] for s in swapped.describe_difference(plan.to_dict())] == ["corpus 0", "corpus 1"]


def test_a_plan_is_made_again_from_its_json(corpora):
    plan = DataPlan(corpora, **BASE, skipped_rows=(((1, 2),),))
    saved = json.loads(json.dumps(plan.to_dict()))
    again = DataPlan.from_dict(saved, corpora)
    assert again.fingerprint == plan.fingerprint and again.to_dict() == plan.to_dict()
    with pytest.raises(ConfigError, match="made for corpora"):
        DataPlan.from_dict(saved, corpora[::-1])


def test_agrees_with(corpora):
    first, second = Stage(16, 100, "best_fit"), Stage(8, 50)
    plan = DataPlan(corpora[:2], (first, second), seed=1)
    saved = plan.to_dict()

    def agrees(cursor, stages=(first, second), **options):
        options = {"corpora": corpora[:2], "weights": plan.weights, "seed": 1, **options}
        other = DataPlan(stages=stages, **options)
        answer = other.agrees_with(saved, cursor)
        if answer:
            for stage in range(cursor.stage + 1):
                rows = plan.stages[stage].rows if stage < cursor.stage else cursor.row
                assert pieces_of(other, stage, rows) == pieces_of(plan, stage, rows)
        return answer

    assert agrees(Cursor(1, 50)) and agrees(Cursor(0, 40), seed=1)
    assert agrees(Cursor(), seed=2) and not agrees(Cursor(0, 1), seed=2)
    assert agrees(Cursor(1, 50), (first, Stage(8, 500))) and agrees(Cursor(1, 50), (first, Stage(8)))
    assert agrees(Cursor(1, 50), (first, second, Stage(64, 3)))
    assert not agrees(Cursor(1, 50), (first, Stage(8, 49)))
    assert agrees(Cursor(0, 40), (Stage(16, 41, "best_fit"),)) and not agrees(
        Cursor(1, 1), (Stage(16, 101, "best_fit"), second)
    )
    assert agrees(Cursor(1, 0), (first, Stage(32, 5))) and not agrees(Cursor(1, 1), (first, Stage(32, 5)))
    assert not agrees(Cursor(0, 1), (replace(first, packing="concat"), second))
    assert agrees(Cursor(0, 40), skipped_rows=(((40, 60),),)) and not agrees(Cursor(0, 41), skipped_rows=(((40, 60),),))
    assert not agrees(Cursor(1, 1), skipped_rows=(((40, 60),),))
    doubled = tuple(2 * weight for weight in plan.weights)
    assert agrees(Cursor(1, 3), weights=doubled), "the same shares"
    assert not agrees(Cursor(0, 3), weights=plan.weights[::-1])
    later = (replace(first, weights=(*plan.weights, 0.0)), replace(second, weights=(1.0, 1.0, 1.0)))
    assert agrees(Cursor(1, 0), later, corpora=corpora, weights=(1.0, 1.0, 1.0)), "a corpus for what is to come"
    assert not agrees(Cursor(1, 1), later, corpora=corpora, weights=(1.0, 1.0, 1.0))


def _frozen_corpus():
    """A corpus that is only an index: its fingerprint must not depend on how tar or npy files are written."""
    shards = tuple(ShardInfo(f"{i}.tar", f"{i}.npy", 3, 30, 30, 0, "", "") for i in range(4))
    tokenizer = TokenizerInfo("bytes", None, 257, 256, 256, "bytes")
    return Corpus("nowhere", tokenizer, "uint8", {"train": Split(shards)})


GOLDEN_FINGERPRINT = "51dde08c49ba2eae"
GOLDEN_ROWS = {
    "0/0": [(0, 1, 1, 0, 11)],
    "0/1": [(0, 3, 2, 0, 11)],
    "0/2": [(0, 0, 2, 11, 5), (0, 0, 0, 0, 6)],
    "0/3": [(1, 0, 2, 11, 5), (1, 0, 0, 0, 6)],
    "0/4": [(0, 0, 1, 0, 11)],
    "1/0": [(0, 3, 1, 7, 4), (0, 3, 2, 0, 12)],
    "1/1": [(1, 2, 0, 1, 7), (1, 2, 1, 0, 9)],
    "1/2": [(0, 3, 0, 0, 9), (0, 3, 1, 0, 7)],
    "1/3": [(0, 3, 2, 12, 1), (0, 1, 2, 0, 15)],
}


def test_the_order_is_frozen(monkeypatch):
    """A change here makes every saved run's rows different: then VERSION must change, and these values with it."""
    tables = {
        i: np.array([(0, n, n) for n in (5 + i, 10, 15 - i)], [("o", "u8"), ("tokens", "u4"), ("b", "u4")])
        for i in range(4)
    }
    plan = DataPlan((_frozen_corpus(),) * 2, (Stage(11, 5, "best_fit"), Stage(16, 4)), (2.0, 1.0), 9, 2, (((1, 2),),))
    for files in plan.files:
        monkeypatch.setattr(files, "table", tables.get)
    assert plan.version == 1
    assert plan.fingerprint == GOLDEN_FINGERPRINT
    found = {f"{s}/{r}": [tuple(p) for p in plan.row(s, r).pieces] for s, n in ((0, 5), (1, 4)) for r in range(n)}
    assert found == GOLDEN_ROWS


# Bad input


def test_bad_plans_are_refused_with_their_values(corpora, write_corpus):
    def refused(match, corpora=corpora, stages=TWO_STAGES, **options):
        with pytest.raises(ConfigError, match=match):
            DataPlan(corpora, stages, **options)

    refused("no corpus", corpora=())
    refused("no stage", stages=())
    refused("seed is -1", seed=-1)
    refused("shuffle_window is 0", shuffle_window=0)
    refused("version 7", version=7)
    refused("only the last stage", stages=(Stage(8), Stage(8)))
    refused("has 0 rows", stages=(Stage(8, 0),))
    refused("seq_len of stage 0 is 0", stages=(Stage(0, 1),))
    refused("'dense'; use concat or best_fit", stages=(Stage(8, 1, "dense"),))
    refused(
        r"has 501 positions in its train split, less than one row of 502", corpora=corpora[2:], stages=(Stage(502, 1),)
    )
    refused("no split 'test'; it has heldout, train", split="test")
    refused("has no document in its heldout split", split="heldout")
    refused("give 3 positive numbers", weights=(1.0,))
    refused("weights of stage 0 are .* give 3", stages=(Stage(8, 1, weights=(1.0,)),))
    refused("positive", weights=(1.0, float("nan"), 1.0))
    refused(r"\(5, 5\) are no range", skipped_rows=(((5, 5),),))
    refused("4 stages; there are 3", skipped_rows=((), (), (), ()))
    refused("300 to 302 of stage 0 lie behind its last row 299", skipped_rows=(((300, 302),),))
    refused("tokenizer test-300", corpora=(corpora[0], write_corpus([[50]], vocab_size=300)), stages=(Stage(8, 1),))


def test_a_table_that_disagrees_with_the_manifest_is_refused(write_corpus):
    corpus = write_corpus([[9, 9]])
    shard = corpus.splits["train"].shards[0]
    wrong = replace(corpus, splits={"train": Split((replace(shard, tokens=19),))})
    with pytest.raises(UserError, match="counts 18 tokens, the manifest 19"):
        DataPlan((wrong,), (Stage(4, 1),)).row(0, 0)
    wrong = replace(corpus, splits={"train": Split((replace(shard, documents=3),))})
    with pytest.raises(UserError, match="table of 3 documents, found 2"):
        DataPlan((wrong,), (Stage(4, 1),)).row(0, 0)

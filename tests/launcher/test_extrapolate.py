"""Extrapolation: the same text at every length, the right sums, and baselines equal to plain counting."""

import json
import lzma
import math
from collections import Counter

import numpy as np
import pytest
import torch
from rich.console import Console

from longscan.data import corpus_tokenizer, documents, open_corpus, prepare_corpus
from longscan.errors import ConfigError, UserError
from longscan.kernels import Segments
from longscan.launcher.evals import baselines
from longscan.launcher.evals.extrapolate import bucket_bounds, parse_lengths, score, token_nats
from longscan.launcher.evals.heldout import HeldoutText, choose_text
from longscan.launcher.evals.report import Bucket, Extrapolation, LengthScore, plot, results_folder, save
from longscan.launcher.trained import decode_stream
from longscan.models import LanguageModel, config_from_mapping, load_preset


@pytest.fixture(scope="module")
def model():
    built = LanguageModel(config_from_mapping({**load_preset("griffin-tiny"), "vocab_size": 320}))
    built.init_weights(0)
    return built


@pytest.fixture(scope="module")
def opened(corpus):
    opened = open_corpus(corpus)
    return opened, corpus_tokenizer(opened)


class ContextFree:
    """A model whose cost of a label is known: the next byte is `same` as the input, or any other alike."""

    config = config_from_mapping({**load_preset("griffin-tiny"), "vocab_size": 257})

    def parameters(self):
        yield torch.zeros(1)

    def hidden(self, inputs, segments):
        assert bool(segments.resets[:, 0].all())
        return torch.nn.functional.one_hot(inputs, 257).float()

    def head(self, hidden):
        return hidden * math.log(256)


def text_of(labels: np.ndarray) -> HeldoutText:
    inputs = np.concatenate([np.full((len(labels), 1), 256), labels[:, :-1]], axis=1)
    return HeldoutText("documents", inputs, labels, float(labels.size), labels.reshape(-1).astype(np.uint8))


def test_the_sum_is_that_of_a_model_written_out():
    labels = np.random.default_rng(0).integers(0, 4, (3, 64))
    text = text_of(labels)
    same = (text.inputs == labels).sum()
    expected = (same * math.log2(2) + (labels.size - same) * math.log2(512)) / labels.size
    for length in (1, 2, 16, 64):
        found = score(ContextFree(), text, length)  # type: ignore[arg-type]
        assert found.rows == 192 // length
        assert found.bits_per_byte == pytest.approx(expected, abs=1e-6)


def test_buckets_and_last_quarter_add_up(model):
    labels = np.random.default_rng(1).integers(0, 256, (2, 256))
    found = score(model, text_of(labels), 256)
    assert [(b.begin, b.end) for b in found.buckets] == [(0, 64), (64, 128), (128, 256)]
    mean = sum(b.bits_per_byte * (b.end - b.begin) for b in found.buckets) / 256
    assert mean == pytest.approx(found.bits_per_byte, rel=1e-9)
    nats = token_nats(model, *(torch.from_numpy(x) for x in (text_of(labels).inputs, labels))).double()
    assert found.last_quarter == pytest.approx(float(nats[:, 192:].mean()) / math.log(2), rel=1e-5)


def test_token_costs_equal_plain_cross_entropy_however_they_are_cut(model, monkeypatch):
    inputs, labels = torch.randint(0, 256, (3, 33)), torch.randint(0, 256, (3, 33))
    with torch.no_grad():
        logits = model(inputs, Segments.whole(3, 33)).double()
    expected = -torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)
    for at_once in (1, 320 * 10, 1 << 24):
        monkeypatch.setattr("longscan.launcher.evals.extrapolate.LOGITS_AT_ONCE", at_once)
        torch.testing.assert_close(token_nats(model, inputs, labels).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 100, 512])
def test_buckets_cover_every_position_once(length):
    bounds = bucket_bounds(length)
    assert [p for begin, end in bounds for p in range(begin, end)] == list(range(length))


def test_lengths_are_sorted_and_must_divide_the_longest():
    assert parse_lengths("1Ki, 256,512,256") == [256, 512, 1024]
    for text in ("", "0", "300,512", "a", "-4"):
        with pytest.raises(ConfigError, match="--lengths"):
            parse_lengths(text)


def test_long_pieces_come_whole_from_documents_spread_over_the_split(opened):
    corpus, tokenizer = opened
    held = [document.tokens for document in documents(corpus, "heldout")]
    text = choose_text(corpus, tokenizer, 128, 5 * 128)
    assert (text.kind, text.inputs.shape) == ("documents", (5, 128))
    sources = []
    for inputs, labels in zip(text.inputs, text.labels, strict=True):
        assert (inputs[1:] == labels[:-1]).all()
        for number, tokens in enumerate(held):
            for begin in range(0, len(tokens) - 127, 128):
                if (tokens[begin : begin + 128] == labels).all():
                    assert inputs[0] == (tokens[begin - 1] if begin else 256)
                    sources.append((number, begin))
                    break
    assert len(set(sources)) == 5
    assert len({number for number, _ in sources}) > 1
    assert text.text_bytes == text.tokens == len(text.bytes_scored)
    again = choose_text(corpus, tokenizer, 128, 5 * 128)
    assert (again.inputs == text.inputs).all()


def test_every_long_piece_is_taken_when_all_are_wanted(opened):
    corpus, tokenizer = opened
    held = [document.tokens for document in documents(corpus, "heldout")]
    text = choose_text(corpus, tokenizer, 128, 10**9)
    expected = [tokens[b : b + 128] for tokens in held for b in range(0, len(tokens) - 127, 128)]
    assert (text.labels == np.stack(expected)).all()


def test_short_documents_are_joined_with_begin_and_end(opened):
    corpus, tokenizer = opened
    stream = np.concatenate([np.append(document.tokens, 256) for document in documents(corpus, "heldout")])
    length = len(stream) // 2
    text = choose_text(corpus, tokenizer, length, 10**9)
    assert text.kind == "joined"
    assert (text.labels.reshape(-1) == stream[: 2 * length]).all()
    assert (text.inputs.reshape(-1)[1:] == stream[: 2 * length - 1]).all()
    assert text.text_bytes == (text.labels != 256).sum() == len(text.bytes_scored)


def test_too_little_held_out_text_is_said(opened, tmp_path):
    corpus, tokenizer = opened
    with pytest.raises(UserError, match="less than one row of 1048576"):
        choose_text(corpus, tokenizer, 1 << 20, 1 << 20)
    (tmp_path / "a.txt").write_text("a" * 300)
    prepare_corpus([str(tmp_path / "a.txt")], tmp_path / "none", heldout=0.0, workers=1)
    with pytest.raises(UserError, match="holds out no text"):
        choose_text(open_corpus(tmp_path / "none"), tokenizer, 64, 64)


def test_a_trained_tokenizer_is_scored_by_the_bytes_it_stands_for(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"the {number} quick café foxes jump over lazy dogs. " * (5 + number))
    prepare_corpus([str(texts)], tmp_path / "bpe", train_bpe=300, heldout=0.3, workers=1)
    corpus = open_corpus(tmp_path / "bpe")
    tokenizer = corpus_tokenizer(corpus)
    text = choose_text(corpus, tokenizer, 32, 10**9)
    assert text.text_bytes == pytest.approx(len(text.bytes_scored), rel=0.02)
    bits = baselines.score_baselines(corpus, tokenizer, text.bytes_scored)
    assert bits["bigram bytes"] < bits["unigram bytes"] < 8


def test_byte_models_equal_plain_counting():
    generator = np.random.default_rng(3)
    train = [generator.integers(0, 5, n).astype(np.uint8) for n in (1, 40, 300)]
    text = generator.integers(0, 6, 50).astype(np.uint8)
    singles, pairs, befores = Counter(), Counter(), Counter()
    followers: dict[int, set[int]] = {}
    for document in train:
        before = 256
        for byte in document.tolist():
            singles[byte] += 1
            pairs[before, byte] += 1
            befores[before] += 1
            followers.setdefault(before, set()).add(byte)
            before = byte

    def unigram(byte: int) -> float:
        return (singles[byte] + 1) / (singles.total() + 256)

    def bigram(before: int, byte: int) -> float:
        different = len(followers.get(before, ())) or 1
        return (pairs[before, byte] + different * unigram(byte)) / (befores[before] + different)

    assert sum(bigram(3, byte) for byte in range(256)) == pytest.approx(1)
    counts = baselines.count_pairs(train)
    data = text.tolist()
    expected = -sum(math.log2(unigram(byte)) for byte in data) / 50
    assert baselines.unigram_bits(counts, text) == pytest.approx(expected)
    expected = -sum(math.log2(bigram(a, b)) for a, b in zip([256, *data], data, strict=False)) / 50
    assert baselines.bigram_bits(counts, text) == pytest.approx(expected)
    assert baselines.xz_bits(text) == len(lzma.compress(text.tobytes(), preset=9)) * 8 / 50


def result() -> Extrapolation:
    scores = [LengthScore(n, 4, 2.3 - n / 1e4, 2.25, [Bucket(0, n, 2.2)], 0.1) for n in (256, 512, 1024)]
    rest = {"unigram bytes": 4.8, "bigram bytes": 3.4, "xz -9": 1.9}
    return Extrapolation("runs/a", 10, 1000, "corpus", "cpu", [512], "joined", 4096, 4096.0, scores, rest)


def test_results_are_added_never_replaced(tmp_path):
    names = [[file.name for file in save(result(), results_folder(tmp_path / "evals"))] for _ in range(2)]
    assert names == [
        ["extrapolation.json", "extrapolation.png"],
        ["extrapolation-2.json", "extrapolation-2.png"],
    ]
    assert json.loads((tmp_path / "evals" / "extrapolation.json").read_text()) == result().to_json()


def test_the_plot_is_a_png_of_readable_size(tmp_path):
    plot(result(), tmp_path / "x.png")
    head = (tmp_path / "x.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[16:20], "big") >= 1000


def test_the_table_marks_the_trained_length_and_the_joined_text(capsys):
    result().show(Console(width=80))
    out = capsys.readouterr().out
    assert "512  (trained)" in out
    assert "joined end to end" in out
    assert "bigram bytes" in out


def test_text_comes_out_whole_characters_at_a_time(tmp_path):
    class Bytes:
        class info:
            kind = "bytes"

    text = "a é 漢 🦎 z"
    pieces = list(decode_stream(Bytes(), iter(text.encode())))  # type: ignore[arg-type]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    texts = tmp_path / "t.txt"
    texts.write_text("naïve café 漢字 and plain words " * 40)
    prepare_corpus([str(texts)], tmp_path / "bpe", train_bpe=290, heldout=0.0, workers=1)
    tokenizer = corpus_tokenizer(open_corpus(tmp_path / "bpe"))
    sample = " words 漢字 naïve 🦎 x"
    assert "".join(decode_stream(tokenizer, iter(tokenizer.encode(sample).tolist()))) == sample

"""Encoding gives the text's own tokens and nothing else; what a manifest says of a tokenizer is true."""

import json

import numpy as np
import pytest
import tokenizers

from longscan.data import tokenizer as module
from longscan.data.bpe import train_byte_level_bpe
from longscan.data.index import Corpus
from longscan.data.tokenizer import corpus_tokenizer, load_tokenizer, open_tokenizer, save_tokenizer
from longscan.errors import ConfigError

TEXTS = ["the cat sat on the mat\n", "naïve café ☕ 漢字\n\n", "def f(x):\n    return x + 1\n"] * 40


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_bytes(train_byte_level_bpe(TEXTS, 320))
    return path


def edited(path, target, change):
    """A copy of a tokenizer.json with `change` made to its parsed content."""
    content = json.loads(path.read_text())
    change(content)
    target.write_text(json.dumps(content))
    return str(target)


@pytest.mark.parametrize("text", ["", "plain", "☕ naïve \x00\n", "<|endoftext|>"])
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tobytes() == text.encode()
    assert tokenizer.decode([256, *ids, 256]) == text
    assert (tokenizer.info.vocab_size, tokenizer.info.bos_id, tokenizer.info.eos_id) == (257, 256, 256)


@pytest.mark.parametrize("text", ["the cat", "unseen ☃ words\t\n\n", "a<|endoftext|>b"])
def test_bpe_round_trip_never_makes_a_special_id(bpe_file, text):
    tokenizer = load_tokenizer(str(bpe_file))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.info.eos_id not in ids
    assert tokenizer.decode([tokenizer.info.bos_id, *ids, tokenizer.info.eos_id]) == text


def test_a_batch_is_its_texts(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file.parent))
    batch = tokenizer.encode_documents([text.encode() for text in TEXTS[:3]])
    for ids, text in zip(batch, TEXTS, strict=False):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_training_is_deterministic_and_small_vocabularies_are_refused(bpe_file):
    assert train_byte_level_bpe(TEXTS, 320) == bpe_file.read_bytes()
    with pytest.raises(ConfigError, match="at least 257.* 100 were"):
        train_byte_level_bpe(TEXTS, 100)


def test_truncation_padding_and_post_processor_are_left_out(bpe_file, tmp_path):
    def change(content):
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 900}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        }

    hostile = load_tokenizer(edited(bpe_file, tmp_path / "t.json", change))
    text = TEXTS[0] * 5
    np.testing.assert_array_equal(hostile.encode(text), load_tokenizer(str(bpe_file)).encode(text))


def test_long_texts_are_encoded_in_pieces_with_the_same_ids(bpe_file, monkeypatch):
    tokenizer = load_tokenizer(str(bpe_file))
    text = "".join(TEXTS) + "\n \n  tail without end"
    whole = tokenizer.encode(text)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 100)
    assert "".join(module._pieces(text, 100)) == text
    assert len(list(module._pieces(text, 100))) > 10
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


def with_specials(tmp_path, *names):
    vocabulary = {name: i for i, name in enumerate([*names, "a", "b"])}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    engine.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["<|endoftext|>"], (0, 0)),
        (["<s>", "</s>"], (0, 1)),
        (["<|begin_of_text|>", "<|end_of_text|>"], (0, 1)),
        (["<eos>", "<bos>"], (1, 0)),
        (["<s>"], (0, 0)),
    ],
)
def test_begin_and_end_are_found_under_their_usual_names(tmp_path, names, ids):
    info = load_tokenizer(with_specials(tmp_path, *names)).info
    assert (info.bos_id, info.eos_id) == ids


def test_begin_and_end_can_be_named_and_must_exist(tmp_path):
    path = with_specials(tmp_path, "[END]", "[BEGIN]")
    with pytest.raises(ConfigError, match="--eos"):
        load_tokenizer(path)
    info = load_tokenizer(path, bos="[BEGIN]", eos="[END]").info
    assert (info.bos_id, info.eos_id) == (1, 0)
    with pytest.raises(ConfigError, match=r"--bos '\[NO\]' is not in the vocabulary"):
        load_tokenizer(path, bos="[NO]")


def test_the_vocabulary_counts_up_to_the_highest_id(tmp_path):
    vocabulary = {"<s>": 0, "a": 70000}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.info.vocab_size, tokenizer.dtype) == (70001, "uint32")


def test_bad_files_are_told(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a Hugging Face"):
        load_tokenizer(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        load_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match="leave --bos"):
        load_tokenizer("bytes", bos="x")


def test_a_corpus_gives_its_tokenizer_back(bpe_file):
    info = load_tokenizer(str(bpe_file)).info
    corpus = Corpus(str(bpe_file.parent), info, "uint16", {})
    assert corpus_tokenizer(corpus).decode(corpus_tokenizer(corpus).encode("the mat")) == "the mat"
    assert corpus_tokenizer(Corpus("x", load_tokenizer("bytes").info, "uint8", {})).info.kind == "bytes"
    other = Corpus(str(bpe_file.parent), type(info)(**{**vars(info), "fingerprint": "0"}), "uint16", {})
    with pytest.raises(ConfigError, match="not the tokenizer that made"):
        corpus_tokenizer(other)


@pytest.mark.parametrize("kind", ["bytes", "huggingface"])
def test_a_saved_tokenizer_comes_back_and_says_when_it_is_not_itself(kind, tmp_path, bpe_file):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(bpe_file))
    save_tokenizer(tokenizer, tmp_path / "kept")
    again = open_tokenizer(tmp_path / "kept")
    assert again.info == tokenizer.info
    assert (again.encode("the mat") == tokenizer.encode("the mat")).all()
    file = tmp_path / "kept" / "info.json"
    file.write_text(file.read_text().replace(tokenizer.info.fingerprint, "another"))
    if kind == "huggingface":
        with pytest.raises(ConfigError, match="is not another"):
            open_tokenizer(tmp_path / "kept")
    file.unlink()
    with pytest.raises(ConfigError, match="cannot read the tokenizer in .*kept"):
        open_tokenizer(tmp_path / "kept")

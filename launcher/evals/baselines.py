"""What simple models reach on the same text, so that a reader can judge a number of bits per byte."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator

import numpy as np

from ...data import Corpus, ShardCache, Tokenizer, documents

# The counts are sharp long before this; decoding a trained tokenizer is slower than reading bytes, hence less of it.
TRAINING_BYTES = 32 << 20
TRAINING_BYTES_DECODED = 8 << 20
NOTHING = 256


def score_baselines(
    corpus: Corpus, tokenizer: Tokenizer, text: np.ndarray, cache: ShardCache | None = None
) -> dict[str, float]:
    """Bits per byte of `text` (uint8) under byte models counted on the training split, and compressed by itself."""
    counts = count_pairs(_training_text(corpus, tokenizer, cache))
    return {
        "unigram bytes": unigram_bits(counts, text),
        "bigram bytes": bigram_bits(counts, text),
        "xz -9": xz_bits(text),
    }


def count_pairs(texts: Iterable[np.ndarray]) -> np.ndarray:
    """int64 [257, 256]: how often byte b follows byte a; row NOTHING counts the first bytes of texts."""
    counts = np.zeros(257 * 256, np.int64)
    for text in texts:
        before = np.concatenate([[NOTHING], text[:-1]]).astype(np.int64)
        counts += np.bincount(before * 256 + text, minlength=len(counts))
    return counts.reshape(257, 256)


def unigram_bits(counts: np.ndarray, text: np.ndarray) -> float:
    """Bits per byte of `text` under the byte frequencies: -mean log2 p(b), p(b) = (n_b + 1) / (n + 256)."""
    return float(-np.log2(_unigram(counts)[text]).mean())


def bigram_bits(counts: np.ndarray, text: np.ndarray) -> float:
    """Bits per byte of `text` under pair frequencies with Witten-Bell smoothing.

    p(b | a) = (n_ab + d_a p(b)) / (n_a + d_a), where d_a is how many different bytes follow a: the more, the likelier
    a new one. The first byte of the text follows NOTHING.
    """
    different = np.maximum((counts > 0).sum(1, keepdims=True), 1)
    table = (counts + different * _unigram(counts)) / (counts.sum(1, keepdims=True) + different)
    before = np.concatenate([[NOTHING], text[:-1]]).astype(np.int64)
    return float(-np.log2(table[before, text]).mean())


def xz_bits(text: np.ndarray) -> float:
    """Bits per byte of `text` as `xz -9` writes it, headers and all."""
    return 8 * len(lzma.compress(text.tobytes(), preset=9)) / max(len(text), 1)


def _unigram(counts: np.ndarray) -> np.ndarray:
    return (counts.sum(0) + 1) / (counts.sum() + 256)


def _training_text(corpus: Corpus, tokenizer: Tokenizer, cache: ShardCache | None) -> Iterator[np.ndarray]:
    """Training documents as bytes until there is enough."""
    raw = tokenizer.info.kind == "bytes"
    left = TRAINING_BYTES if raw else TRAINING_BYTES_DECODED
    for document in documents(corpus, "train", 1, cache):
        if left <= 0:
            return
        tokens = document.tokens[:left]
        text = tokens.astype(np.uint8) if raw else np.frombuffer(tokenizer.decode(tokens.tolist()).encode(), np.uint8)
        if len(text):
            left -= len(text)
            yield text

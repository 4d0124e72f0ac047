"""The held-out text that an evaluation scores: long pieces of it, the same for every row length and every baseline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...data import Corpus, ShardCache, ShardInfo, Tokenizer, documents
from ...data.cache import SplitFiles
from ...errors import UserError

# Below this many pieces of long documents, joined documents say more.
FEWEST_PIECES = 4


@dataclass(frozen=True)
class HeldoutText:
    """N pieces of text of `length` tokens each.

    Attributes:
        kind: "documents" where every piece lies in one document; "joined" where short documents were put end to end
            to make pieces so long, read as one document.
        inputs, labels: int64 [N, length]; a label is the token after its input, the first input of a document is the
            begin-of-document token.
        text_bytes: bytes of text that the labels stand for.
        bytes_scored: those bytes, for byte models: uint8.
    """

    kind: str
    inputs: np.ndarray
    labels: np.ndarray
    text_bytes: float
    bytes_scored: np.ndarray

    @property
    def tokens(self) -> int:
        """Labels in all."""
        return self.labels.size


def choose_text(
    corpus: Corpus, tokenizer: Tokenizer, length: int, tokens: int, cache: ShardCache | None = None
) -> HeldoutText:
    """Pieces of `length` tokens from the held-out split, about `tokens` in all and at least one.

    Documents of `length` tokens and more are cut into pieces, and as many as are wanted are taken at even distances
    over the whole split. Where there are fewer than FEWEST_PIECES, all documents are joined instead.
    """
    wanted = max(1, tokens // length)
    if not any(shard.documents for shard in _heldout_shards(corpus)):
        raise UserError(f"{corpus.location} holds out no text to score; prepare a corpus with --heldout above 0.")
    files = SplitFiles(corpus, "heldout", cache)
    pieces, kind = _long_pieces(files, length, wanted), "documents"
    if len(pieces) < min(wanted, FEWEST_PIECES):
        joined = list(itertools.islice(_joined_pieces(corpus, length, cache), wanted))
        if len(joined) > len(pieces):
            pieces, kind = joined, "joined"
    if not pieces:
        held = sum(shard.tokens + shard.documents for shard in _heldout_shards(corpus))
        raise UserError(
            f"{corpus.location} holds out {held} tokens, less than one row of {length}; ask for shorter --lengths, "
            "or prepare a corpus that holds out more."
        )
    labels = np.stack([labels for _, labels, _ in pieces])
    stored = labels.reshape(-1)
    stored = stored[stored != tokenizer.info.eos_id]
    if tokenizer.info.kind == "bytes":
        scored = stored.astype(np.uint8)
    else:
        scored = np.frombuffer(tokenizer.decode(stored.tolist()).encode(), np.uint8)
    inputs = np.stack([inputs for inputs, _, _ in pieces])
    return HeldoutText(kind, inputs, labels, float(sum(size for _, _, size in pieces)), scored)


Piece = tuple[np.ndarray, np.ndarray, float]


def _heldout_shards(corpus: Corpus) -> tuple[ShardInfo, ...]:
    return corpus.splits["heldout"].shards if "heldout" in corpus.splits else ()


def _long_pieces(files: SplitFiles, length: int, wanted: int) -> list[Piece]:
    """Up to `wanted` of the pieces that lie whole in a document, evenly spread over all of them in order."""
    counts = [files.table(shard)["tokens"] // length for shard in range(len(files.shards))]
    shards = np.cumsum([0, *(int(count.sum()) for count in counts)])
    pieces = []
    for index in range(min(wanted, shards[-1])):
        place = index * int(shards[-1]) // min(wanted, int(shards[-1]))
        shard = int(np.searchsorted(shards, place, side="right")) - 1
        within = np.cumsum(counts[shard])
        document = int(np.searchsorted(within, place - shards[shard], side="right"))
        number = int(place - shards[shard] - (within[document] - counts[shard][document]))
        pieces.append(_read_piece(files, shard, document, number, length))
    return pieces


def _read_piece(files: SplitFiles, shard: int, document: int, number: int, length: int) -> Piece:
    """Piece `number` of a document: the token before it, or the begin-of-document token, is its first input."""
    entry = files.table(shard)[document]
    tokens = np.frombuffer(files.data(shard), files.dtype, int(entry["tokens"]), int(entry["offset"]))
    begin = number * length
    labels = tokens[begin : begin + length].astype(np.int64)
    before = tokens[begin - 1] if begin else files.corpus.tokenizer.bos_id
    return np.concatenate([[before], labels[:-1]]), labels, length * int(entry["bytes"]) / len(tokens)


def _joined_pieces(corpus: Corpus, length: int, cache: ShardCache | None) -> Iterator[Piece]:
    """Consecutive pieces of all documents laid end to end, each with its begin and end."""
    info = corpus.tokenizer
    inputs, labels, sizes = (np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float64))
    for document in documents(corpus, "heldout", 1, cache):
        each = document.text_bytes / len(document.tokens)
        inputs = np.concatenate([inputs, [info.bos_id], document.tokens])
        labels = np.concatenate([labels, document.tokens, [info.eos_id]])
        sizes = np.concatenate([sizes, np.full(len(document.tokens), each), [0.0]])
        while len(inputs) >= length:
            yield inputs[:length], labels[:length], float(sizes[:length].sum())
            inputs, labels, sizes = inputs[length:], labels[length:], sizes[length:]

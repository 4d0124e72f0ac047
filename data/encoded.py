"""Documents as ids: text by the tokenizer, and ids that another program made with the same one.

What is stored are text tokens only, so ids that begin or end a document are cut out, and where one lies inside, two
documents meet: a sample of packed documents comes apart again. Ids carry no text, so its bytes, which bits per byte
needs, are counted by decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import ConfigError
from .index import TokenizerInfo
from .sources import Document, EncodedDocument
from .tokenizer import Tokenizer

# Ids decoded at once: as Python's numbers and a text they take some 40 bytes each.
_DECODED = 1 << 20


def encode(
    documents: Sequence[Document | EncodedDocument], tokenizer: Tokenizer
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields (name, ids of the tokenizer's dtype, bytes of text) of the documents in order.

    Raises ConfigError for ids that the tokenizer does not have.
    """
    texts = iter(tokenizer.encode_documents([each.text for each in documents if isinstance(each, Document)]))
    for document in documents:
        if isinstance(document, Document):
            yield document.name, next(texts), len(document.text)
        else:
            yield from _apart(document, tokenizer)


def check_ids(document: EncodedDocument, tokenizer: TokenizerInfo) -> None:
    """Returns nothing; raises ConfigError where the ids cannot be those of the tokenizer."""
    if tokenizer.kind == "bytes":
        raise ConfigError(
            f"{document.name} holds token ids, which need the tokenizer they were made with: give --tokenizer FILE."
        )
    if not len(document.ids):
        return
    lowest, highest = int(document.ids.min()), int(document.ids.max())
    if lowest < 0 or highest >= tokenizer.vocab_size:
        raise ConfigError(
            f"{document.name} holds id {lowest if lowest < 0 else highest}, but the tokenizer has "
            f"{tokenizer.vocab_size} tokens; give with --tokenizer the one that made the ids."
        )


def _apart(document: EncodedDocument, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, int]]:
    """The documents between the ids that begin or end one, numbered where there are several."""
    check_ids(document, tokenizer.info)
    marks = np.flatnonzero((document.ids == tokenizer.info.bos_id) | (document.ids == tokenizer.info.eos_id))
    bounds = [-1, *marks.tolist(), len(document.ids)]
    spans = [(a + 1, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a + 1] or [(0, 0)]
    for number, (begin, end) in enumerate(spans):
        ids = document.ids[begin:end].astype(tokenizer.dtype)
        name = document.name if len(spans) == 1 else f"{document.name}.{number}"
        yield name, ids, _text_bytes(ids, tokenizer)


def _text_bytes(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    pieces = np.array_split(ids, -(-len(ids) // _DECODED)) if len(ids) > _DECODED else [ids]
    return sum(len(tokenizer.decode(piece).encode()) for piece in pieces)

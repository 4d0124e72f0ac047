"""From text to packed batches: prepare, tokenizer, index, row plan, packing, loader. A leaf: no models, no ranks.

The one invariant: what row r of a stage holds is a pure function of the DataPlan, whoever asks, in whatever order.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .cache import ShardCache
from .index import Corpus, ShardInfo, Split, TokenizerInfo, is_url, open_corpus
from .packing import PACKINGS, PackingReport
from .prepare import PrepareReport, prepare_corpus
from .row_plan import Cursor, DataPlan, Row, Stage
from .streams import Piece, Pieces
from .tokenizer import Tokenizer, corpus_tokenizer, load_tokenizer, open_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from .batch import IGNORED_LABEL, Batch
    from .loader import Document, HeldoutRows, Prefetch, RowLoader, documents, row_digest

# What needs torch comes when it is first asked for: preparing a corpus starts seconds sooner without it.
_NEED_TORCH = {
    "IGNORED_LABEL": "batch",
    "Batch": "batch",
    "Document": "loader",
    "HeldoutRows": "loader",
    "Prefetch": "loader",
    "RowLoader": "loader",
    "documents": "loader",
    "row_digest": "loader",
}

__all__ = [
    "IGNORED_LABEL",
    "PACKINGS",
    "Batch",
    "Corpus",
    "Cursor",
    "DataPlan",
    "Document",
    "HeldoutRows",
    "PackingReport",
    "Piece",
    "Pieces",
    "Prefetch",
    "PrepareReport",
    "Row",
    "RowLoader",
    "ShardCache",
    "ShardInfo",
    "Split",
    "Stage",
    "Tokenizer",
    "TokenizerInfo",
    "corpus_tokenizer",
    "documents",
    "is_url",
    "load_tokenizer",
    "open_corpus",
    "open_tokenizer",
    "prepare_corpus",
    "row_digest",
    "save_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        globals()[name] = getattr(import_module(f".{_NEED_TORCH[name]}", __name__), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

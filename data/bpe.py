"""Training of a byte-level BPE on a corpus's sources, with the `tokenizers` library; the algorithm is all theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..durable import write_durably
from ..errors import ConfigError
from .sources import ALL_FILES, Document, Skipped, cut, find_files, read_slice
from .units import Unit, split_position

END_OF_TEXT = "<|endoftext|>"
# The 256 bytes and END_OF_TEXT.
SMALLEST_BPE = 257
# More text moves few merges: the library holds the counts of distinct words, not the text.
SAMPLE_BYTES = 512 << 20


def train_bpe(
    sources: Sequence[str],
    output: str | Path,
    vocab_size: int,
    *,
    field: str = "text",
    pattern: str = ALL_FILES,
    heldout: float = 0.0,
    sample_bytes: int = SAMPLE_BYTES,
) -> Path:
    """Returns `output` after writing there the `tokenizer.json` of a byte-level BPE trained on the sources.

    Args:
        sources: as for `prepare_corpus`.
        output: the file to write; one that exists is not replaced.
        vocab_size: tokens in all, the 256 bytes and `<|endoftext|>` among them.
        field: the JSON field or Parquet column that holds the text.
        pattern: which files of a folder to take.
        heldout: the share of documents not looked at, the same that `prepare_corpus` holds out.
        sample_bytes: about how much text to train on, spread evenly over the documents.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output} exists; choose another file, or remove it.")
    skipped: list[Skipped] = []
    files, _ = find_files(sources, pattern)
    units = [Unit(0, tuple(pieces)) for pieces in cut(files, 64 << 20, field, skipped)]
    write_durably(output, train_byte_level_bpe(sample_texts(units, field, heldout, sample_bytes), vocab_size))
    return output


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Returns the `tokenizer.json` of a byte-level BPE trained on `texts`; the same texts give the same bytes."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_BPE:
        raise ConfigError(f"a byte-level BPE needs at least {SMALLEST_BPE} tokens; {vocab_size} were asked for.")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    engine.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(iter(texts), trainer)
    return engine.to_str(pretty=True).encode()


def sample_texts(units: Sequence[Unit], field: str, heldout: float, sample_bytes: int = SAMPLE_BYTES) -> Iterator[str]:
    """About `sample_bytes` of text, spread evenly over the documents that are not held out."""
    share = sample_bytes / max(sum(unit.size for unit in units), 1)
    for unit in units:
        for piece in unit.slices:
            for item in read_slice(piece, field):
                if (
                    isinstance(item, Document)
                    and split_position(item.name) >= heldout
                    and split_position(f"sample/{item.name}") < share
                ):
                    yield item.text.decode(errors="ignore")

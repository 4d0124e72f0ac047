"""Sources: where the text comes from, cut into pieces that one process can read alone.

A document is a text file, a line of JSON lines, a row of Parquet or a sample of MDS; or it comes as token ids, from MDS
or from Megatron's indexed files. Its name (path relative to the source, with the line's byte or the number of the row)
does not depend on where the source lies, so the held-out split does not either. What cannot be read as a document comes
out as Skipped with a reason: reading never drops anything in silence.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import json
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import ConfigError, UserError
from . import mds
from .megatron_indexed import IndexedTokens, data_file, index_file

STDLIB = "python-stdlib"
ALL_FILES = "**/*"

# Of which ids may come; about the bytes of text that an id stands for, so that all slices count the same thing.
ID_KINDS = ("megatron", "mds")
_TEXT_BYTES_AN_ID = 3

# The table counts a document's tokens and bytes in 32 bits.
LARGEST_DOCUMENT = (1 << 31) - 1

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".parquet": "parquet",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read: its stable name, how to read it, and what tells that it has changed."""

    path: str
    name: str
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a file that can be read alone: [begin, end) of its bytes, Parquet row groups, documents or samples.

    `size` is about how many bytes of text it gives, to balance work and show progress.
    """

    file: SourceFile
    begin: int
    end: int
    size: int


@dataclass(frozen=True, slots=True)
class Document:
    """One document; `text` is meant to be UTF-8 and is not yet checked."""

    name: str
    text: bytes

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """Token ids as another program stored them, of any integer dtype, begin and end of document still among them."""

    name: str
    ids: np.ndarray

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.ids.nbytes


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that gave no document, and why; `reason` is a word that is counted by."""

    reason: str
    name: str
    detail: str = ""


def find_files(
    sources: Iterable[str], pattern: str = ALL_FILES, exclude: Path | None = None
) -> tuple[list[SourceFile], list[Skipped]]:
    """Returns the files of the sources in their order, each source sorted by name, and what could not be opened.

    Args:
        sources: each `python-stdlib`, a folder, a glob, a file, or a Megatron pair of files without their suffixes.
        pattern: which files of a folder to take, matched against the path below it (`*` also crosses folders).
            Hidden files and folders are not part of a folder, as in a shell's glob.
        exclude: a folder left out wherever it is met (the corpus being written).

    Raises:
        ConfigError: a source does not exist, cannot be read, matches nothing or is of a kind not supported.
    """
    files: list[SourceFile] = []
    skipped: list[Skipped] = []
    for source in sources:
        count = len(files) + len(skipped)
        for path, name in _expand(index_file(source) or source, pattern, exclude, skipped):
            if _has_an_index(path):
                continue
            found = _stat(path, name)
            (files if isinstance(found, SourceFile) else skipped).append(found)  # type: ignore[arg-type]
        if len(files) + len(skipped) == count:
            raise ConfigError(f"{source} has no file that matches {pattern!r}; give another path or --pattern.")
    return files, skipped


def cut(files: Iterable[SourceFile], unit_bytes: int, field: str, skipped: list[Skipped]) -> list[list[Slice]]:
    """Returns the units of work: consecutive slices of about `unit_bytes` of input, the same on every machine.

    Parquet files whose footer cannot be read are added to `skipped`; a Megatron index or an MDS shard that is damaged
    or of something else raises ConfigError.
    """
    units: list[list[Slice]] = []
    room = 0
    for file in files:
        for piece in _slices(file, unit_bytes, field, skipped):
            if not units or piece.size > room:
                units.append([])
                room = unit_bytes
            _append(units[-1], piece)
            room -= piece.size
    return units


def _append(unit: list[Slice], piece: Slice) -> None:
    """Adds a slice to a unit, joined with the one before where it goes on from there."""
    last = unit[-1] if unit else None
    if last and last.file is piece.file and last.end == piece.begin:
        unit[-1] = Slice(last.file, last.begin, piece.end, last.size + piece.size)
    else:
        unit.append(piece)


def read_slice(piece: Slice, field: str) -> Iterator[Document | EncodedDocument | Skipped]:
    """Yields the documents of a slice in order, and what gave none.

    Raises:
        UserError: the file cannot be read any more or has changed since the work was planned.
    """
    readers = {
        "text": _read_text,
        "jsonl": _read_lines,
        "jsonl.gz": _read_zipped_lines,
        "parquet": _read_rows,
        "megatron": _read_indexed,
        "mds": _read_samples,
    }
    try:
        if os.stat(piece.file.path).st_size != piece.file.size:
            raise UserError(f"{piece.file.path} has changed while it was being prepared; run the command again.")
        yield from readers[piece.file.kind](piece, field)
    except OSError as error:
        raise UserError(f"cannot read {piece.file.path}: {error.strerror or error}; mend it and run again.") from error


def _expand(source: str, pattern: str, exclude: Path | None, skipped: list[Skipped]) -> Iterator[tuple[str, str]]:
    """The paths of one source with their names."""
    if source == STDLIB:
        root = sysconfig.get_path("stdlib")
        yield from _walk(root, "*.py", exclude, skipped, prune=("site-packages", "dist-packages"))
    elif os.path.isdir(source):
        if not os.access(source, os.R_OK | os.X_OK):
            raise ConfigError(f"the folder {source} cannot be read; change its permissions or run as its owner.")
        yield from _walk(source, pattern, exclude, skipped)
    elif os.path.exists(source):
        if not os.path.isfile(source):
            raise ConfigError(f"{source} is no regular file; give a file, a folder or a glob.")
        if not os.access(source, os.R_OK):
            raise ConfigError(f"the file {source} cannot be read; change its permissions or run as its owner.")
        yield source, os.path.basename(source)
    elif glob.has_magic(source):
        yield from _matches(source, pattern, exclude, skipped)
    else:
        raise ConfigError(f"there is no {source}; give a file, a folder, a glob or `{STDLIB}`.")


def _matches(source: str, pattern: str, exclude: Path | None, skipped: list[Skipped]) -> Iterator[tuple[str, str]]:
    """What a glob matches; a folder it matches stands for its files. Names are relative to the glob's fixed part."""
    fixed = re.split(r"[*?\[]", source, maxsplit=1)[0].rpartition("/")[0]
    for match in sorted(glob.glob(source, recursive="**" in source)):
        name = os.path.relpath(match, fixed or ".")
        if not os.path.isdir(match):
            yield match, name
        elif "**" not in source:
            yield from ((path, f"{name}/{below}") for path, below in _walk(match, pattern, exclude, skipped))


def _walk(
    root: str, pattern: str, exclude: Path | None, skipped: list[Skipped], prune: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """The files below a folder that match, sorted by name; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped("unreadable", os.path.relpath(error.filename, root), error.strerror or str(error)))

    hidden = exclude.resolve() if exclude else None
    names = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and name not in prune and (hidden is None or Path(folder, name).resolve() != hidden)
        ]
        below = os.path.relpath(folder, root)
        if mds.INDEX in files and (shards := _listed_shards(folder)) is not None:
            folders.clear()  # the index says what belongs to the folder
            files = shards
        names += [name if below == "." else f"{below}/{name}" for name in files if name[0] != "."]
    loose = pattern.removeprefix("**/")
    for name in sorted(names):
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, loose):
            yield os.path.join(root, name), name


def _has_an_index(path: str) -> bool:
    """Whether a file is read through another one: Megatron's data, and the list of MDS shards that were named too."""
    folder, name = os.path.split(path)
    if name.endswith(".bin"):
        return index_file(path) is not None
    return name == mds.INDEX and _listed_shards(folder) is not None


def _listed_shards(folder: str) -> list[str] | None:
    """The shards of an MDS folder; None where it is another kind of folder."""
    try:
        return mds.shards(folder)
    except ValueError as error:
        raise ConfigError(f"{folder}/{mds.INDEX} {error}; copy the folder again.") from error


def _stat(path: str, name: str) -> SourceFile | Skipped:
    """The file with its kind and size, or why it is none."""
    try:
        status = os.stat(path)
    except OSError as error:
        return Skipped("unreadable", name, error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        return Skipped("unreadable", name, "not a regular file")
    if not os.access(path, os.R_OK):
        return Skipped("unreadable", name, "permission denied")
    lower = name.lower()
    if lower.endswith(mds.SUFFIXES):
        return SourceFile(path, name, "mds", status.st_size, status.st_mtime_ns)
    if index_file(path) == path:
        data = os.stat(data_file(path)).st_mtime_ns if os.path.exists(data_file(path)) else 0
        return SourceFile(path, name, "megatron", status.st_size, max(status.st_mtime_ns, data))
    if lower.endswith(".bin"):
        return Skipped("unreadable", name, "Megatron's .bin is read through its .idx, which is not beside it")
    if lower.endswith((".zst", ".bz2", ".xz", ".zip", ".tar")):
        raise ConfigError(f"{path}: this compression is not supported; unpack it, or pack JSON lines with gzip.")
    kind = next((kind for suffix, kind in _SUFFIXES.items() if lower.endswith(suffix)), "text")
    return SourceFile(path, name, kind, status.st_size, status.st_mtime_ns)


def _slices(file: SourceFile, unit_bytes: int, field: str, skipped: list[Skipped]) -> list[Slice]:
    """A file's slices: JSON lines by bytes, Parquet by row groups, ids by documents, anything else whole."""
    if file.kind in ID_KINDS:
        return _slices_of_ids(file, unit_bytes, field, skipped)
    if file.kind == "parquet":
        try:
            return [Slice(file, group, group + 1, size) for group, size in enumerate(_group_sizes(file.path, field))]
        except OSError as error:
            skipped.append(Skipped("unreadable", file.name, str(error)))
            return []
    if file.kind == "jsonl" and file.size > unit_bytes:
        begins = range(0, file.size, unit_bytes)
        return [
            Slice(file, begin, min(begin + unit_bytes, file.size), min(unit_bytes, file.size - begin))
            for begin in begins
        ]
    return [Slice(file, 0, file.size, file.size)]


def _slices_of_ids(file: SourceFile, unit_bytes: int, field: str, skipped: list[Skipped]) -> list[Slice]:
    try:
        if file.kind == "megatron":
            ranges = IndexedTokens(file.path).cut(unit_bytes // _TEXT_BYTES_AN_ID)
            return [Slice(file, begin, end, tokens * _TEXT_BYTES_AN_ID) for begin, end, tokens in ranges]
        with mds.Shard(file.path, field) as shard:
            of_text = _TEXT_BYTES_AN_ID / shard.dtype.itemsize if shard.dtype else 1
            return [Slice(file, a, b, int(size * of_text)) for a, b, size in shard.cut(int(unit_bytes / of_text))]
    except ValueError as error:
        raise ConfigError(f"{file.path} {error}.") from error
    except OSError as error:
        skipped.append(Skipped("unreadable", file.name, error.strerror or str(error)))
        return []


def _read_indexed(piece: Slice, field: str) -> Iterator[EncodedDocument | Skipped]:
    name = piece.file.name
    try:
        documents = IndexedTokens(piece.file.path).read(piece.begin, piece.end)
        for number, ids in enumerate(documents, piece.begin):
            yield EncodedDocument(f"{name}:{number}", ids)
    except ValueError as error:
        yield Skipped("unreadable", name, f"{error}; other parts of it were kept")


def _read_samples(piece: Slice, field: str) -> Iterator[Document | EncodedDocument | Skipped]:
    name = piece.file.name
    try:
        with mds.Shard(piece.file.path, field) as shard:
            for number, value in enumerate(shard.read(piece.begin, piece.end), piece.begin):
                place = f"{name}:{number}"
                yield Document(place, value) if isinstance(value, bytes) else EncodedDocument(place, value)
    except ValueError as error:
        yield Skipped("unreadable", name, f"{error}; samples up to the damage were kept")


def _read_text(piece: Slice, field: str) -> Iterator[Document | Skipped]:
    if piece.file.size > LARGEST_DOCUMENT:
        yield Skipped("too_large", piece.file.name, f"{piece.file.size} bytes")
        return
    with open(piece.file.path, "rb", buffering=0) as file:
        yield Document(piece.file.name, file.read())


def _read_lines(piece: Slice, field: str) -> Iterator[Document | Skipped]:
    """The lines whose first byte lies in the slice; a line that crosses its end is read to its own end."""
    with open(piece.file.path, "rb") as file:
        position = piece.begin
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1
        yield from _lines(file, position, piece.end, piece.file.name, field)


def _read_zipped_lines(piece: Slice, field: str) -> Iterator[Document | Skipped]:
    try:
        with gzip.open(piece.file.path) as file:
            yield from _lines(file, 0, None, piece.file.name, field)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Skipped("unreadable", piece.file.name, f"damaged gzip: {error}; lines up to the damage were kept")


def _lines(file: IO[bytes], position: int, end: int | None, name: str, field: str) -> Iterator[Document | Skipped]:
    while end is None or position < end:
        line = file.readline()
        if not line:
            return
        yield _parse(line, f"{name}:{position}", field)
        position += len(line)


def _parse(line: bytes, name: str, field: str) -> Document | Skipped:
    """The document of one line of JSON."""
    if not line.strip():
        return Skipped("empty", name, "blank line")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Skipped("bad_utf8", name, str(error))
    except (ValueError, RecursionError) as error:
        return Skipped("bad_json", name, str(error))
    if not isinstance(value, dict) or value.get(field) is None:
        return Skipped("missing_field", name, f"no {field!r}")
    return _document(name, value[field], field)


def _document(name: str, value: Any, field: str) -> Document | Skipped:
    if not isinstance(value, str):
        return Skipped("not_text", name, f"{field!r} is {type(value).__name__}")
    try:
        return Document(name, value.encode())
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        return Skipped("bad_utf8", name, str(error))


def _group_sizes(path: str, column: str) -> list[int]:
    """The uncompressed size of the column in each row group; OSError where the file is no Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise OSError(str(error)) from error
    with file:
        _check_column(path, file.schema_arrow, column)
        names = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
        leaf = names.index(column)
        groups = [file.metadata.row_group(i).column(leaf) for i in range(file.metadata.num_row_groups)]
        return [group.total_uncompressed_size for group in groups]


def _check_column(path: str, schema: Any, column: str) -> None:
    """Raises ConfigError unless the column is there and holds text."""
    import pyarrow as pa

    if column not in schema.names:
        raise ConfigError(
            f"{path} has no column {column!r}; its columns are {', '.join(schema.names)}; choose with --field."
        )
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    ):
        raise ConfigError(f"{path}: column {column!r} holds {kind}, not text; choose another with --field.")


def _read_rows(piece: Slice, field: str) -> Iterator[Document | Skipped]:
    """The rows of the slice's row groups, a thousand in memory at a time; a name ends in the row's number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = piece.file.name
    try:
        with pq.ParquetFile(piece.file.path) as file:
            row = sum(file.metadata.row_group(i).num_rows for i in range(piece.begin))
            for group in range(piece.begin, piece.end):
                for batch in file.iter_batches(1024, row_groups=[group], columns=[field], use_threads=False):
                    for text in _as_bytes(batch.column(0)):
                        if text is None:
                            yield Skipped("missing_field", f"{name}:{row}", f"{field!r} is null")
                        else:
                            yield Document(f"{name}:{row}", text)
                        row += 1
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        yield Skipped("unreadable", name, f"damaged Parquet: {error}; rows up to the damage were kept")


def _as_bytes(column: Any) -> list[bytes | None]:
    """A column's values as UTF-8, whatever kind of text Arrow keeps them as; no string is decoded on the way."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()

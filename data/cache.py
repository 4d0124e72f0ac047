"""Where the bytes of a corpus are: local files in place, and files behind URLs in a bounded folder of this node.

A file is seen under its final name only when its size and checksum have been checked. The folder is shared by the
processes of a node: a short lock on the folder guards its book-keeping, a lock on each file says that it is in use.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ..errors import ConfigError, UserError
from .index import DOCUMENT, Corpus, ShardInfo, is_url

BLOCK = 1 << 20
LOCK = ".lock"
POLL = 0.1
SAFE_NAME = re.compile(r"[A-Za-z0-9._/-]+")


@dataclass(frozen=True)
class ShardCache:
    """Opens the files of corpora; those behind URLs are kept in `directory`, least recently used out first.

    Attributes:
        directory: a folder of this node (`~` is the user's home), needed only for URLs. Several processes may share
            it.
        max_bytes: how much the folder may hold. Files that some process has open are never evicted.
        verify: "size" checks the size of a local shard when it is opened; "checksum" reads it once more for its
            sha256. Whatever came through a URL is always checked by both.
        retries: how often a failed transfer is tried again, waiting `backoff` seconds, then twice that, and so on.
    """

    directory: str | Path | None = None
    max_bytes: int = 64 << 30
    verify: Literal["size", "checksum"] = "size"
    retries: int = 3
    backoff: float = 1.0
    _verified: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.verify not in ("size", "checksum"):
            raise ConfigError(f"verify is {self.verify!r}; use size or checksum.")
        if self.directory is not None:
            object.__setattr__(self, "directory", Path(self.directory).expanduser())

    def open(self, corpus: Corpus, name: str, size: int | None, sha256: str) -> BinaryIO:
        """Returns file `name` of the corpus, whole and open for reading.

        Args:
            corpus: whose file; its location is a folder or a URL.
            name: path relative to the location.
            size: bytes, or None where only the checksum is known.
            sha256: of the whole file.
        """
        if not SAFE_NAME.fullmatch(name) or name.startswith("/") or ".." in name.split("/"):
            raise UserError(
                f"{corpus.location} lists a file named {name!r}, which may leave its folder; prepare it again."
            )
        if is_url(corpus.location) and not corpus.location.startswith("file:"):
            return self._open_cached(corpus, name, size, sha256)
        return self._open_local(Path(re.sub("^file:(//)?", "", corpus.location)) / name, size, sha256)

    def _open_local(self, path: Path, size: int | None, sha256: str) -> BinaryIO:
        try:
            file = path.open("rb")
        except OSError as error:
            expected = f"{size} bytes" if size is not None else "a document table"
            raise UserError(
                f"{path} cannot be read ({error.strerror}); expected {expected}. Prepare the corpus again."
            ) from error
        found = os.fstat(file.fileno()).st_size
        if size is not None and found != size:
            raise UserError(
                f"{path} holds {found} bytes, expected {size}; it was cut or changed. Prepare the corpus again."
            )
        if self.verify == "checksum" and str(path) not in self._verified:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256:
                raise UserError(
                    f"{path} has sha256 {digest}, expected {sha256}; it was changed. Prepare the corpus again."
                )
            self._verified.add(str(path))
            file.seek(0)
        return file

    def _open_cached(self, corpus: Corpus, name: str, size: int | None, sha256: str) -> BinaryIO:
        if self.directory is None:
            raise ConfigError(
                f"{corpus.location} is a URL; name a cache folder for its shards (ShardCache(directory))."
            )
        final = Path(self.directory) / corpus.fingerprint / name
        part = final.with_name(final.name + ".part")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to the cache {self.directory}: {error.strerror}; name another folder for it."
            ) from error
        while True:
            if file := self._open_shared(final):
                return file
            if claimed := _claim(part):
                with claimed:
                    self._fill(claimed, corpus.url(name), final, size, sha256)
                    if file := self._open_shared(final):
                        return file
            else:
                time.sleep(POLL)

    def _fill(self, part: BinaryIO, url: str, final: Path, size: int | None, sha256: str) -> None:
        """Puts what the URL gives in place, by way of the claimed file `part`; leaves nothing where it cannot."""
        path = Path(part.name)
        try:
            if not final.exists():
                self._transfer(url, part, size, sha256)
                with self._locked():
                    os.rename(path, final)
                    fcntl.flock(part, fcntl.LOCK_SH)
        finally:
            with self._locked():
                if _is_at(part, path):
                    path.unlink()

    def _open_shared(self, path: Path) -> BinaryIO | None:
        """The file with a shared lock and a fresh time of use, or None if it is not there."""
        with self._locked():
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            now = time.time_ns()  # finer than the kernel's own tick of some milliseconds
            os.utime(path, ns=(now, now))
            return file

    def _transfer(self, url: str, file: BinaryIO, size: int | None, sha256: str) -> None:
        """Fills `file` from the URL; raises UserError once the retries are used up."""
        problem: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return self._download(url, file, size, sha256)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"The disk of {self.directory} is full while fetching {url}; free space there."
                    ) from error
                problem = error
        raise UserError(f"{url} could not be fetched in {self.retries + 1} tries: {problem}.") from problem

    def _download(self, url: str, file: BinaryIO, size: int | None, sha256: str) -> None:
        from webdataset.gopen import gopen

        self._reserve(file, size or 0)
        digest, found = hashlib.sha256(), 0
        with gopen(url, "rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                found += len(block)
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if size is not None and found != size:
            raise ValueError(f"it has {found} bytes, expected {size}")
        if digest.hexdigest() != sha256:
            raise ValueError(f"it has sha256 {digest.hexdigest()}, expected {sha256}")

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Empties `file` and gives it `size` bytes of the bound, evicting files that nobody has open."""
        with self._locked():
            file.seek(0)
            file.truncate(0)
            names = [path for path in Path(self.directory or "").rglob("*") if path.is_file() and path.name != LOCK]
            used = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in names)
            total = sum(entry[1] for entry in used)
            for _, length, path in used:
                if total + size <= self.max_bytes:
                    break
                total -= length if _evict(path) else 0
            if total + size > self.max_bytes:
                raise UserError(
                    f"The cache {self.directory} may hold {self.max_bytes} bytes; {total} are in use and {size} more "
                    "are needed. Raise its bound or lower shuffle_window."
                )
            file.truncate(size)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the folder's lock, across threads and processes."""
        with (Path(self.directory or "") / LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _claim(part: Path) -> BinaryIO | None:
    """Opens the file to fill for this process alone; None while another fills it, or has just put it in place."""
    part.touch()
    try:
        file = part.open("r+b")
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, part):
            return file
    file.close()
    return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _evict(path: Path) -> bool:
    """Removes the file unless somebody has it open; returns whether it is gone."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True


class SplitFiles:
    """The shards of one split of a corpus, mapped into memory as they are asked for; the last few stay open."""

    def __init__(self, corpus: Corpus, split: str, cache: ShardCache | None = None, max_open: int = 64):
        if split not in corpus.splits:
            raise ConfigError(f"{corpus.location} has no split {split!r}; it has {', '.join(sorted(corpus.splits))}.")
        self.corpus = corpus
        self.shards = corpus.splits[split].shards
        self.cache = cache or ShardCache()
        self.dtype = np.dtype(corpus.dtype).newbyteorder("<")
        self.table = lru_cache(max_open)(partial(_open_table, corpus, self.shards, self.cache))
        self.data = lru_cache(max_open)(partial(_open_data, corpus, self.shards, self.cache))


def _open_table(corpus: Corpus, shards: tuple[ShardInfo, ...], cache: ShardCache, shard: int) -> np.ndarray:
    """The documents of a shard: an array of DOCUMENT."""
    info = shards[shard]
    with cache.open(corpus, info.index, None, info.index_sha256) as file:
        table = _read_table(file)
    if table is None or len(table) != info.documents:
        found = "something else" if table is None else f"{len(table)}"
        raise UserError(
            f"{corpus.location}/{info.index} should be a table of {info.documents} documents, found {found}; "
            "prepare the corpus again."
        )
    return table


def _open_data(corpus: Corpus, shards: tuple[ShardInfo, ...], cache: ShardCache, shard: int) -> mmap.mmap:
    """The bytes of a shard's tar. They stay mapped, and locked in the cache, until the last reference goes."""
    info = shards[shard]
    with cache.open(corpus, info.file, info.size, info.sha256) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_table(file: BinaryIO) -> np.ndarray | None:
    """The table mapped from an open .npy file, or None where it is not one of DOCUMENT."""
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        (count,), _, dtype = reader(file)
    except (ValueError, KeyError):
        return None
    offset = file.tell()
    size = os.fstat(file.fileno()).st_size
    if dtype != DOCUMENT or size != offset + count * DOCUMENT.itemsize:
        return None
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), DOCUMENT, count, offset)

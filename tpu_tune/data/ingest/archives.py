"""Compressed files and archives, read as streams: nothing is unpacked to the disk that can be read as it is unpacked.

A path that climbs out of its archive, a link, a device, an encrypted member, an archive that unpacks to more than it
may: each is a bad source of its own, named as `archive!member`. Members' names appear in messages only; no path is made
of them.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from tpu_tune.data import streams
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, suffix_of
from tpu_tune.data.ingest.encodings import too_long
from tpu_tune.data.ingest.ingest_options import IngestOptions

RATIO_FREE_BYTES = 64 * 2**20  # what unpacks to less is no bomb, however small it was
HEADER_BYTES = 64 * 2**20  # of a tar archive between two files
# A member that must be read back and forth is held in memory up to this size, above it in a temporary file.
SPOOL_BYTES = 16 * 2**20
# What the decompressors raise at data that is damaged or cut short.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, OSError)
# What Python's readers of archives raise beside that: at a packing or a version that they do not know, and at numbers
# in a header that no archive has.
_UNREADABLE = (NotImplementedError, RuntimeError, ValueError, ArithmeticError, LookupError, struct.error, MemoryError)
_ARCHIVES = (".zip", ".tar")
_SHORT = {".tgz": ".tar.gz", ".tbz": ".tar.bz2", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


_COMPRESSED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file: bz2.BZ2File(file),
    ".xz": lambda file: lzma.LZMAFile(file),
    ".lzma": lambda file: lzma.LZMAFile(file),
    ".zst": _zstd,
}


@dataclass
class Budget:
    """How much one file on the disk may still unpack to; everything inside it draws on the same.

    Attributes:
      name: the file.
      size: its own bytes.
      limit, ratio: of `IngestOptions`.
      used: bytes unpacked so far.
    """

    name: str
    size: int
    limit: int
    ratio: float
    used: int = 0

    @classmethod
    def of(cls, blob: Blob, options: IngestOptions) -> Budget:
        """The budget of a file, by its size on the disk (a member of an archive has its archive's budget already)."""
        size = os.path.getsize(blob.path) if blob.path else 2**62
        return cls(blob.name, size, options.max_unpacked_bytes, options.max_ratio)

    def spend(self, count: int) -> None:
        """Count unpacked bytes.

        Raises:
          Bomb: they are too many.
        """
        self.used += count
        if self.used > self.limit:
            raise Bomb(f"unpacks to more than {self.limit:,} bytes; --max-unpacked-gb allows more")
        if self.used > RATIO_FREE_BYTES and self.used > self.ratio * self.size:
            raise Bomb(
                f"unpacks to more than {self.ratio:g} times its size, as a zip bomb does; --max-ratio allows more"
            )


class Bomb(BadSource):
    """An archive unpacks to more than it may; nothing more of it is read."""


class CountedStream:
    """A stream whose bytes draw on a budget.

    Attributes:
      tail: the last bytes that were read.
      allowed: how many more may be read before it is set again.
    """

    def __init__(self, file: IO[bytes], budget: Budget):
        self._file, self._budget = file, budget
        self.tail = b""
        self.allowed = 2**62

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, fewer only at the end; the budget is checked before all of them are held."""
        pieces: list[bytes] = []
        while size:
            with readable():
                piece = self._file.read(2**20 if size < 0 else min(size, 2**20))
            if not piece:
                break
            self._budget.spend(len(piece))
            self.allowed -= len(piece)
            if self.allowed < 0:
                raise Bomb(f"holds a header of more than {HEADER_BYTES // 2**20} MiB")
            pieces.append(piece)
            size -= len(piece) if size > 0 else 0
        if pieces:
            self.tail = pieces[-1][-1024:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> CountedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def inner_name(name: str) -> str:
    """The name without the suffixes of compression: `rows.csv.gz` -> `rows.csv`, `pages.tgz` -> `pages.tar`."""
    return _peeled(name)[0]


def _peeled(name: str) -> tuple[str, list[str]]:
    """The name without the suffixes of compression, and these, the outermost first."""
    found: list[str] = []
    while True:
        suffix = suffix_of(name)
        if suffix in _SHORT:
            name = name[: -len(suffix)] + _SHORT[suffix]
        elif suffix in _COMPRESSED:
            name = name[: -len(suffix)]
            found.append(suffix)
        else:
            return name, found


def unpacked(
    blob: Blob, options: IngestOptions, tally: Tally, budget: Budget | None = None, depth: int = 1
) -> Iterator[Blob]:
    """Yield the plain files inside a file, archives in archives included; the file itself where it is not packed.

    Read each before asking for the next.

    Raises:
      BadSource, or one of `DAMAGED`: the file is damaged, or unpacks to more than it may.
    """
    inner, compressions = _peeled(blob.name)
    budget = budget or Budget.of(blob, options)
    for suffix in compressions:
        blob = Blob(blob.name, _opened(blob, _COMPRESSED[suffix], budget))
    if suffix_of(inner) not in _ARCHIVES:
        yield blob
        return
    if depth > options.max_depth:
        raise BadSource(f"is an archive inside {depth - 1} others; --max-depth allows more")
    members = _zip_members if suffix_of(inner) == ".zip" else _tar_members
    for member in members(blob, tally, budget):
        try:
            yield from unpacked(member, options, tally, budget, depth + 1)
        except Bomb:
            raise
        except BadSource as error:
            tally.skipped.add(member.name, str(error))
        except DAMAGED as error:
            tally.skipped.add(member.name, damage(error))


def _opened(blob: Blob, opener: Callable[[IO[bytes]], IO[bytes]], budget: Budget) -> Callable[[], IO[bytes]]:
    return lambda: CountedStream(opener(blob.open()), budget)


def damage(error: BaseException) -> str:
    """What to say of a source that one of `DAMAGED` ended."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"is cut short or damaged ({' '.join(str(error).split())[:120] or type(error).__name__})"


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn what the readers of archives raise at an archive that they cannot read into `BadSource`."""
    try:
        yield
    except (BadSource, *DAMAGED):
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadSource(f"cannot be unpacked ({reason}); unpack it first") from error


def _zip_members(blob: Blob, tally: Tally, budget: Budget) -> Iterator[Blob]:
    with readable(), blob.open() as file, seekable(file) as archive_file, zipfile.ZipFile(archive_file) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            name = f"{blob.name}!{entry.filename}"
            try:
                checked_member(entry.filename)
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG):
                    raise BadSource("is a link or a device, not a file")
                if entry.flag_bits & 1:
                    raise BadSource("is encrypted; unpack it first")
            except BadSource as error:
                tally.skipped.add(name, str(error))
                continue
            yield Blob(name, lambda entry=entry: CountedStream(_zip_file(archive, entry), budget))


def _zip_file(archive: zipfile.ZipFile, entry: zipfile.ZipInfo | str) -> IO[bytes]:
    with readable():
        return archive.open(entry)


def _tar_members(blob: Blob, tally: Tally, budget: Budget) -> Iterator[Blob]:
    with readable(), blob.open() as file:
        # A compressed archive's bytes are counted as they are unpacked; those of a plain one are what the disk holds.
        stream = file if isinstance(file, CountedStream) else CountedStream(file, Budget(blob.name, 2**62, 2**62, 1.0))
        stream.allowed = HEADER_BYTES
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for entry in archive:
                stream.allowed = entry.size + HEADER_BYTES  # tarfile holds a header whole, however long it says it is
                if entry.isdir():
                    continue
                name = f"{blob.name}!{entry.name}"
                try:
                    checked_member(entry.name)
                    if not entry.isreg():
                        link = f"a link to {entry.linkname}" if entry.issym() or entry.islnk() else "a device"
                        raise BadSource(f"is {link}, not a file")
                except BadSource as error:
                    tally.skipped.add(name, str(error))
                    continue
                # A sparse member can be far larger than what is stored of it.
                spare = Budget(blob.name, budget.size, budget.limit, budget.ratio) if entry.issparse() else None
                yield Blob(name, lambda entry=entry, spare=spare: _tar_file(archive, entry, spare))
        stream.allowed = 2**62
        while stream.read(2**20):
            pass
        if stream.tail.strip(b"\0"):
            raise EOFError("the end of the archive is missing")


def _tar_file(archive: tarfile.TarFile, entry: tarfile.TarInfo, budget: Budget | None) -> IO[bytes]:
    with readable():
        file = archive.extractfile(entry)
    return CountedStream(file, budget) if budget else file


def checked_member(name: str) -> None:
    """Refuse a member's name that leads out of its archive.

    Raises:
      BadSource: it is absolute or climbs with `..`.
    """
    parts = re.split(r"[/\\]", name)
    if ".." in parts:
        raise BadSource("its path climbs out of the archive")
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name):
        raise BadSource("its path is absolute")


def read_member(archive: zipfile.ZipFile, name: str, budget: Budget) -> bytes:
    """The content of a zip archive's member.

    Raises:
      BadSource: it is larger than a row may be, or the archive unpacks to more than it may.
      KeyError: there is none of that name.
    """
    if name not in archive.NameToInfo:
        raise KeyError(name)
    with readable(), archive.open(name) as file:
        content = file.read(streams.MAX_ROW_BYTES + 1)
    budget.spend(len(content))
    if len(content) > streams.MAX_ROW_BYTES:
        raise BadSource(f"is larger than {too_long()}, too much for one row")
    return content


@contextlib.contextmanager
def seekable(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield a stream that can be read back and forth: itself, or a copy that is gone afterwards."""
    if isinstance(file, io.BufferedReader) and file.seekable() and isinstance(file.raw, io.FileIO):
        yield file
        return
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as copy:
        shutil.copyfileobj(file, copy, 2**20)
        copy.seek(0)
        yield copy


@contextlib.contextmanager
def on_disk(blob: Blob, suffix: str) -> Iterator[str]:
    """Yield a path for what can only be read by one: the file's own, or a temporary copy's."""
    if blob.path:
        yield blob.path
        return
    with blob.open() as file, tempfile.NamedTemporaryFile(suffix=suffix) as copy:
        shutil.copyfileobj(file, copy, 2**20)
        copy.flush()
        yield copy.name

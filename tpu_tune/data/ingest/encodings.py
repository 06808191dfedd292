"""Bytes to text: which encoding, where a byte does not fit, and lines that stay within bounds."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import IO

from tpu_tune.data import streams
from tpu_tune.data.ingest.blobs import BadSource, Blob
from tpu_tune.data.sources import likely_encoding

_ESCAPED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of a byte that does not fit
# Python's codecs of text that are no encodings of a file: of names in the DNS, of source code.
_NO_ENCODINGS = ("idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "unicode_escape")
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
          (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))  # fmt: skip


def read_document(blob: Blob) -> bytes:
    """The whole of a document.

    Raises:
      BadSource: it is larger than a row may be.
    """
    with blob.open() as file:
        content = file.read(streams.MAX_ROW_BYTES + 1)
    if len(content) > streams.MAX_ROW_BYTES:
        raise BadSource(f"is larger than {too_long()}, too much for one row")
    return content


def too_long() -> str:
    """The limit of a row, in words."""
    limit = streams.MAX_ROW_BYTES
    return f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit} bytes"


def byte_order_mark(start: bytes) -> tuple[str, int]:
    """Return the encoding that a byte order mark says, and the mark's length; ("", 0) without one."""
    return next(((name, len(mark)) for mark, name in _MARKS if start.startswith(mark)), ("", 0))


def is_text_encoding(name: str) -> bool:
    """Whether Python can decode a text by this name; rot13, base64, idna, `undefined` and the like are no encodings."""
    try:
        found = codecs.lookup(name)
        return found._is_text_encoding and found.name not in _NO_ENCODINGS and b"".decode(name) == ""
    except (LookupError, ValueError, TypeError):
        return False


def decode(content: bytes, encoding: str = "") -> str:
    """Decode a text strictly: by its byte order mark, `encoding`, or else as UTF-8.

    Raises:
      BadSource: a byte does not fit; the message has its line.
    """
    marked, length = byte_order_mark(content)
    name, content = marked or encoding or "utf-8", content[length:]
    _check_mark(name, marked)
    try:
        return content.decode(name)
    except UnicodeDecodeError as error:
        raise BadSource(does_not_fit(content, error, name)) from error


def _check_mark(encoding: str, marked: str) -> None:
    """Refuse UTF-16 and UTF-32 without the mark that says in which order their bytes stand."""
    if encoding and not marked and codecs.lookup(encoding).name in ("utf-16", "utf-32"):
        name = codecs.lookup(encoding).name
        raise BadSource(f"has no byte order mark, which {name} wants; --encoding {name}-le or {name}-be reads it")


def does_not_fit(content: bytes, error: UnicodeDecodeError, name: str) -> str:
    """Where a text does not fit an encoding, in words."""
    line = content.count(b"\n", 0, error.start) + 1
    byte = error.start - content.rfind(b"\n", 0, error.start)
    shown = {"utf-8": "UTF-8"}.get(name, name)
    likely = likely_encoding(content)
    other = f", perhaps {likely}" if likely != name else ""
    return f"not valid {shown} (line {line}, byte {byte}; --encoding names another{other})"


class TextLines:
    """The lines of a stream with their ends as they are; a line that is too long is None, and passed over.

    Attributes:
      number: of the line given last, from 1.
    """

    def __init__(self, file: IO[bytes], encoding: str = ""):
        """Start reading; see `decoded`."""
        self._file = decoded(file, encoding)
        self.number = 0

    def __iter__(self) -> Iterator[str | None]:
        """Itself."""
        return self

    def __next__(self) -> str | None:
        """The next line, or None in place of one that is longer than a row may be."""
        line = self._file.readline(streams.MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) <= streams.MAX_ROW_BYTES:
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._file.readline(min(streams.MAX_ROW_BYTES, 2**20))
        return None


def decoded(file: IO[bytes], encoding: str = "") -> io.TextIOWrapper:
    """Text of a stream, line ends as they are; bytes that do not fit are left for `misfit` to find.

    Args:
      encoding: of what has no byte order mark, which says it; "" takes UTF-8.
    """
    stream = buffered(file)
    marked, length = byte_order_mark(stream.peek(4)[:4])
    stream.read(length)
    encoding = marked or encoding
    _check_mark(encoding, marked)
    return io.TextIOWrapper(stream, encoding=encoding or "utf-8", errors="surrogateescape", newline="")


def buffered(file: IO[bytes]) -> io.BufferedReader:
    """A stream that has `peek` and `readline`."""
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(_Raw(file), 2**17)


def misfit(text: str) -> bool:
    """Whether a piece of `decoded` text holds bytes that do not fit its encoding."""
    return not text.isascii() and _ESCAPED.search(text) is not None


class _Raw(io.RawIOBase):
    """What only has `read` (a member of an archive), as a raw stream that can be buffered."""

    def __init__(self, file: IO[bytes]):
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

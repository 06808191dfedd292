"""Dictionaries of the dictd server: headwords and definitions as `input` and `output`.

`NAME.index` has a line for each headword: the word, and where its entry begins and how long it is, in a base 64 of
their own (dictfmt(1)). `NAME.dict` holds the entries; `NAME.dict.dz` is the same, as gzip reads it.
"""

from __future__ import annotations

import gzip
import os
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from tpu_tune.data import streams
from tpu_tune.data.ingest.archives import Budget, CountedStream
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, row_of
from tpu_tune.data.ingest.encodings import too_long
from tpu_tune.data.ingest.ingest_options import IngestOptions

_DIGITS = {
    character: value
    for value, character in enumerate(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
MAX_DICTIONARY_BYTES = 2**30  # entries stand in any order, so a dictionary is held whole


def index_of(path: str) -> str:
    """The path of the index that belongs to a `.dict` or `.dict.dz`."""
    return path.removesuffix(".dz").removesuffix(".dict") + ".index"


def read(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield a row for each entry, in the order of the index; `source` is `file:line of the index`.

    An entry that has several headwords gives a row for each. The first line of an entry repeats the headword and is
    left out; entries about the dictionary itself (`00-database-...`) too.

    Raises:
      BadSource: the index is missing, or the dictionary is too large.
    """
    if not blob.path:
        raise BadSource("a dictionary cannot be read inside an archive: its .index lies beside it; unpack it first")
    index = index_of(blob.path)
    if not os.path.isfile(index):
        raise BadSource(f"there is no {os.path.basename(index)} beside it")
    entries = _entries(blob, options)
    with open(index, "rb") as lines:
        number = 0
        while line := lines.readline(streams.MAX_ROW_BYTES + 1):
            number += 1
            where = f"{blob.name}:{number}"
            if len(line) > streams.MAX_ROW_BYTES:
                raise BadSource(f"line {number} of its index is longer than {too_long()}")
            if not line.strip() or line.startswith((b"00-database", b"00database")):
                continue
            fields = line.rstrip(b"\r\n").split(b"\t")
            try:
                start, length = _number(fields[1]), _number(fields[2])
                word, entry = fields[0].decode("utf-8"), entries[start : start + length].decode("utf-8")
            except (IndexError, KeyError):
                tally.skipped.add(
                    where, "not an entry of an index: a word, its offset and its length, with tabs between"
                )
                continue
            except UnicodeDecodeError:
                tally.skipped.add(where, "the entry is not valid UTF-8")
                continue
            if start + length > len(entries):
                tally.skipped.add(where, "the entry lies past the end of the dictionary, which is cut short")
                continue
            word, definition = _word_and_definition(word.strip(), entry)
            if word and definition:
                yield row_of(where, input=word, output=definition)
            else:
                tally.empty += 1


def _entries(blob: Blob, options: IngestOptions) -> bytes:
    with open(blob.path, "rb") as raw:
        packed = blob.path.endswith(".dz")
        file = CountedStream(gzip.GzipFile(fileobj=raw) if packed else raw, Budget.of(blob, options))
        pieces, size = [], 0
        while piece := file.read(2**20):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_DICTIONARY_BYTES:
                raise BadSource(f"is larger than {MAX_DICTIONARY_BYTES // 2**20} MiB")
    return b"".join(pieces)


def _number(digits: bytes) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def _word_and_definition(word: str, entry: str) -> tuple[str, str]:
    """The headword as the entry writes it, and the entry without its headwords and the margin that its lines share.

    An entry begins with its headwords, a line each, and often an empty line; what it says is indented.
    """
    lines = entry.split("\n")
    # An index is often in small letters and without some signs.
    heads = {re.sub(r"\W", "", line.casefold()): line.strip() for line in lines[:1] if line.strip()}
    first = next((number for number, line in enumerate(lines) if not line or line[0] in " \t"), len(lines))
    heads.update((re.sub(r"\W", "", line.casefold()), line.strip()) for line in lines[:first])
    written = heads.get(re.sub(r"\W", "", word.casefold()), "")
    if not (first < len(lines) and (not lines[first] or written)):
        first = 1 if written else 0
    # The first paragraph may have a margin of its own.
    start, gap, rest = "\n".join(lines[first:]).lstrip("\n").partition("\n\n")
    body = textwrap.dedent(start) + gap + textwrap.dedent(rest)
    return written or word, body.strip() or entry.strip()

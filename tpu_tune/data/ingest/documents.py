"""Documents that are a row as they are: plain text and Markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from tpu_tune.data import streams
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, row_of
from tpu_tune.data.ingest.encodings import TextLines, decode, misfit, too_long
from tpu_tune.data.ingest.ingest_options import IngestOptions

PIECE_CHARACTERS = 8 * 2**20  # a text that is too long for a row is cut into pieces of about this


def read_text(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield a text as one row, its line ends as `\\n`; one that is too long for a row is cut at empty lines."""
    with blob.open() as file:
        content = file.read(streams.MAX_ROW_BYTES + 1)
        if len(content) <= streams.MAX_ROW_BYTES:
            text = re.sub("\r\n?", "\n", decode(content, options.encoding))
            if "\0" in text:
                raise BadSource("holds NUL bytes: it is not text, or in an encoding to be named with --encoding")
            if text.strip():
                yield row_of(blob.name, text=text)
            else:
                tally.empty += 1
        else:
            yield from _pieces(blob, _Joined(content, file), options, tally)


def _pieces(blob: Blob, file: _Joined, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Cut a text after an empty line, or after any line where none comes for as long again."""
    held: list[str] = []
    size, first = 0, 1
    lines = TextLines(file, options.encoding)
    for line in lines:
        where = f"{blob.name}:{lines.number}"
        if line is None or misfit(line):
            reason = "not valid in its encoding" if line is not None else f"the line is longer than {too_long()}"
            tally.skipped.add(where, reason)
            continue
        line = re.sub("\r\n?$", "\n", line)
        held.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS and (not line.strip() or size >= 2 * PIECE_CHARACTERS):
            yield row_of(f"{blob.name}:{first}", text="".join(held))
            held, size, first = [], 0, lines.number + 1
    if "".join(held).strip():
        yield row_of(f"{blob.name}:{first}", text="".join(held))


class _Joined:
    """What was read of a stream, and the rest of it."""

    def __init__(self, start: bytes, rest: Any):
        self._start, self._rest = io.BytesIO(start), rest

    def read(self, size: int = -1) -> bytes:
        return self._start.read(size) or self._rest.read(size)

    def close(self) -> None:
        self._rest.close()

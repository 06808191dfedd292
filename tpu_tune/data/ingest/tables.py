"""Tables: CSV and TSV, Parquet, Arrow and Feather, a batch at a time.

CSV is read by Python's own reader and not by pandas: pandas silently fills a row that is too short with empty cells, so
that a cut or shifted row looks like a good one. For undamaged tables both give the same cells.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import Any

from tpu_tune.data import columnar, streams
from tpu_tune.data.ingest.archives import inner_name, seekable
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, suffix_of
from tpu_tune.data.ingest.encodings import TextLines, misfit, too_long
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.picking import picked
from tpu_tune.data.messages import without_nulls

_DELIMITERS = (",", ";", "\t", "|")


class _TooLong(Exception):
    """A line of a table is longer than a row may be."""


class _Lines:
    """The lines of a table for `csv.reader`; keeps those of the current row."""

    def __init__(self, lines: TextLines):
        self.lines = lines
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        if line is None:
            raise _TooLong
        self.row.append(line)
        return line


def read_csv(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield a table's rows; every cell is text, just as it stands there.

    The first line names the columns. `source` has the line on which the row begins.
    """
    with blob.open() as file:
        lines = _Lines(TextLines(file, options.encoding))
        first = next(lines.lines, "")
        if first is None:
            raise BadSource(f"its first line is longer than {too_long()}")
        if not first.strip():
            raise BadSource("holds no table: its first line is to name the columns")
        delimiter = "\t" if suffix_of(inner_name(blob.name)) in (".tsv", ".tab") else _delimiter(first)
        csv.field_size_limit(streams.MAX_ROW_BYTES)
        reader = csv.reader(_Joined(first, lines), delimiter=delimiter)
        header = columnar.unique_names(next(reader))
        lines.row.clear()
        if misfit("".join(header)):
            raise BadSource("line 1 is not valid in its encoding; --encoding names another")
        rows = _cells(blob.name, reader, lines, header, tally)
        yield from picked(rows, options, tally, blob.name, header)


class _Joined:
    """The first line, and then the others."""

    def __init__(self, first: str, lines: _Lines):
        self._first, self._lines = first, lines

    def __iter__(self) -> _Joined:
        return self

    def __next__(self) -> str:
        if self._first:
            line, self._first = self._first, ""
            return line
        return next(self._lines)


def _cells(
    name: str, reader: Any, lines: _Lines, header: list[str], tally: Tally
) -> Iterator[tuple[str, dict[str, str]]]:
    while True:
        where = f"{name}:{lines.lines.number + 1}"
        lines.row.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except _TooLong:
            tally.skipped.add(where, f"the line is longer than {too_long()}")
            continue
        except csv.Error as error:
            long = "field larger" in str(error)
            tally.skipped.add(where, f"a cell is longer than {too_long()}" if long else f"not a row ({error})")
            continue
        if not row:
            continue
        if len(lines.row) > 1 and _is_open(lines.row):
            tally.skipped.add(where, "a quote is opened here that nothing closes")
        elif len(row) != len(header):
            tally.skipped.add(where, f"{len(row)} cells where the header names {len(header)} columns")
        elif any(misfit(cell) for cell in row):
            tally.skipped.add(where, "not valid in its encoding (UTF-8, unless --encoding names another)")
        else:
            yield where, dict(zip(header, row, strict=True))


def _is_open(lines: list[str]) -> bool:
    """Whether a row of several lines ends inside a quoted cell, as only the last of a file can."""
    if sum(line.count('"') for line in lines) % 2 == 0:
        return False
    try:
        next(csv.reader(lines, strict=True))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _delimiter(first: str) -> str:
    """The comma, unless that finds one column and another usual delimiter more."""
    counts = {mark: len(next(csv.reader([first], delimiter=mark))) for mark in _DELIMITERS}
    return "," if counts[","] > 1 else max(_DELIMITERS, key=lambda mark: counts[mark])


def read_parquet(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file; only the columns that are picked are read."""
    with blob.open() as file, seekable(file) as source:
        try:
            size = source.seek(0, os.SEEK_END)
            source.seek(0)
            table = columnar.open_parquet(source, size, options.max_ratio)
            columns = table.schema_arrow.names
            batches = columnar.parquet_batches(table, _columns_to_read(columns, options))
            rows = columnar.rows_of(batches, "Parquet", streams.MAX_ROW_BYTES)
            yield from picked(_numbered(blob.name, rows, tally), options, tally, blob.name, columns)
        except columnar.BadTable as error:
            raise BadSource(str(error)) from error


def _columns_to_read(columns: list[str], options: IngestOptions) -> list[str] | None:
    """The columns to read, or None for all: a picker of known keys may need any."""
    named = [options.column, options.input_column, options.output_column]
    if not any(named):
        return None
    return [name for name in columns if name in named or name in dict(options.columns)]


def read_arrow(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow IPC file or stream, or of a Feather file of either version."""
    with blob.open() as file, seekable(file) as source:
        try:
            schema, batches = columnar.open_arrow(source)
            rows = columnar.rows_of((batch for batch, _ in batches), "Arrow", streams.MAX_ROW_BYTES)
            yield from picked(_numbered(blob.name, rows, tally), options, tally, blob.name, schema.names)
        except columnar.BadTable as error:
            raise BadSource(str(error)) from error


def _numbered(name: str, rows: Iterator[dict[str, Any] | None], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        if row is None:
            tally.skipped.add(f"{name}:{number}", f"the row is larger than {too_long()}")
        else:
            yield f"{name}:{number}", {key: without_nulls(value) for key, value in row.items()}

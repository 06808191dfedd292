"""Parquet and Arrow files as record batches that are sound, and as rows that are not too large.

pyarrow trusts what a file says of itself: an offset that was damaged makes it read beyond its memory, and the process
dies. Every batch is therefore validated in full before anything of it is used. A file of some kilobytes can also hold a
cell of gigabytes; what a Parquet file unpacks to is held against its size, and a row against a limit, before either
becomes Python's strings.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tpu_tune.checkpoints import storage

BATCH_ROWS = 256  # that become Python's objects together
RATIO_FREE_BYTES = 64 * 2**20  # what unpacks to less is no bomb, however small it was
MAX_RATIO = 300.0  # times its own size, that a file may unpack to


class BadTable(ValueError):
    """A file cannot be read as Parquet or Arrow; the message says why, and the caller adds where."""


@contextlib.contextmanager
def reading(kind: str) -> Iterator[None]:
    """Turn what pyarrow raises at a damaged file, which has no common type, into `BadTable`."""
    import pyarrow

    try:
        yield
    except BadTable:
        raise
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, pyarrow.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadTable(f"cannot be read as {kind} ({reason})") from error


def open_arrow(source: Any) -> tuple[Any, Iterator[tuple[Any, Any]]]:
    """Open an Arrow IPC file or stream, or a Feather file of either version.

    Args:
      source: a path (mapped into memory where it is local), or a stream that can be read back and forth.

    Returns:
      (pyarrow schema, iterator over (validated pyarrow record batch, its own metadata or None)).

    Raises:
      BadTable: it cannot be read, also while iterating.
    """
    import pyarrow

    with reading("Arrow"):
        if isinstance(source, str | os.PathLike):
            remote = storage.is_remote(source)
            source = pyarrow.BufferReader(storage.read_bytes(source)) if remote else pyarrow.memory_map(str(source))
        magic = source.read(6)
        source.seek(0)
        if magic.startswith(b"FEA1"):
            reader = pyarrow.ipc.open_stream(_converted(source))
            schema, batches = reader.schema, reader.iter_batches_with_custom_metadata()
        elif magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            numbers = range(reader.num_record_batches)
            schema, batches = reader.schema, (reader.get_batch_with_custom_metadata(number) for number in numbers)
        else:
            reader = pyarrow.ipc.open_stream(source)
            schema, batches = reader.schema, reader.iter_batches_with_custom_metadata()
        _ = schema.names  # of damaged bytes, these are no text
    return schema, _validated(batches)


# pyarrow's reader of Feather's first version checks nothing, and dies at damaged bytes before there is a batch.
_CONVERT = """
import sys, pyarrow, pyarrow.feather
table = pyarrow.feather.read_table(pyarrow.BufferReader(sys.stdin.buffer.read()))
table.validate(full=True)
with pyarrow.ipc.new_stream(sys.stdout.buffer, table.schema) as writer:
    writer.write_table(table)
"""


def _converted(source: Any) -> Any:
    """A Feather file of version 1 as an Arrow stream, made by a process of its own, which may die of it."""
    import pyarrow

    done = subprocess.run([sys.executable, "-c", _CONVERT], input=source.read(), capture_output=True, check=False)
    if done.returncode < 0:
        raise BadTable("cannot be read as Feather (its bytes are damaged)")
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise BadTable(f"cannot be read as Feather ({lines[-1][:200]})")
    return pyarrow.BufferReader(done.stdout)


def _validated(batches: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    while True:
        with reading("Arrow"):
            item = next(batches, None)
            if item is None:
                return
            item[0].validate(full=True)
        yield item[0], item[1]


def open_parquet(source: Any, size: int, max_ratio: float = MAX_RATIO) -> Any:
    """Open a Parquet file that unpacks to no more than it may.

    Args:
      source: a path, or a stream that can be read back and forth.
      size: its bytes.
      max_ratio: times its size, that it may unpack to, once that is over RATIO_FREE_BYTES.

    Returns:
      The `pyarrow.parquet.ParquetFile`.

    Raises:
      BadTable: it cannot be read, or unpacks to more.
    """
    import pyarrow.parquet

    with reading("Parquet"):
        file = pyarrow.parquet.ParquetFile(source)
        about = file.metadata
        # Not from the columns' own records: asking for a damaged one ends the process.
        sizes = [about.row_group(number).total_byte_size for number in range(about.num_row_groups)]
        _ = file.schema_arrow.names
    unpacked = sum(max(0, size) for size in sizes)
    if unpacked > RATIO_FREE_BYTES and unpacked > max_ratio * size:
        raise BadTable(f"unpacks to {unpacked:,} bytes, more than {max_ratio:g} times its size, as a bomb does")
    return file


def parquet_batches(file: Any, columns: list[str] | None = None) -> Iterator[Any]:
    """Yield the validated record batches of a file of `open_parquet`, of BATCH_ROWS rows.

    Raises:
      BadTable: it cannot be read.
    """
    batches = file.iter_batches(BATCH_ROWS, columns=columns)
    while True:
        with reading("Parquet"):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)
        yield batch


def rows_of(batches: Iterable[Any], kind: str, max_bytes: int = 2**62) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of validated record batches, None in place of one of more than `max_bytes`.

    Raises:
      BadTable: a value is none that Python has, such as a date in the year 300,000.
    """
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            piece = batch.slice(start, BATCH_ROWS)
            with reading(kind):
                is_small = sum(map(_size_bound, piece.columns)) <= max_bytes
                rows = piece.to_pylist() if is_small else None
            if rows is not None:
                yield from rows
                continue
            for number in range(piece.num_rows):
                row = piece.slice(number, 1)
                with reading(kind):
                    size = sum(map(_size, row.columns))
                    value = row.to_pylist()[0] if size <= max_bytes else None
                yield value


def _size_bound(column: Any) -> int:
    """Bytes that a column takes at most; the values of a dictionary may stand in every row."""
    dictionary = getattr(column, "dictionary", None)
    return column.nbytes if dictionary is None else column.indices.nbytes + dictionary.nbytes * len(column)


def _size(column: Any) -> int:
    """Bytes of a column of one row."""
    return column.nbytes if getattr(column, "dictionary", None) is None else column.dictionary_decode().nbytes


def unique_names(header: list[str]) -> list[str]:
    """Column names as pandas gives them: a second `a` is `a.1`, one without a name `Unnamed: 3`."""
    found: dict[str, None] = {}
    again: dict[str, int] = {}
    for number, name in enumerate(header):
        name = unique = name or f"Unnamed: {number}"
        while unique in found:
            again[name] = again.get(name, 0) + 1
            unique = f"{name}.{again[name]}"
        found[unique] = None
    return list(found)

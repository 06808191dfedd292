"""SQLite files, by table; opened so that nothing in them can be changed or run."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpu_tune.data import streams
from tpu_tune.data.ingest.archives import on_disk
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally
from tpu_tune.data.ingest.encodings import misfit
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.picking import picked
from tpu_tune.errors import UserError


def read(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of one table, in the order in which they are stored; `source` is `file!table:row`.

    Raises:
      UserError: the table is missing, or there are several and none is named; lists them.
    """
    with on_disk(blob, ".sqlite") as path:
        try:
            with contextlib.closing(_open(path)) as connection:
                table = choose(blob.name, _tables(connection), options.table)
                tally.met.add(f"table {options.table}")
                name = f"{blob.name}!{table}"
                cursor = connection.execute(f"SELECT * FROM {_quoted(table)}")
                columns = [column[0] for column in cursor.description]
                yield from picked(_rows(name, cursor, columns, tally), options, tally, name, columns)
        except sqlite3.Error as error:
            raise BadSource(f"cannot be read as SQLite ({error})") from error


def _open(path: str) -> sqlite3.Connection:
    # A file with a write-ahead log beside it is read with it; any other is promised not to change, so nothing is made.
    log = path + "-wal"
    unlocked = "" if os.path.exists(log) and os.path.getsize(log) else "&immutable=1"
    connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro{unlocked}", uri=True)
    connection.text_factory = lambda content: content.decode("utf-8", "surrogateescape")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, streams.MAX_ROW_BYTES)
    for pragma in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _tables(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """Table -> columns; virtual tables, whose code would run, and views are left out."""
    found = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
        "AND sql NOT LIKE 'CREATE VIRTUAL%' ORDER BY rowid"
    )
    names = [name for (name,) in found]
    return {name: [row[1] for row in connection.execute(f"PRAGMA table_info({_quoted(name)})")] for name in names}


def choose(where: str, tables: dict[str, list[str]], table: str) -> str:
    """The table that is asked for, or the only one.

    Raises:
      UserError: it is missing, or there are several and none is named; lists them with their columns.
    """
    if table in tables:
        return table
    if len(tables) == 1 and not table:
        return next(iter(tables))
    listed = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in list(tables.items())[:20])
    if len(tables) > 20:
        listed += f"; and {len(tables) - 20} more"
    if table:
        raise UserError(f"{where}: there is no table '{table}'; there is: {listed or 'none'}")
    if not tables:
        raise BadSource("holds no table")
    raise UserError(f"{where}: which table? give --table NAME; there is: {listed}")


def _rows(name: str, cursor: sqlite3.Cursor, columns: list[str], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(cursor, start=1):
        if any(isinstance(value, str) and misfit(value) for value in row):
            tally.skipped.add(f"{name}:{number}", "holds text that is not valid UTF-8")
        else:
            yield f"{name}:{number}", dict(zip(columns, row, strict=True))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'

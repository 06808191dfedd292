"""Rows in and rows out, one at a time: what every step of data preparation reads and writes.

A step never holds a whole file: `read_json_lines` yields rows with their line numbers; `writing` writes to a temporary
file and renames it at the end, so that a step that fails or is stopped leaves no half of an output. `Skipped` is how a
step treats what it cannot read: the first bad row is an error that names file and row, or, with `--skip-bad`, bad rows
are counted.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from tpu_tune.checkpoints import storage
from tpu_tune.data import sources
from tpu_tune.data.sources import BadRow
from tpu_tune.errors import UserError

MAX_ROW_BYTES = 64 * 2**20  # a longer line is no row but a file that lost its line breaks
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


@dataclass
class Skipped:
    """What could not be read.

    Attributes:
      allowed: go on and count (`--skip-bad`); otherwise the first one ends the step.
      count: how many so far.
      examples: the first five.
      told: called with each, before it is counted.
    """

    allowed: bool = False
    count: int = 0
    examples: list[BadRow] = field(default_factory=list)
    told: Callable[[BadRow], None] | None = None

    def add(self, where: str, reason: str) -> None:
        """Count a bad row.

        Raises:
          UserError: bad rows are not allowed.
        """
        bad = BadRow(where, reason)
        if self.told is not None:
            self.told(bad)
        if not self.allowed:
            raise UserError(sources.with_advice(bad, "fix it, or give --skip-bad to go on without it"))
        self.count += 1
        if len(self.examples) < 5:
            self.examples.append(bad)


def read_json_lines(path: str | os.PathLike, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of a JSON Lines file, gzipped or not, empty lines left out.

    Args:
      skipped: takes lines that are too long, not UTF-8, not JSON or not an object.

    Raises:
      UserError: the file cannot be read, or holds a bad row and those are not allowed.
    """
    return json_rows(read_lines(path), os.fspath(path), skipped)


def json_rows(
    lines: Iterable[tuple[int, bytes | None]], name: str, skipped: Skipped
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of numbered lines of JSON; see `read_json_lines`.

    Args:
      lines: from 1, or a part of a file's.
      name: what the file is called where a row is bad.
    """
    for number, line in lines:
        if number == 1 and line:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line is not None and not line.strip():
            continue
        row, reason = _parse(line)
        if row is None:
            skipped.add(f"{name}:{number}", reason)
        else:
            yield number, row


def read_any(path: str | os.PathLike, skipped: Skipped) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, row) of a data file of any kind; JSON Lines are streamed, the others are read whole.

    Raises:
      UserError: the file cannot be read, is of no known kind, or holds a bad row and those are not allowed.
    """
    path = os.fspath(path)
    if path.lower().endswith(JSON_LINES):
        for number, row in read_json_lines(path, skipped):
            yield f"{path}:{number}", row
    elif Path(path).suffix.lower() in sources.SUFFIXES:
        rows, bad = sources.read_rows(path, skip_bad_rows=True)
        for row in bad:
            skipped.add(row.where, row.reason)
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    else:
        kinds = ", ".join(dict.fromkeys((*JSON_LINES, *sources.SUFFIXES)))
        raise UserError(f"{path}: unknown kind of data file '{Path(path).suffix}'; known: {kinds}")


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number from 1, line with its line break) of a file, gzipped or not; None for one over MAX_ROW_BYTES.

    Raises:
      UserError: the file cannot be read.
    """
    path = os.fspath(path)
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield from enumerate(cut_lines(file), start=1)
    except (OSError, EOFError, zlib.error) as error:  # a gzip file that ends early is an EOFError
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def cut_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Yield lines, None in place of one that is longer than a row may be (which is passed over, never held)."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)
        yield None


def _parse(line: bytes | None) -> tuple[dict[str, Any] | None, str]:
    if line is None:
        return None, f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB"
    return sources.parse_row(line)


class Writer:
    """Writes rows as JSON Lines, UTF-8; see `writing`."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.count = 0  # rows written so far

    def write(self, row: dict[str, Any]) -> None:
        """Write one row."""
        text = json.dumps(row, ensure_ascii=False, separators=(", ", ": "))
        # Half of a surrogate pair is no character and no UTF-8; JSON has a way to write it all the same.
        try:
            self._file.write(text.encode("utf-8") + b"\n")
        except UnicodeEncodeError:
            self._file.write(json.dumps(row).encode("ascii") + b"\n")
        self.count += 1

    def copy(self, file: IO[bytes], count: int) -> None:
        """Write `count` rows that another `Writer` wrote to a file."""
        shutil.copyfileobj(file, self._file, 2**20)
        self.count += count


@contextlib.contextmanager
def writing(path: str | os.PathLike, overwrite: bool = True) -> Iterator[Writer]:
    """Open a JSON Lines file (gzipped where its name ends in .gz) that appears whole, when the block ends well.

    The same rows give the same bytes.

    Raises:
      UserError: the file cannot be written, or is there already and must not be overwritten.
    """
    with aside(path, overwrite) as temporary, open(temporary, "wb") as file:
        if os.fspath(path).endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                yield Writer(packed)
        else:
            yield Writer(file)


@contextlib.contextmanager
def aside(path: str | os.PathLike, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it is renamed to `path` when the block ends well, else removed.

    Raises:
      UserError: the file cannot be written, or is there already and must not be overwritten.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a directory; name a file to write")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: is there already; remove it or name another output")
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.whole_file(path) as temporary:
            yield Path(temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def progress(items: Iterable | None, what: str, total: int | None = None, unit: str = "rows") -> tqdm:
    """Wrap an iterable in a progress bar on standard error, drawn only where that is a terminal; None: `update` it."""
    return tqdm(items, desc=what, total=total, unit=f" {unit}", disable=not sys.stderr.isatty(), leave=False)

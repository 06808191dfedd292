"""What the readers of `tpu_tune.data.ingest` read and return: blobs, rows, and a tally of what gives no row."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from tpu_tune.data.streams import Skipped
from tpu_tune.errors import UserError


@dataclass
class Tally:
    """Counts of what gave no row.

    Attributes:
      skipped: what could not be read.
      empty: documents without any text, and rows whose picked column is NULL; they give no row.
      passed_over: members of archives that are of no known kind, by suffix.
      rewritten: rows that were written in another format, by their own.
      excluded: members of archives that are not to be read.
      met: what the options name and was found: `file PATTERN`, `table NAME`, `column NAME`.
      lacking: column that the options name -> what is said where it is nowhere; of objects that were read without it.
      want: called with a source's name and an error that another option would mend, so that the next source can be
        read; without it the error is raised.
    """

    skipped: Skipped = field(default_factory=Skipped)
    empty: int = 0
    passed_over: Counter = field(default_factory=Counter)
    rewritten: Counter = field(default_factory=Counter)
    excluded: int = 0
    met: set[str] = field(default_factory=set)
    lacking: dict[str, str] = field(default_factory=dict)
    want: Callable[[str, UserError], None] | None = None

    def add(self, other: Tally) -> None:
        """Count what a part of the work found."""
        self.skipped.count += other.skipped.count
        self.skipped.examples = (self.skipped.examples + other.skipped.examples)[:5]
        self.empty += other.empty
        self.passed_over.update(other.passed_over)
        self.rewritten.update(other.rewritten)
        self.excluded += other.excluded
        self.met |= other.met
        self.lacking = other.lacking | self.lacking


@dataclass(frozen=True)
class Blob:
    """One file to read: on the disk, or inside an archive.

    Attributes:
      name: what a row's `source` says: `path`, or `archive.zip!inner/path`.
      open: returns its bytes as a stream, unpacked; call it once.
      path: its path, if it is a plain file on the disk; else empty.
    """

    name: str
    open: Callable[[], IO[bytes]]
    path: str = ""


class BadSource(ValueError):
    """A source cannot be read any further; the message says why, and the caller adds where."""


def row_of(source: str, **values: Any) -> dict[str, Any]:
    """A row, with its source as the last key."""
    return {**values, "source": source}


def suffix_of(name: str) -> str:
    """The last suffix of a path or of a member's name, in small letters, with its dot; "" without one."""
    return os.path.splitext(name.rpartition("!")[2])[1].lower()

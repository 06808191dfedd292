"""What the readers of `tpu_tune.data.ingest` are told, and what they report beside their rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from tpu_tune.data.streams import Skipped


@dataclass(frozen=True)
class Options:
    """How sources are read; picklable, so that a worker process can be given one.

    Attributes:
      format: a kind from `tpu_tune.data.ingest.KINDS`, or `auto`: by each file's name.
      column: the column that becomes `text`.
      input_column, output_column: the columns that become `input` and `output`; both or neither.
      columns: further columns to keep, as (its name, its name in the output) pairs.
      table: the table of a database or a SQL dump.
      encoding: how text is encoded; "" detects it.
      split: the part of a named dataset.
      assistant: whose words in a chat export are the assistant's: a name, nickname or id.
      gap_minutes: a silence this long ends a conversation of a chat export.
      keep_conversations: leave ShareGPT rows as `conversations`; otherwise they become `messages`.
      skip_bad: count what cannot be read and go on; otherwise the first is an error.
      max_unpacked_bytes: what one compressed file or archive may unpack to, all it contains taken together.
      max_ratio: how many times its own size an archive may unpack to, once that is over 64 MiB.
      max_depth: archives inside archives, counting the outermost.
    """

    format: str = "auto"
    column: str = ""
    input_column: str = ""
    output_column: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    table: str = ""
    encoding: str = ""
    split: str = "train"
    assistant: str = ""
    gap_minutes: float = 60.0
    keep_conversations: bool = False
    skip_bad: bool = False
    max_unpacked_bytes: int = 20_000_000_000
    max_ratio: float = 300.0
    max_depth: int = 3


@dataclass
class Tally:
    """What is not in the rows.

    Attributes:
      skipped: what could not be read.
      empty: documents without any text, and rows whose picked column is NULL; they give no row.
      passed_over: members of archives that are of no known kind, by suffix.
    """

    skipped: Skipped = field(default_factory=Skipped)
    empty: int = 0
    passed_over: Counter = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Count what a part of the work found."""
        self.skipped.count += other.skipped.count
        self.skipped.examples = (self.skipped.examples + other.skipped.examples)[:5]
        self.empty += other.empty
        self.passed_over.update(other.passed_over)


@dataclass(frozen=True)
class Blob:
    """One file to read: on the disk, or inside an archive.

    Attributes:
      name: what `source` says: `path`, or `archive.zip!inner/path`.
      open: gives its bytes, unpacked; to be called once.
      path: where it is, if it is a plain file on the disk.
    """

    name: str
    open: Callable[[], IO[bytes]]
    path: str = ""


class BadSource(ValueError):
    """A source cannot be read any further; the message says why, and the caller adds where."""


def row_of(source: str, **values: Any) -> dict[str, Any]:
    """A row, with what it comes from last."""
    return {**values, "source": source}


def suffix_of(name: str) -> str:
    """The last suffix of a path or of a member's name, in small letters, with its dot; "" without one."""
    return os.path.splitext(name.rpartition("!")[2])[1].lower()

"""What `tpu-tune data ingest` is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpu_tune.config.engine import key


@dataclass(frozen=True)
class IngestOptions:
    """How sources are read; picklable, so that a worker process can be given one.

    Attributes:
      for_files: options for some files only: pattern -> option -> its value there, of those in `patterns.FOR_FILES`.
        The first pattern that means a file counts.
      exclude: patterns of what is not read.
      format: a kind from `tpu_tune.data.ingest.KINDS`, or `auto`: by each file's name.
      column: the column that becomes `text`. An object without it whose keys are those of a known format is read by
        them; a table must have it.
      input_column, output_column: the columns that become `input` and `output`; both or neither.
      columns: further columns to keep, as (its name, its name in the output) pairs.
      table: the table of a database or a SQL dump.
      encoding: how text is encoded, where no byte order mark says so; "" detects it.
      split: the part of a named dataset.
      assistant: whose words in a chat export are the assistant's: a name, nickname or id.
      gap_minutes: a silence this long ends a conversation of a chat export.
      strip_html: turn the texts of tables' and objects' rows from HTML into plain text.
      keep_conversations: leave ShareGPT rows as `conversations`; otherwise they become `messages`.
      as_format: `messages` writes every row so, whatever its format; "" leaves rows in theirs.
      skip_bad: count what cannot be read and go on; otherwise the first is an error.
      max_unpacked_bytes: what one compressed file or archive may unpack to, all it contains taken together.
      max_ratio: how many times its own size an archive may unpack to, once that is over 64 MiB.
      max_depth: archives inside archives, counting the outermost.
    """

    for_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    format: str = "auto"
    column: str = ""
    input_column: str = ""
    output_column: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    table: str = ""
    encoding: str = ""
    split: str = "train"
    assistant: str = ""
    gap_minutes: float = key(60.0, "", above=0)
    strip_html: bool = False
    keep_conversations: bool = False
    as_format: str = ""
    skip_bad: bool = False
    max_unpacked_bytes: int = key(20_000_000_000, "", at_least=1, at_most=2**63 - 1)
    max_ratio: float = key(300.0, "", above=0)
    max_depth: int = key(3, "", at_least=1, at_most=100)

"""What `tpu-tune data ingest` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IngestOptions:
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
      as_format: `messages` writes every row so, whatever its format; "" leaves rows in theirs.
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
    as_format: str = ""
    skip_bad: bool = False
    max_unpacked_bytes: int = 20_000_000_000
    max_ratio: float = 300.0
    max_depth: int = 3

"""Ingesting: files, folders, patterns, archives and names of datasets in, one JSON Lines file of rows out."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.data import as_messages
from tpu_tune.data.formats import RowError, format_of, own_format
from tpu_tune.data.ingest.blobs import Tally
from tpu_tune.data.ingest.catalog import is_named
from tpu_tune.data.ingest.finding import find_sources
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.reading import KINDS, kind_of, read_source, reader_of
from tpu_tune.data.processes import Engine, in_order
from tpu_tune.data.streams import Skipped, Writer, progress, writing
from tpu_tune.errors import UserError

MIN_BYTES = 32 * 2**20  # a worker's start costs about as much as reading this


@dataclass
class IngestReport:
    """What a run read and wrote.

    Attributes:
      rows: rows written.
      formats: of the rows, by `tpu_tune.data.formats`; `other` are rows of other columns.
      sources: files and names read.
      empty: documents without text and rows whose picked column is NULL, which give no row.
      skipped: what could not be read.
      passed_over: files of no known kind, by suffix.
      rewritten: rows that were written in another format, by their own.
    """

    rows: int = 0
    formats: Counter = field(default_factory=Counter)
    sources: int = 0
    empty: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    passed_over: Counter = field(default_factory=Counter)
    rewritten: Counter = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """The figures, as JSON can say them."""
        return {
            "rows": self.rows,
            "formats": dict(self.formats),
            "sources": self.sources,
            "empty": self.empty,
            "bad": self.skipped.count,
            "bad_examples": [str(bad) for bad in self.skipped.examples],
            "passed_over": dict(self.passed_over),
            "rewritten": dict(self.rewritten),
        }


def ingest(
    inputs: Sequence[str],
    output: str,
    options: IngestOptions = IngestOptions(),  # noqa: B008
    workers: int = 0,
    engine: Engine | None = None,
) -> IngestReport:
    """Read everything that `inputs` name and write it as JSON Lines.

    Args:
      inputs: see `find_sources`.
      output: a .jsonl or .jsonl.gz file; it appears whole, at the end, or not at all.
      workers: processes; 0 means one a core, and never more than one for every `MIN_BYTES` to read. The output is the
        same for any number.
      engine: runs the readers in place of these processes.

    Raises:
      UserError: something cannot be read and that is not allowed, a column or table is missing, or there is no row.
    """
    if options.format != "auto" and options.format not in KINDS:
        raise UserError(f"--format {options.format} is unknown; known: auto, {', '.join(KINDS)}")
    as_messages.check(options.as_format)
    found = find_sources(inputs, options.format, output, options.split)
    for kind in sorted({options.format} - {"auto"} or {kind_of(source) for source in found.sources} - {""}):
        reader_of(kind)  # a library that is not installed is missed before anything is read
    report = IngestReport(
        sources=len(found.sources), skipped=Skipped(options.skip_bad), passed_over=Counter(found.passed_over)
    )
    tally = Tally(report.skipped)
    with writing(output) as writer:
        if engine is None and (processes := _processes(found.sources, workers)) > 1:
            engine = functools.partial(in_order, processes=processes)
        if engine is None:
            _in_this_process(found.sources, options, writer, tally, report.formats)
        else:
            _by_engine(found.sources, output, options, engine, writer, tally, report.formats)
        report.rows, report.empty = writer.count, tally.empty
        report.passed_over.update(tally.passed_over)
        report.rewritten = tally.rewritten
        if not report.rows:
            raise UserError(_nothing(inputs, report, options))
    return report


def _processes(sources: list[str], workers: int) -> int:
    if workers:
        return min(workers, len(sources))
    size = sum(os.path.getsize(source) for source in sources if not is_named(source))
    return min(os.cpu_count() or 1, len(sources), size // MIN_BYTES)


def _in_this_process(
    sources: list[str], options: IngestOptions, writer: Writer, tally: Tally, formats: Counter
) -> None:
    for source in progress(sources, "ingest", unit="files"):
        for row in _rows(source, options, tally):
            writer.write(row)
            formats[_format(row)] += 1


def _by_engine(
    sources: list[str],
    output: str,
    options: IngestOptions,
    engine: Engine,
    writer: Writer,
    tally: Tally,
    formats: Counter,
) -> None:
    # Workers write their rows to files beside the output, so that no source's rows are ever held in memory.
    with contextlib.ExitStack() as stack:
        beside = None if storage.is_special(output) else Path(output).absolute().parent
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".ingest-", dir=beside))
        tasks = ((source, options, os.path.join(folder, str(number))) for number, source in enumerate(sources))
        parts = stack.enter_context(contextlib.closing(engine(read_to_file, tasks)))
        for part, count, found, formats_read in progress(parts, "ingest", len(sources), unit="files"):
            with open(part, "rb") as file:
                writer.copy(file, count)
            os.unlink(part)
            tally.add(found)
            formats.update(formats_read)


def read_to_file(task: tuple[str, IngestOptions, str]) -> tuple[str, int, Tally, Counter]:
    """Read (source, options, path) into a file of rows; return (path, rows, what gave none, rows by format)."""
    source, options, path = task
    tally, formats = Tally(Skipped(options.skip_bad)), Counter()
    with open(path, "wb") as file:
        writer = Writer(file)
        for row in _rows(source, options, tally):
            writer.write(row)
            formats[_format(row)] += 1
    return path, writer.count, tally, formats


def _rows(source: str, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """The rows of a source, in the format that the options name."""
    for row in read_source(source, options, tally):
        if not options.as_format:
            yield row
            continue
        try:
            format = format_of(row)
            yield as_messages.as_messages(row, format)
        except RowError as error:
            tally.skipped.add(row["source"], str(error))
        else:
            if format != options.as_format:
                tally.rewritten[format] += 1


def _format(row: dict[str, Any]) -> str:
    return own_format(row) or "other"


def _nothing(inputs: Sequence[str], report: IngestReport, options: IngestOptions) -> str:
    reasons = []
    if report.skipped.count:
        reasons.append(f"{report.skipped.count} bad, first {report.skipped.examples[0]}")
    if report.empty:
        reasons.append(
            f"{report.empty} without text" + (f"; does {options.assistant} write there?" if options.assistant else "")
        )
    if report.passed_over:
        reasons.append(
            "of no known kind: " + ", ".join(f"{n} {suffix}" for suffix, n in report.passed_over.most_common(10))
        )
    return f"{' '.join(inputs)}: there is no row in it ({'; '.join(reasons) or 'all of it is empty'})"

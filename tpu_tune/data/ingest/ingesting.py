"""Ingesting: files, folders, patterns, archives and names of datasets in, one JSON Lines file of rows out."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.data import as_messages
from tpu_tune.data.formats import RowError
from tpu_tune.data.ingest import patterns
from tpu_tune.data.ingest.blobs import Tally
from tpu_tune.data.ingest.catalog import is_named
from tpu_tune.data.ingest.finding import find_sources
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.picking import format_of
from tpu_tune.data.ingest.problems import Problems, taken_down
from tpu_tune.data.ingest.reading import KINDS, kind_of, read_source, reader_of
from tpu_tune.data.processes import Engine, in_order
from tpu_tune.data.streams import Skipped, Writer, progress, writing
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)
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
      excluded: files that were not to be read.
    """

    rows: int = 0
    formats: Counter = field(default_factory=Counter)
    sources: int = 0
    empty: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    passed_over: Counter = field(default_factory=Counter)
    rewritten: Counter = field(default_factory=Counter)
    excluded: int = 0

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
            "excluded": self.excluded,
        }


def ingest(
    inputs: Sequence[str],
    output: str,
    options: IngestOptions = IngestOptions(),  # noqa: B008
    workers: int = 0,
    engine: Engine | None = None,
    bad: str = "",
) -> IngestReport:
    """Read everything that `inputs` name and write it as JSON Lines.

    All of it is read before a problem ends the run, so that one run names the problems of every source.

    Args:
      inputs: see `find_sources`.
      output: a .jsonl or .jsonl.gz file; it appears whole, at the end, or not at all.
      workers: processes; 0 means one a core, and never more than one for every `MIN_BYTES` to read. The output is the
        same for any number.
      engine: runs the readers in place of these processes.
      bad: a .jsonl file for everything that could not be read, with `where` and `reason`; it appears also where the
        run fails.

    Raises:
      UserError: something cannot be read and that is not allowed, a column or table is missing, or there is no row.
    """
    as_messages.check(options.as_format)
    patterns.check(options, KINDS)
    if bad and os.path.realpath(bad) == os.path.realpath(output):
        raise UserError(f"{bad}: is named for the rows and for what is bad; name another file")
    found = find_sources(inputs, options, [output, *([bad] if bad else [])])
    kinds = {patterns.for_file(options, source).format for source in found.sources}
    kinds |= {kind_of(source) for source in found.sources if "auto" in kinds}
    kinds |= {"html"} if options.strip_html or any("strip_html" in own for own in options.for_files.values()) else set()
    for kind in sorted(kinds - {"", "auto"}):
        reader_of(kind)  # a library that is not installed is missed before anything is read
    report = IngestReport(sources=len(found.sources), passed_over=Counter(found.passed_over))
    tally = Tally(report.skipped, met={f"file {pattern}" for pattern in found.met}, excluded=found.excluded)
    with taken_down(bad) as problems, writing(output) as writer:
        if engine is None and (processes := _processes(found.sources, workers)) > 1:
            engine = functools.partial(in_order, processes=processes)
        if engine is None:
            for source in progress(found.sources, "ingest", unit="files"):
                tally.add(_read(source, options, writer, report.formats, problems))
        else:
            _by_engine(found.sources, output, options, engine, writer, tally, report.formats, problems)
        report.rows, report.empty, report.excluded = writer.count, tally.empty, tally.excluded
        report.passed_over.update(tally.passed_over)
        report.rewritten = tally.rewritten
        problems.refuse(len(found.sources), bad, options.skip_bad)
        if missing := patterns.unmet(options, tally):
            if not problems.bad:
                raise UserError(missing)
            logger.warning("%s", missing)  # it may be in what could not be read
        if not report.rows:
            raise UserError(_nothing(inputs, report, options))
    return report


def _processes(sources: list[str], workers: int) -> int:
    if workers:
        return min(workers, len(sources))
    size = sum(os.path.getsize(source) for source in sources if not is_named(source))
    return min(os.cpu_count() or 1, len(sources), size // MIN_BYTES)


def _read(source: str, options: IngestOptions, writer: Writer, formats: Counter, problems: Problems) -> Tally:
    """Write a source's rows; return what gave none."""
    tally = Tally(
        Skipped(True, told=functools.partial(problems.bad_row, source)),
        want=functools.partial(problems.want, source),
    )
    for row in _rows(source, options, tally):
        writer.write(row)
        formats[_format(row)] += 1
    return tally


def _by_engine(
    sources: list[str],
    output: str,
    options: IngestOptions,
    engine: Engine,
    writer: Writer,
    tally: Tally,
    formats: Counter,
    problems: Problems,
) -> None:
    # Workers write their rows to files beside the output, so that no source's rows are ever held in memory.
    with contextlib.ExitStack() as stack:
        beside = None if storage.is_special(output) else Path(output).absolute().parent
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".ingest-", dir=beside))
        tasks = ((source, options, os.path.join(folder, str(number))) for number, source in enumerate(sources))
        parts = stack.enter_context(contextlib.closing(engine(read_to_file, tasks)))
        numbered = zip(sources, progress(parts, "ingest", len(sources), unit="files"), strict=True)
        for source, (part, count, found, formats_read) in numbered:
            with open(part, "rb") as file, open(f"{part}.bad", "rb") as bad:
                writer.copy(file, count)
                problems.copy(source, bad)
            os.unlink(part)
            os.unlink(f"{part}.bad")
            tally.add(found)
            formats.update(formats_read)


def read_to_file(task: tuple[str, IngestOptions, str]) -> tuple[str, int, Tally, Counter]:
    """Read (source, options, path) into a file of rows, and one of its problems beside it.

    Returns:
      (path, rows, what gave none, rows by format).
    """
    source, options, path = task
    formats: Counter = Counter()
    with open(path, "wb") as file, open(f"{path}.bad", "wb") as bad:
        writer = Writer(file)
        tally = _read(source, options, writer, formats, Problems(bad))
    tally.skipped.told = tally.want = None  # which do not pickle
    return path, writer.count, tally, formats


def _rows(source: str, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """The rows of a source, in the format that the options name."""
    for row in read_source(source, options, tally):
        if not options.as_format:
            yield row
            continue
        try:
            made, format = as_messages.any_as_messages(row)
        except RowError as error:
            tally.skipped.add(row["source"], str(error))
            continue
        if format != options.as_format:
            tally.rewritten[format] += 1
        yield made


def _format(row: dict[str, Any]) -> str:
    return format_of(row) or "other"


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

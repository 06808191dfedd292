"""Cleaning: rows of JSON Lines files in, the good ones out, and a report of every rule's hits."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.data.clean.clean_options import CleanOptions
from tpu_tune.data.clean.clean_report import CleanReport
from tpu_tune.data.clean.duplicates import Duplicates
from tpu_tune.data.clean.repeated import Repeated, find_repeated
from tpu_tune.data.clean.rules import row_cleaner
from tpu_tune.data.formats import check_renamed, columns_of
from tpu_tune.data.messages import RowError
from tpu_tune.data.streams import Skipped, Writer, aside, progress, read_json_lines, writing
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)


def clean(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike | None,
    options: CleanOptions | None = None,
    *,
    skip_bad: bool = False,
    dry_run: bool = False,
    report: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Clean files into one, in order, row by row.

    Args:
      inputs: JSON Lines files, gzipped or not.
      output: JSON Lines file to write; it appears when all is done. Not needed for a dry run.
      options: the rules; by default the guide's phrases and exact duplicates.
      skip_bad: count rows that cannot be read instead of stopping at the first.
      dry_run: write nothing.
      report: JSON file for the report.

    Returns:
      The report, as `CleanReport.figures` describes it, with `inputs`, `output` and `dry_run`.

    Raises:
      UserError: a file cannot be read or written, an option cannot be meant, a row is bad, or there is no row.
    """
    options = options or CleanOptions()
    if dry_run:
        output = report = None
    elif output is None:
        raise UserError("cleaning needs an output to write, or dry_run (--dry-run) to write nothing")
    for path in inputs:
        for written in (output, report):
            if written is not None and os.path.realpath(written) == os.path.realpath(path):
                raise UserError(f"{written}: is also an input; name another output")
    cleaner = row_cleaner(options, repeated_in(inputs, options))
    skipped, counts, renamed = Skipped(skip_bad), CleanReport(), 0
    with contextlib.ExitStack() as stack:
        writer: Writer | None = stack.enter_context(writing(output)) if output is not None else None
        scratch = Path(output).parent if output is not None else None
        duplicates = stack.enter_context(contextlib.closing(Duplicates(options, scratch)))
        for where, row in progress(_rows(inputs, skipped), "cleaning"):
            try:
                cleaned, hits = cleaner(row)
                if cleaned is not None and (hit := duplicates.check(cleaned, where)):
                    cleaned, hits = None, [*hits, hit]
                if writer is not None and cleaned is not None:
                    writer.write(cleaned)
            except (RowError, RecursionError) as error:
                skipped.add(where, str(error) if isinstance(error, RowError) else "nested too deeply")
                continue
            counts.add(where, cleaned is not None, hits)
            renamed += bool(columns_of(row, options.columns))
        figures = {
            "inputs": [os.fspath(path) for path in inputs],
            "output": None if output is None else os.fspath(output),
            "dry_run": dry_run,
            **counts.figures(skipped),
        }
        if not figures["rows_in"]:
            raise UserError(f"{', '.join(figures['inputs'])}: no rows")
        check_renamed(", ".join(figures["inputs"]), options.columns, renamed, figures["rows_in"])
        if report is not None:
            temporary = stack.enter_context(aside(report))
            temporary.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not figures["rows_out"]:
        logger.warning("no row is left; see which rule dropped them, or try --dry-run with other rules")
    return figures


def repeated_in(inputs: Sequence[str | os.PathLike], options: CleanOptions) -> Repeated | None:
    """Read the rows for what is repeated on the pages of a site; None where that is not asked for.

    Raises:
      UserError: a file cannot be read, or not twice.
    """
    if options.repeated_text is None:
        return None
    for path in inputs:
        if storage.is_special(path):
            raise UserError(f"{path}: is read twice to find repeated text, and a pipe cannot be; name a file")
    rows = progress(_rows(inputs, Skipped(True)), "looking for repeated text")
    return find_repeated((row for _, row in rows), options)


def _rows(inputs: Sequence[str | os.PathLike], skipped: Skipped) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in inputs:
        for number, row in read_json_lines(path, skipped):
            yield f"{os.fspath(path)}:{number}", row

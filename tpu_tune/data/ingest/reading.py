"""One source to rows: opens it, goes through archives, and hands each file to the reader of its kind."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from tpu_tune.data.extra import missing
from tpu_tune.data.formats import RowError
from tpu_tune.data.ingest import catalog, patterns
from tpu_tune.data.ingest.archives import DAMAGED, Bomb, damage, inner_name, unpacked
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, suffix_of
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.streams import Skipped
from tpu_tune.errors import UserError

Reader = Callable[[Blob, IngestOptions, Tally], Iterator[dict[str, Any]]]

# Kind -> suffixes; `--format` names a kind where the suffix does not say it.
KINDS: dict[str, tuple[str, ...]] = {
    "html": (".html", ".htm", ".xhtml"),
    "text": (".txt", ".text"),
    "markdown": (".md", ".markdown", ".rst"),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "discord": (".json",),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather", ".ipc"),
    "sql": (".sql",),
    "sqlite": (".sqlite", ".sqlite3", ".db", ".db3"),
    "epub": (".epub",),
    "dictd": (".dict", ".dz"),
}
_KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes if kind != "discord"}


def kind_of(name: str, format: str = "auto") -> str:
    """The kind of a file in a folder or an archive, "" if it is not to be read.

    Its name says it; where `format` names a kind, it is that or nothing, and a name without a suffix is that.
    """
    suffix = suffix_of(inner_name(name))
    if format == "auto":
        return _KIND_OF.get(suffix, "")
    return format if not suffix or suffix in KINDS[format] else ""


def is_readable(name: str, format: str = "auto") -> bool:
    """Whether a file of a folder is to be read, by its name: it is of a known kind, or an archive."""
    return bool(kind_of(name, format)) or suffix_of(inner_name(name)) in (".zip", ".tar")


# Kind -> (module, function) of its reader.
_READERS: dict[str, tuple[str, str]] = {
    "html": ("html", "read"),
    "text": ("documents", "read_text"),
    "markdown": ("documents", "read_text"),
    "epub": ("epub", "read"),
    "csv": ("tables", "read_csv"),
    "tsv": ("tables", "read_csv"),
    "parquet": ("tables", "read_parquet"),
    "arrow": ("tables", "read_arrow"),
    "jsonl": ("jsons", "read_json_lines"),
    "json": ("jsons", "read_json"),
    "discord": ("jsons", "read_json"),
    "sql": ("sql", "read"),
    "sqlite": ("sqlite", "read"),
    "dictd": ("dictd", "read"),
}


def reader_of(kind: str) -> Reader:
    """Return the reader of a kind; its libraries are imported only now.

    Raises:
      UserError: a library of the extra `data` is not installed.
    """
    module, function = _READERS[kind]
    try:
        return getattr(importlib.import_module(f"tpu_tune.data.ingest.{module}"), function)
    except ImportError as error:
        raise missing(error.name or "a library", f"reading {kind}", error) from error


def read_source(
    path: str, options: IngestOptions | None = None, tally: Tally | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one source: a file, an archive, or a dataset's name.

    Arguments and rows are plain values, so that a source can be read in any process; the rows depend on `path` and
    `options` alone.

    Args:
      path: as `find_sources` gives it.
      tally: counts what gives no row.

    Returns:
      Rows with `text`, with `input` and `output`, with `messages`, or with the columns that `options` names; and with
      `source`: the file, `archive!file` inside an archive, and `:` and a line or row where one file gives several.

    Raises:
      UserError: something cannot be read and that is not allowed, or a column or table is missing.
    """
    options = options or IngestOptions()
    tally = Tally(Skipped(options.skip_bad)) if tally is None else tally
    try:
        if catalog.is_named(path):
            yield from catalog.read(path, _options_for(path, options, tally), tally)
        elif not os.path.isfile(path):
            raise UserError(f"{path}: there is no such file")
        else:
            yield from _file_rows(path, options, tally)
    except UserError as error:
        if tally.want is None:
            raise
        tally.want(path, error)


def _file_rows(path: str, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    whole = Blob(path, lambda: open(path, "rb"), path)
    try:
        for blob in unpacked(whole, options, tally):
            if patterns.is_excluded(options, blob.name):
                tally.excluded += 1
                continue
            own = _options_for(blob.name, options, tally)
            named = own.format != "auto" and (blob.name == path or patterns.has_format(options, blob.name))
            kind = own.format if named else kind_of(blob.name, own.format)
            if kind:
                yield from _rows(blob, kind, own, tally)
            elif blob.name == path:
                raise UserError(f"{path}: of no known kind; name it with --format: {', '.join(KINDS)}")
            else:
                tally.passed_over[suffix_of(blob.name) or "without suffix"] += 1
    except BadSource as error:
        tally.skipped.add(path, str(error))
    except DAMAGED as error:
        tally.skipped.add(path, damage(error))


def _options_for(name: str, options: IngestOptions, tally: Tally) -> IngestOptions:
    if pattern := patterns.pattern_of(options, name):
        tally.met.add(f"file {pattern}")
    return patterns.for_pattern(options, pattern)


def _rows(blob: Blob, kind: str, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    try:
        yield from reader_of(kind)(blob, options, tally)
    except Bomb:
        raise
    except UserError as error:
        if tally.want is None:
            raise
        tally.want(blob.name, error)
    except (BadSource, RowError) as error:
        tally.skipped.add(blob.name, str(error))
    except UnicodeError as error:  # such as half a character at the end, which stands for no byte
        name, reason = getattr(error, "encoding", "its encoding"), getattr(error, "reason", error)
        tally.skipped.add(blob.name, f"not valid {name} ({reason}); --encoding names another")
    except DAMAGED as error:
        tally.skipped.add(blob.name, damage(error))

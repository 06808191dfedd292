"""Options for some files only: `IngestOptions.for_files`, and the files that `IngestOptions.exclude` leaves out.

A pattern is a shell's: `*.csv` is every CSV, `old/*.csv` those right in a folder `old`, `old` all that is in it,
`dump.zip` all that is in the archive. `*` also stands for slashes, capitals do not count, and `x.csv.gz` is a CSV.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from tpu_tune.data.ingest.blobs import Tally
from tpu_tune.data.ingest.encodings import is_text_encoding
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.errors import UserError

# What names columns goes together: where a pattern has one of these, the options for all files give it none.
_PICKS = ("column", "input_column", "output_column", "columns")
FOR_FILES = (*_PICKS, "format", "table", "encoding", "split", "assistant", "gap_minutes", "keep_conversations",
             "strip_html")  # fmt: skip
_PACKED = (".gz", ".bz2", ".xz", ".lzma", ".zst")


def matches(pattern: str, name: str) -> bool:
    """Whether a source, `folder/archive.zip!inner/file`, or a folder or archive that holds it, is meant."""
    pattern, parts = pattern.lower().rstrip("/"), name.lower().replace("!", "/").split("/")
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        for found in (path, *(path.removesuffix(suffix) for suffix in _PACKED if path.endswith(suffix))):
            if found and (fnmatch.fnmatchcase(found, pattern) or PurePosixPath(found).match(pattern)):
                return True
    return False


def pattern_of(options: IngestOptions, name: str) -> str:
    """The first pattern of `for_files` that means a source; "" where none does."""
    return next((pattern for pattern in options.for_files if matches(pattern, name)), "")


def for_file(options: IngestOptions, name: str) -> IngestOptions:
    """The options that a source is read with."""
    return for_pattern(options, pattern_of(options, name))


def for_pattern(options: IngestOptions, pattern: str) -> IngestOptions:
    """The options of what a pattern of `for_files` means; of everything else, where it is ""."""
    if not pattern:
        return options
    given = {key: _value(key, value) for key, value in options.for_files[pattern].items()}
    picks = {key: "" if key != "columns" else () for key in _PICKS} if set(_PICKS) & set(given) else {}
    return dataclasses.replace(options, **{**picks, **given})


def has_format(options: IngestOptions, name: str) -> bool:
    """Whether a pattern says of what kind a source is, whatever its suffix."""
    return "format" in options.for_files.get(pattern_of(options, name), {})


def is_excluded(options: IngestOptions, name: str) -> bool:
    """Whether a source is to be left out."""
    return any(matches(pattern, name) for pattern in options.exclude)


def column_pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Read `a,b=new_name`: further columns to keep, each with its name in the output."""
    words = filter(None, (word.strip() for word in text.split(",")))
    return tuple((old, new or old) for old, _, new in (word.partition("=") for word in words))


def _value(key: str, value: Any) -> Any:
    if key != "columns":
        return value
    return column_pairs(value) if isinstance(value, str) else tuple((str(old), str(new)) for old, new in value)


def check(options: IngestOptions, kinds: Iterable[str]) -> None:
    """Say what cannot be meant, before anything is read.

    Raises:
      UserError: an unknown kind of file or encoding, or a pattern whose options are none.
    """
    defaults = IngestOptions()
    for pattern, given in options.for_files.items():
        if not isinstance(given, dict):
            raise UserError(f"the options for '{pattern}' must be names with values, such as {{'column': 'body'}}")
        for key, value in given.items():
            if key not in FOR_FILES:
                raise UserError(
                    f"for '{pattern}': '{key}' is no option for some files; there is {', '.join(FOR_FILES)}"
                )
            try:
                kind, value = type(getattr(defaults, key)), _value(key, value)
            except (TypeError, ValueError):
                kind = str
            if not isinstance(value, (int, float) if kind is float else kind) or (kind is float and not value > 0):
                raise UserError(f"for '{pattern}': {key} cannot be {given[key]!r}")
    for pattern in ("", *options.for_files):
        one, where = for_pattern(options, pattern), f"for '{pattern}': " if pattern else ""
        if one.format not in ("auto", *kinds):
            raise UserError(f"{where}--format {one.format} is unknown; known: auto, {', '.join(kinds)}")
        if one.encoding and not is_text_encoding(one.encoding):
            raise UserError(f"{where}--encoding {one.encoding} is unknown; e.g. utf-8, cp1252, shift_jis")
        if bool(one.input_column) != bool(one.output_column):
            raise UserError(f"{where}--input-column and --output-column belong together; name both")


def unmet(options: IngestOptions, tally: Tally) -> str:
    """What was asked for and is nowhere, in words; "" where all of it was found."""
    for pattern in options.for_files:
        if f"file {pattern}" not in tally.met:
            return f"no file matches '{pattern}', for which there are options"
    for pattern in ("", *options.for_files):
        one = for_pattern(options, pattern)
        columns = [one.column, one.input_column, one.output_column, *(old for old, _ in one.columns)]
        for kind, name in (("table", one.table), *(("column", column) for column in columns)):
            if name and f"{kind} {name}" not in tally.met:
                if name in tally.lacking and kind == "column":
                    return tally.lacking[name]
                where = f"no file that matches '{pattern}'" if pattern else "nothing that was read"
                return f"{where} has a {kind} '{name}'"
    return ""

"""The text of each row, whatever its format: what `data cluster` reads in each of its passes, one row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.data.formats import FORMATS, Chat, Pair, Rated, convert, format_of, own_format
from tpu_tune.data.messages import RowError
from tpu_tune.data.preferences import texts_of
from tpu_tune.data.streams import Skipped, progress, read_json_lines
from tpu_tune.errors import UserError

_SAMPLE_CHARACTERS = 8192  # of a row that is kept in the sample


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows tells.

    Attributes:
      rows: how many have a text.
      sample: texts of a seeded sample of them.
      skipped: the bad rows.
    """

    rows: int
    sample: list[str]
    skipped: Skipped


def read_texts(path: str, key: str, skipped: Skipped) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (row, its text) of every row of a JSON Lines file that has one.

    Args:
      path: the file.
      key: whose value is the text; rows without it, and with "" all, give what is said in a row of a known format: a
        text, both sides of a pair, all turns of a chat but the system's.
      skipped: takes rows without text, and what is no row.

    Raises:
      UserError: the file cannot be read, the first row's format is not known, no row has the key, or a bad row that is
        not allowed.
    """
    format, rows, keyed = "", 0, 0
    for number, row in read_json_lines(path, skipped):
        rows += 1
        try:
            has_key = bool(key) and (key in row or not own_format(row))
            keyed += key in row
            if not has_key:
                if rows == 1 and not skipped.allowed:
                    _check_first(path, row)
                format = format_of(row, usual=format)
            text = _text(row, format, key if has_key else "")
        except RowError as error:
            skipped.add(f"{path}:{number}", str(error))
            continue
        if not text.strip():
            skipped.add(f"{path}:{number}", "no text")
            continue
        yield row, text
    if key and rows and not keyed:
        raise UserError(f"{path}: no row has '{key}'")


def survey(path: str, key: str, skip_bad: bool, sample: int, seed: int) -> Survey:
    """Count the rows and draw a sample of their texts, in one pass (Vitter's algorithm R).

    Raises:
      UserError: as `read_texts`, or no row has a text.
    """
    skipped, random = Skipped(skip_bad), np.random.default_rng(seed)
    kept: list[str] = []
    count = 0
    for _, text in progress(read_texts(path, key, skipped), "reading"):
        slot = len(kept) if len(kept) < sample else int(random.integers(0, count + 1))
        count += 1
        if slot == len(kept):
            kept.append(text[:_SAMPLE_CHARACTERS])
        elif slot < sample:
            kept[slot] = text[:_SAMPLE_CHARACTERS]
    if not count:
        bad = f"; the first bad row is {skipped.examples[0]}" if skipped.count else ""
        raise UserError(f"{path}: no row with a text{bad}")
    return Survey(count, kept, skipped)


def windows(path: str, key: str, count: int, size: int) -> Iterator[list[str]]:
    """Yield the texts in lists of `size`, after `survey` has counted them.

    Raises:
      UserError: the file is no longer what it was then.
    """
    window: list[str] = []
    rows = 0
    for _, text in read_texts(path, key, Skipped(allowed=True)):
        window.append(text)
        rows += 1
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
    check_unchanged(path, rows, count)


def check_unchanged(path: str, rows: int, expected: int) -> None:
    """Refuse a file that has changed between two passes.

    Raises:
      UserError: it has.
    """
    if rows != expected:
        raise UserError(f"{path}: changed while it was read ({expected} rows, then {rows}); run again")


def _check_first(path: str, row: Mapping[str, Any]) -> None:
    if not own_format(row):
        known = "; ".join(f"{name} ({', '.join(keys)})" for name, keys in FORMATS.items())
        raise UserError(
            f"{path}: which of the first row's keys is the text? They are: {', '.join(map(str, row)) or 'none'}; "
            f"name one with --text-key (known without: {known})"
        )


def _text(row: Mapping[str, Any], format: str, key: str) -> str:
    if key:
        if key not in row:
            raise RowError(f"no '{key}'; its keys: {', '.join(map(str, row))}")
        try:
            return convert({"text": row[key]}, "text").text
        except RowError as error:
            raise RowError(str(error).replace("'text'", f"'{key}'")) from None
    if format == "alpaca":  # without the prompt around it, which is the same in every row
        answer = convert(row, "alpaca").target
        return "\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name)) + f"\n{answer}"
    sample = convert(row, format)
    if isinstance(sample, Rated):
        return "\n".join(texts_of(sample))
    if isinstance(sample, Chat):
        return "\n".join(message["content"] for message in sample.messages if message["role"] != "system")
    return f"{sample.source}\n{sample.target}" if isinstance(sample, Pair) else sample.text

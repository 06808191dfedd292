"""Tokenize a file once, beforehand, into an Arrow file that trainers map into memory (`arrow`).

The rows go through `tokenizing`, as in a run, a batch at a time: no JSON Lines file is held whole. Only what does not
fit differs: a pair or a chat longer than `max_length` is left out and counted, as PygmalionAI's script does. The
output's size is estimated beforehand from a sample, so that a disk too small is reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.data import arrow, cache
from tpu_tune.data.formats import check_name, check_renamed, detect, in_words
from tpu_tune.data.processes import Engine
from tpu_tune.data.streams import JSON_LINES, Skipped, aside, progress, read_any
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import TokenizedSet
from tpu_tune.data.tokenizing import past_template, tokenize_rows
from tpu_tune.data.workers import Batch, num_processes, tokenize_batch, tokenize_batches
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)

_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 2**21
_SAMPLE_BYTES, _SAMPLE_PLACES = 2**19, 64
_FILE_BYTES, _BATCH_BYTES = 900, 376  # what a file and a record batch take beside their numbers

Row = tuple[str, dict[str, Any]]  # (file and line, the row)


def tokenize_file(
    path: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: Any,
    options: TokenizeOptions,
    num_workers: int = 0,
    skip_bad: bool = False,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Tokenize the rows of one file of any kind into an Arrow file.

    Args:
      options: pairs and chats that are too long are left out whatever `drop_long` says.
      num_workers: processes; 0 picks threads in this process, or processes where the rows are many enough.
      skip_bad: leave out and count rows that cannot be read or used.
      engine: tokenizes the batches in place of these processes.

    Returns:
      Counts as in `TokenizedSet.summary`, and `format`, `max_length`, `bytes`, `predicted_bytes`, `input_bytes`,
      `output`, `notes`.

    Raises:
      UserError: a bad row, nothing to learn, a format that is not known, or no room on the disk.
    """
    path, output = os.fspath(path), os.fspath(output)
    if os.path.exists(output) and os.path.exists(path) and os.path.samefile(path, output):
        raise UserError(f"{output}: is the input itself; name another output")
    check_name(options.format)
    skipped = Skipped(skip_bad)
    rows = None if path.lower().endswith(JSON_LINES) else list(read_any(path, skipped))
    if not skip_bad:
        _check_first(path, rows or read_any(path, Skipped(skip_bad)), options)
    options = dataclasses.replace(options, drop_long=True, skip_bad_rows=True)
    if tokenizer.eos_token_id is None and options.num_eos:
        logger.warning("the tokenizer has no end-of-text token, so the model will not learn to stop")
    predicted, expected, sample = _predict(path, rows, tokenizer, options)
    if not storage.is_special(output):
        _check_room(path, output, predicted)
    heavy = not tokenizer.is_fast or sample["chats"]  # work that holds Python's lock
    processes = num_processes(expected, num_workers) if heavy or num_workers else 1
    batches = make_batches(read_any(path, skipped) if rows is None else rows)
    usual = next(iter(sample["formats"])) if len(sample["formats"]) == 1 else ""
    about = {"max_length": options.max_length, "format": usual, "tokenizer": cache.tokenizer_hash(tokenizer)}
    rated = sample["rated"] > 0
    if engine is None:
        sets = tokenize_batches(batches, tokenizer, options, processes)
    else:
        sets = engine(functools.partial(tokenize_batch, tokenizer=tokenizer, options=options), batches)
    counts, formats, dropped, unused = Counter(), Counter(), Counter(), Counter()
    with aside(output) as temporary:
        with (
            pa.OSFile(os.fspath(temporary), "wb") as file,
            pa.ipc.new_file(file, arrow.schema(about, rated)) as writer,
            progress(None, "tokenize", total=expected) as bar,
        ):
            for one in sets:
                _count(one, counts, dropped, skipped)
                unused.update(one.summary["unused"])
                formats.update(one.summary["formats"])
                if len(one):
                    _check_rated(path, one, rated)
                    arrow.write_batch(writer, one, usual)
                bar.update(one.summary["rows"])
        check_renamed(path, options.columns, counts["renamed"], sum(formats.values()))
        _check_some(path, counts, dropped)
    note = past_template({**counts, "formats": formats}, options, "--format")
    return _figures(counts, skipped) | {
        "dropped": dict(sorted(dropped.items())),
        "unused": dict(sorted(unused.items())),
        "format": in_words(formats),
        "notes": [note] if note else [],
        "max_length": options.max_length,
        "input_bytes": os.path.getsize(path),
        "predicted_bytes": predicted,
        "bytes": os.path.getsize(output),
        "output": output,
    }


def _check_rated(path: str, one: TokenizedSet, rated: bool) -> None:
    if rated != (one.roles is not None and bool(one.roles.all())):
        raise UserError(f"{path}: holds rated answers and other rows, which no objective learns from together")


def _check_some(path: str, counts: Counter, dropped: Counter) -> None:
    if not counts["examples"]:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        raise UserError(f"{path}: none of the {counts['rows']} rows has anything to learn ({reasons or 'bad rows'})")


def _figures(counts: Counter, skipped: Skipped) -> dict[str, Any]:
    return {name: counts[name] for name in ("examples", "tokens", "target_tokens", "split", "open_ended")} | {
        "rows": counts["rows"] + skipped.count - counts["bad_rows"],  # rows that could not be read count as rows too
        "bad_rows": skipped.count,
        "bad_examples": [str(row) for row in skipped.examples],
    }


def _check_first(path: str, rows: Iterable[Row], options: TokenizeOptions) -> None:
    _, first = next(iter(rows), ("", None))
    if first is None:
        raise UserError(f"{path}: no rows")
    try:
        detect(first, options.format, options.columns)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def make_batches(rows: Iterable[Row]) -> Iterator[Batch]:
    """Group rows by number and size; the groups depend on nothing else, so that the same rows give the same file."""
    batch, where_each, size, first = [], [], 0, 0
    for where, row in rows:
        batch.append(row)
        where_each.append(where)
        size += count_characters(row)
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch, where_each, first
            batch, where_each, size, first = [], [], 0, first + len(batch)
    if batch:
        yield batch, where_each, first


def count_characters(value: Any) -> int:
    """Characters of all strings in a row, and a few for each other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 8
    return sum(count_characters(item) for item in value)


def _count(one: TokenizedSet, counts: Counter, dropped: Counter, skipped: Skipped) -> None:
    summary = one.summary
    for text in summary["bad_examples"]:
        where, _, reason = text.partition(": ")
        skipped.add(where, reason)
    skipped.count += summary["bad_rows"] - len(summary["bad_examples"])  # it names five at most
    dropped.update(summary["dropped"])
    counts.update({name: value for name, value in summary.items() if isinstance(value, int)})


def _check_room(path: str, output: str, predicted: int) -> None:
    folder = Path(output).absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    size = f"{output} will take about {_size(predicted)}, {predicted / max(1, os.path.getsize(path)):.1f} x its input"
    if predicted > free:
        raise UserError(f"{size}, and only {_size(free)} are free there; name an --output-file on another disk")
    logger.warning("%s (%s are free there)", size, _size(free))


def _size(count: int) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB"))
    return f"{count / unit:.2f} {name}"


def _predict(
    path: str, rows: list[Row] | None, tokenizer: Any, options: TokenizeOptions
) -> tuple[int, int, dict[str, Any]]:
    """Estimate the output's bytes and the number of rows, from rows of all parts of the input; add their summary."""
    if rows is None:
        sample, factor = _sample_lines(path)
    else:
        step = max(1, len(rows) // 1000)
        sample, factor = [row for _, row in rows[::step]], step
    data = tokenize_rows(sample, tokenizer, options)
    expected = round(len(sample) * factor)
    numbers = 16 * data.summary["tokens"] + (8 if data.roles is None else 9) * len(data)
    characters = sum(count_characters(row) for row in sample) * factor
    batches = max(1, expected / _BATCH_ROWS, characters / _BATCH_CHARACTERS)
    return round(numbers * factor + batches * _BATCH_BYTES) + _FILE_BYTES, expected, data.summary


def _sample_lines(path: str) -> tuple[list[dict[str, Any]], float]:
    """Read some lines from all parts of a file; return their rows, and what part of the file they are, inverted."""
    size, read, lines = os.path.getsize(path), 0, []
    if path.endswith(".gz"):  # only from the front
        with gzip.open(path) as file:
            lines = file.readlines(2 * _SAMPLE_BYTES)
            read = size if not file.peek(1) else file.fileobj.tell()
    elif size <= 2 * _SAMPLE_BYTES:
        with open(path, "rb") as file:
            lines, read = file.readlines(), size
    else:
        with open(path, "rb") as file:
            for number in range(_SAMPLE_PLACES):
                start = size * number // _SAMPLE_PLACES
                if start < file.tell():
                    continue  # the last sample's line reached further than this
                file.seek(start)
                if start:
                    file.readline()
                block = file.readlines(_SAMPLE_BYTES // _SAMPLE_PLACES)
                lines += block
                read += sum(map(len, block))
    return list(_parsed(lines)), size / max(1, read)


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json_text.loads(line.decode("utf-8-sig"))
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row

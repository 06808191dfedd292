"""Figures about a data set before it is trained on: size, lengths, duplicates, and what the tokenizer makes of it.

One pass, row by row. What is held of a row is a hash of its text and its lengths (32 bytes), and of the set the counts
of its words and characters (`breakage`).
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tpu_tune.data import arrow, saved_sets
from tpu_tune.data.breakage import Breakage
from tpu_tune.data.formats import (
    Chat,
    Pair,
    Rated,
    Sample,
    bare,
    check_characters,
    check_renamed,
    columns_of,
    convert,
    detect,
    format_of,
    in_words,
    own_format,
    unused_keys,
)
from tpu_tune.data.messages import RowError
from tpu_tune.data.preferences import texts_of
from tpu_tune.data.pretokenize import Row, make_batches
from tpu_tune.data.sources import resolve
from tpu_tune.data.streams import Skipped, progress, read_any
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import CHOSEN, REJECTED, TokenizedSet
from tpu_tune.data.tokenizing import past_template
from tpu_tune.data.workers import tokenize_batches
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)

LEAST_BYTES = 100 * 2**20  # the guide's rule of thumb for a full fine-tune
UNKNOWN = "unknown"  # stands for a format
_UNCUT = 2**40  # a max_length that cuts nothing
_PERCENTILES = (50, 90, 95, 99)


def describe(
    path: str | os.PathLike,
    tokenizer: Any = None,
    options: TokenizeOptions | None = None,
    method: str = "full",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Go through the rows of a file, or of a directory of them, and count.

    Args:
      tokenizer: counts tokens, and says which words it breaks; without one, lengths are in characters.
      options: format, columns, template and `max_length`; nothing is cut, `max_length` is only held against.
      method: `full` or `lora`; for a full fine-tune less than 100 MiB of text is worth a warning.
      skip_bad: leave out and count rows that cannot be read or used.

    Returns:
      What `table` shows; plain numbers, texts and lists, for JSON.

    Raises:
      UserError: a file that cannot be read, a bad row, or no rows.
    """
    options = options or TokenizeOptions(format="auto", max_length=2048, objective="")
    files, skipped = _files(os.fspath(path)), Skipped(skip_bad)
    _check_first(files, options)
    row_counts = _RowCounts(options, skipped)
    figures: dict[str, Any] = {"files": files}
    rows = row_counts.count(progress(_rows(files, skipped), "stats"))
    tokens = None
    if tokenizer is None:
        for _ in rows:
            pass
    else:
        tokens = _TokenCounts(tokenizer, Breakage())
        uncut = dataclasses.replace(
            options,
            max_length=_UNCUT,
            skip_bad_rows=True,
            drop_long=False,
            source_max_len=0,
            target_max_len=0,
        )
        for tokenized in tokenize_batches(make_batches(tokens.count(rows, row_counts)), tokenizer, uncut):
            tokens.add(tokenized, skipped)
    if not row_counts.rows:
        raise UserError(f"{path}: no rows")
    check_renamed(os.fspath(path), options.columns, row_counts.renamed, row_counts.rows)
    figures |= row_counts.figures(skipped)
    lengths = np.frombuffer(row_counts.lengths, np.int64)
    if tokens is not None and tokens.lengths:
        lengths = np.concatenate([np.zeros(0, np.int64), *tokens.lengths])
        figures["tokens"] = tokens.figures(row_counts.characters)
        figures["unused"] = dict(sorted(tokens.unused.items()))
    unit = "tokens" if "tokens" in figures else "characters"
    figures["lengths"] = {"unit": unit, **_distribution(lengths, options.max_length if unit == "tokens" else 0)}
    figures["warnings"] = _warnings(figures, method, options.max_length)
    if tokens is not None and (note := past_template(tokens.summary(), options, "--format")):
        figures["warnings"].append(note)
    return figures


class _RowCounts:
    """Counts of rows, without a tokenizer."""

    def __init__(self, options: TokenizeOptions, skipped: Skipped):
        self.format, self.columns, self.skipped = options.format, options.columns, skipped
        self.formats: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.unknown = ""  # the first row of no known format
        self.rows = self.renamed = self.characters = self.bytes = self.empty_answers = 0
        self.keys: Counter[str] = Counter()
        self.hashes, self.lengths = array.array("Q"), array.array("q")
        self.text = ""  # of the last row

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows of known formats on, but those that cannot be used, and count all."""
        for where, row in rows:
            try:
                format = self._format(where, row)
                if format:
                    texts, empty = _texts(convert(row, format, self.columns))
                    self.unused.update(unused_keys(row, format, self.columns))
                else:
                    texts, empty = _strings(row), False
                    check_characters(texts)
            except RowError as error:
                self.skipped.add(where, str(error))
                continue
            self.text = "\n".join(texts)
            encoded = self.text.encode("utf-8", "surrogatepass")
            characters = sum(map(len, texts))
            self.rows += 1
            self.formats[format or UNKNOWN] += 1
            self.renamed += bool(columns_of(row, self.columns))
            self.characters += characters
            self.bytes += len(encoded) - max(0, len(texts) - 1)
            self.empty_answers += empty
            self.keys.update(row.keys())
            self.hashes.append(int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little"))
            self.lengths.append(characters)
            if format:
                yield where, row

    def _format(self, where: str, row: dict[str, Any]) -> str:
        """A row's format; "" where it is to be told and is not known, as long as columns are not named either."""
        if self.format.startswith("auto") and not self.columns and not own_format(row):
            self.unknown = self.unknown or f"{where}, with the keys {', '.join(map(str, row)) or 'none'}"
            return ""
        return format_of(row, self.format, self.columns)

    def figures(self, skipped: Skipped) -> dict[str, Any]:
        return {
            "format": in_words(self.formats),
            "formats": dict(self.formats),
            "first_unknown": self.unknown,
            "unused": dict(sorted(self.unused.items())),
            "rows": self.rows,
            "bad_rows": skipped.count,
            "bad_examples": [str(row) for row in skipped.examples],
            "keys": dict(self.keys.most_common(50)),
            "characters": self.characters,
            "bytes": self.bytes,
            "duplicates": self.rows - len(np.unique(np.frombuffer(self.hashes, np.uint64))),
            "empty_answers": self.empty_answers,
        }


class _TokenCounts:
    """Counts of the rows' tokens."""

    def __init__(self, tokenizer: Any, breakage: Breakage):
        self.tokenizer, self.breakage = tokenizer, breakage
        self.lengths: list[np.ndarray] = []
        self.targets = 0
        self.ids = np.zeros(len(tokenizer), np.int64)
        self.dropped: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.pairs = 0
        self.answers, self.answer_tokens = Counter(), Counter()  # by role

    def summary(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "formats": self.formats}

    def count(self, rows: Iterable[Row], row_counts: _RowCounts) -> Iterator[Row]:
        for where, row in rows:
            self.breakage.read(row_counts.text)
            yield where, row

    def add(self, tokenized: TokenizedSet, skipped: Skipped) -> None:
        for text in tokenized.summary["bad_examples"]:
            where, _, reason = text.partition(": ")
            skipped.add(where, reason)
        skipped.count += tokenized.summary["bad_rows"] - len(tokenized.summary["bad_examples"])
        self.lengths.append(tokenized.lengths)
        if tokenized.roles is not None:  # both answers of a row have to fit together
            row = np.searchsorted(np.unique(tokenized.source_rows), tokenized.source_rows)
            self.lengths[-1] = np.bincount(row, tokenized.lengths).astype(np.int64)
            for role in (CHOSEN, REJECTED):
                of_role = tokenized.roles == role
                self.answers[role] += int(of_role.sum())
                self.answer_tokens[role] += int(tokenized.count_targets()[of_role].sum())
        self.targets += tokenized.summary["target_tokens"]
        self.pairs += tokenized.summary["pairs"]
        for name in ("dropped", "unused", "formats"):
            getattr(self, name).update(tokenized.summary[name])
        counts = np.bincount(tokenized.tokens, minlength=len(self.ids))
        self.ids = counts + np.pad(self.ids, (0, len(counts) - len(self.ids)))

    def figures(self, characters: int) -> dict[str, Any]:
        total = int(self.ids.sum())
        return {
            "total": total,
            "targets": self.targets,
            "characters_per_token": round(characters / max(1, total), 3),
            "vocabulary_used": int(np.count_nonzero(self.ids)),
            "vocabulary": len(self.tokenizer),
            "dropped": dict(sorted(self.dropped.items())),
            "rated": {
                name: {"answers": self.answers[role], "mean": round(self.answer_tokens[role] / self.answers[role], 1)}
                for name, role in (("chosen", CHOSEN), ("rejected", REJECTED))
                if self.answers[role]
            },
            **self.breakage.figures(self.tokenizer, self.ids),
        }


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        files = [path]
    else:
        train, held_out = resolve(path)
        # Of a set that was saved in splits, the one that is trained on: the others are sets of their own.
        files = train if saved_sets.splits_of(path) else [*train, *(held_out or [])]
    for file in files:
        if os.path.isfile(file) and arrow.is_tokenized(file):
            raise UserError(f"{file}: is tokenized already; give the rows that it was made from")
    return files


def _rows(files: Sequence[str], skipped: Skipped) -> Iterator[Row]:
    for file in files:
        yield from read_any(file, skipped)


def _check_first(files: list[str], options: TokenizeOptions) -> None:
    """Hold the named format and columns against the first row; without them, say where its keys are not known."""
    _, first = next(_rows(files, Skipped(allowed=True)), ("", None))
    if first is None:
        return
    try:
        detect(first, options.format, options.columns)
    except UserError as error:
        if not options.format.startswith("auto") or options.columns:
            raise UserError(f"{files[0]}: {error}") from error
        logger.warning("%s: %s; counting all its strings", files[0], str(error).partition("; known")[0])


def _texts(sample: Sample) -> tuple[list[str], bool]:
    """A row's texts, and whether an answer in it is empty."""
    if isinstance(sample, Chat):
        answers = [m["content"] for m in sample.messages if m["role"] == "assistant" and not m.get("tool_calls")]
        return [m["content"] for m in sample.messages], not all(answer.strip() for answer in answers)
    if isinstance(sample, Rated):
        return texts_of(sample), False  # an empty answer is no rated one, but a bad row
    if isinstance(sample, Pair):
        return [sample.source, sample.target], not sample.target.strip()
    return [sample.text], not sample.text.strip()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _strings(item)]


def _distribution(lengths: np.ndarray, max_length: int) -> dict[str, Any]:
    """Percentiles, and a histogram over powers of two: [from, up to and including, rows]."""
    if not len(lengths):
        return {"mean": 0, "max": 0, "histogram": []}
    figures: dict[str, Any] = {"mean": round(float(lengths.mean()), 1)}
    # The smallest length that so many per cent of the rows do not exceed: always a length that occurs.
    figures |= {f"p{p}": int(np.percentile(lengths, p, method="inverted_cdf")) for p in _PERCENTILES}
    figures["max"] = int(lengths.max())
    power = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(power)
    first = int(np.flatnonzero(counts)[0])
    figures["histogram"] = [[2 ** (p - 1) + 1 if p else 0, 2**p, int(counts[p])] for p in range(first, len(counts))]
    if max_length:
        over = int((lengths > max_length).sum())
        figures |= {"max_length": max_length, "over_max_length": over}
    return figures


def _warnings(figures: dict[str, Any], method: str, max_length: int) -> list[str]:
    warnings = []
    if method == "full" and figures["bytes"] < LEAST_BYTES:
        warnings.append(
            f"{_bytes(figures['bytes'])} of text: for a full fine-tune have at least 100 MiB, as a rule of thumb "
            "(a LoRA needs less: --method lora)"
        )
    if figures["duplicates"]:
        warnings.append(
            f"{figures['duplicates']:,} rows have the text of another row; tpu-tune data clean removes them"
        )
    if figures["empty_answers"]:
        warnings.append(f"{figures['empty_answers']:,} rows have an empty answer or text; nothing is learnt from them")
    over = figures["lengths"].get("over_max_length", 0)
    if over:
        formats = {bare(name) for name in figures["formats"]}
        what = "cut into blocks" if formats == {"text"} else "cut, or left out by data tokenize"
        what = "left out, since both answers have to fit together" if formats == {"preference"} else what
        warnings.append(
            f"{over:,} rows ({over / figures['rows']:.1%}) are longer than {max_length} tokens: they are {what}"
        )
    if figures.get("tokens", {}).get("unknown_tokens"):
        warnings.append(
            f"{figures['tokens']['unknown_tokens']:,} tokens are unknown to the tokenizer: their text is lost"
        )
    if UNKNOWN in figures["formats"]:
        warnings.append(
            f"{figures['formats'][UNKNOWN]:,} rows are of no known format, the first {figures['first_unknown']}: "
            "training stops there (data.columns can rename keys)"
        )
    warnings += [
        f"'{key}' of {count:,} rows is not used: it is not in the text that is trained on"
        for key, count in figures["unused"].items()
    ]
    return warnings


def table(figures: dict[str, Any]) -> str:
    """The figures of `describe` as text."""
    lines = [
        f"rows          {figures['rows']:,} ({figures['format']})"
        + f", {figures['bad_rows']:,} bad ones" * bool(figures["bad_rows"]),
        f"keys          {', '.join(f'{key} ({count:,})' for key, count in figures['keys'].items())}",
        f"text          {figures['characters']:,} characters, {_bytes(figures['bytes'])}",
        f"duplicates    {figures['duplicates']:,} rows; empty answers {figures['empty_answers']:,}",
    ]
    tokens = figures.get("tokens")
    if tokens:
        lines += [
            f"tokens        {tokens['total']:,}, {tokens['targets']:,} of them targets; "
            f"{tokens['characters_per_token']} characters a token; "
            f"{tokens['vocabulary_used']:,} of {tokens['vocabulary']:,} in use",
        ]
        answers = [
            f"{rated['answers']:,} {name} ({rated['mean']:,} tokens on average)"
            for name, rated in tokens["rated"].items()
        ]
        lines += [f"answers       {', '.join(answers)}"] * bool(answers)
        lines += [f"left out      {count:,} rows: {reason}" for reason, count in tokens["dropped"].items()]
    lengths = figures["lengths"]
    shares = ", ".join(f"{p}% up to {lengths[f'p{p}']:,}" for p in _PERCENTILES if f"p{p}" in lengths)
    lines.append(f"length        in {lengths['unit']}: mean {lengths['mean']:,}; {shares}; longest {lengths['max']:,}")
    most = max((count for *_, count in lengths["histogram"]), default=1)
    for low, high, count in lengths["histogram"]:
        lines.append(f"  {low:>9,} - {high:<9,} {count:>9,} {'#' * -(-40 * count // most)}")
    if tokens:
        lines.append(
            f"words         {tokens['words']:,}, {tokens['tokens_per_word']} tokens each; bytes without a character of "
            f"their own {tokens['byte_tokens']:,}, unknown {tokens['unknown_tokens']:,}"
        )
        for kind in ("words", "characters"):
            if tokens[f"broken_{kind}"]:
                lines.append(f"{kind} with the most tokens a character:")
            for broken in tokens[f"broken_{kind}"]:
                pieces = broken["tokens"]
                lines.append(f"  {broken['count']:>9,} x {broken['text']}: {len(pieces)} tokens, {' '.join(pieces)}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in figures["warnings"])])


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"

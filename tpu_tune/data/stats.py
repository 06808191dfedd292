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

from tpu_tune.data import arrow
from tpu_tune.data.breakage import Breakage
from tpu_tune.data.formats import Chat, Pair, RowError, Sample, convert, detect
from tpu_tune.data.pretokenize import Row, make_batches
from tpu_tune.data.sources import resolve
from tpu_tune.data.streams import Skipped, progress, read_any
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.workers import tokenize_batches
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)

LEAST_BYTES = 100 * 2**20  # the guide's rule of thumb for a full fine-tune
_WHOLE = 2**40  # a max_length that cuts nothing
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
    options = options or TokenizeOptions(format="auto", max_length=2048)
    files, skipped = _files(os.fspath(path)), Skipped(skip_bad)
    seen = _Seen(_format(files, options), options, skipped)
    found: dict[str, Any] = {"files": files, "format": seen.format or "unknown"}
    rows = seen.look(progress(_rows(files, skipped), "stats"))
    tokens = None
    if tokenizer is None or not seen.format:
        for _ in rows:
            pass
    else:
        tokens = _Tokens(tokenizer, Breakage())
        whole = dataclasses.replace(
            options,
            format=seen.format,
            max_length=_WHOLE,
            skip_bad_rows=True,
            drop_long=False,
            source_max_len=0,
            target_max_len=0,
        )
        for part in tokenize_batches(make_batches(tokens.look(rows, seen)), tokenizer, whole):
            tokens.add(part)
    if not seen.rows:
        raise UserError(f"{path}: no rows")
    found |= seen.figures(skipped)
    lengths = np.frombuffer(seen.lengths, np.int64)
    if tokens is not None:
        lengths = np.concatenate([np.zeros(0, np.int64), *tokens.lengths])
        found["tokens"] = tokens.figures(seen.characters)
    unit = "characters" if tokens is None else "tokens"
    found["lengths"] = {"unit": unit, **_distribution(lengths, options.max_length if tokens is not None else 0)}
    found["warnings"] = _warnings(found, method, options.max_length)
    return found


class _Seen:
    """What can be said of rows without a tokenizer."""

    def __init__(self, format: str, options: TokenizeOptions, skipped: Skipped):
        self.format, self.columns, self.skipped = format, options.columns, skipped
        self.rows = self.characters = self.bytes = self.empty_answers = 0
        self.keys: Counter[str] = Counter()
        self.hashes, self.lengths = array.array("Q"), array.array("q")
        self.text = ""  # of the last row

    def look(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on, but those that cannot be used, and count."""
        for place, row in rows:
            try:
                texts, empty = (
                    _texts(convert(row, self.format, self.columns)) if self.format else (_strings(row), False)
                )
            except RowError as error:
                self.skipped.add(place, str(error))
                continue
            self.text = "\n".join(texts)
            encoded = self.text.encode("utf-8", "surrogatepass")
            characters = sum(map(len, texts))
            self.rows += 1
            self.characters += characters
            self.bytes += len(encoded) - max(0, len(texts) - 1)
            self.empty_answers += empty
            self.keys.update(row.keys())
            self.hashes.append(int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little"))
            self.lengths.append(characters)
            yield place, row

    def figures(self, skipped: Skipped) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "bad_rows": skipped.count,
            "bad_examples": [str(row) for row in skipped.examples],
            "keys": dict(self.keys.most_common(50)),
            "characters": self.characters,
            "bytes": self.bytes,
            "duplicates": self.rows - len(np.unique(np.frombuffer(self.hashes, np.uint64))),
            "empty_answers": self.empty_answers,
        }


class _Tokens:
    """What a tokenizer makes of the rows."""

    def __init__(self, tokenizer: Any, breakage: Breakage):
        self.tokenizer, self.breakage = tokenizer, breakage
        self.lengths: list[np.ndarray] = []
        self.targets = 0
        self.ids = np.zeros(len(tokenizer), np.int64)
        self.dropped: Counter[str] = Counter()

    def look(self, rows: Iterable[Row], seen: _Seen) -> Iterator[Row]:
        for place, row in rows:
            self.breakage.read(seen.text)
            yield place, row

    def add(self, part: Any) -> None:
        if part.summary["bad_rows"]:
            raise UserError(part.summary["bad_examples"][0])
        self.lengths.append(part.lengths)
        self.targets += part.summary["target_tokens"]
        self.dropped.update(part.summary["dropped"])
        counts = np.bincount(part.tokens, minlength=len(self.ids))
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
            **self.breakage.figures(self.tokenizer, self.ids),
        }


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        files = [path]
    else:
        train, held_out = resolve(path)
        files = [*train, *(held_out or [])]
    for file in files:
        if os.path.isfile(file) and arrow.is_tokenized(file):
            raise UserError(f"{file}: is tokenized already; give the rows that it was made from")
    return files


def _rows(files: Sequence[str], skipped: Skipped) -> Iterator[Row]:
    for file in files:
        yield from read_any(file, skipped)


def _format(files: list[str], options: TokenizeOptions) -> str:
    """The format of the first row, or "" where its keys are not known."""
    _, first = next(_rows(files, Skipped(allowed=True)), ("", None))
    if first is None:
        return ""
    try:
        return detect(first, options.format, options.columns)
    except UserError as error:
        if options.format != "auto" or options.columns:
            raise UserError(f"{files[0]}: {error}") from error
        logger.warning("%s: %s; counting all its strings", files[0], str(error).partition("; known")[0])
        return ""


def _texts(sample: Sample) -> tuple[list[str], bool]:
    """A row's texts, and whether an answer in it is empty."""
    if isinstance(sample, Chat):
        answers = [m["content"] for m in sample.messages if m["role"] == "assistant" and not m.get("tool_calls")]
        return [m["content"] for m in sample.messages], not all(answer.strip() for answer in answers)
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


def _warnings(found: dict[str, Any], method: str, max_length: int) -> list[str]:
    warnings = []
    if method == "full" and found["bytes"] < LEAST_BYTES:
        warnings.append(
            f"{_bytes(found['bytes'])} of text: for a full fine-tune have at least 100 MiB, as a rule of thumb (a LoRA needs "
            "less: --method lora)"
        )
    if found["duplicates"]:
        warnings.append(f"{found['duplicates']:,} rows have the text of another row; tpu-tune data clean removes them")
    if found["empty_answers"]:
        warnings.append(f"{found['empty_answers']:,} rows have an empty answer or text; nothing is learnt from them")
    over = found["lengths"].get("over_max_length", 0)
    if over:
        what = "cut into blocks" if found["format"] == "text" else "cut, or left out by tpu-tune data tokenize"
        warnings.append(
            f"{over:,} rows ({over / found['rows']:.1%}) are longer than {max_length} tokens: they are {what}"
        )
    if found.get("tokens", {}).get("unknown_tokens"):
        warnings.append(
            f"{found['tokens']['unknown_tokens']:,} tokens are unknown to the tokenizer: their text is lost"
        )
    return warnings


def table(found: dict[str, Any]) -> str:
    """The figures of `describe` as text."""
    lines = [
        f"rows          {found['rows']:,} ({found['format']})"
        + f", {found['bad_rows']:,} bad ones" * bool(found["bad_rows"]),
        f"keys          {', '.join(f'{key} ({count:,})' for key, count in found['keys'].items())}",
        f"text          {found['characters']:,} characters, {_bytes(found['bytes'])}",
        f"duplicates    {found['duplicates']:,} rows; empty answers {found['empty_answers']:,}",
    ]
    tokens = found.get("tokens")
    if tokens:
        lines += [
            f"tokens        {tokens['total']:,}, {tokens['targets']:,} of them targets; {tokens['characters_per_token']} "
            f"characters a token; {tokens['vocabulary_used']:,} of {tokens['vocabulary']:,} in use",
        ]
        lines += [f"left out      {count:,} rows: {reason}" for reason, count in tokens["dropped"].items()]
    lengths = found["lengths"]
    shares = ", ".join(f"{p}% up to {lengths[f'p{p}']:,}" for p in _PERCENTILES if f"p{p}" in lengths)
    lines.append(f"length        in {lengths['unit']}: mean {lengths['mean']:,}; {shares}; longest {lengths['max']:,}")
    most = max((count for *_, count in lengths["histogram"]), default=1)
    for low, high, count in lengths["histogram"]:
        lines.append(f"  {low:>9,} - {high:<9,} {count:>9,} {'#' * -(-40 * count // most)}")
    if tokens:
        lines.append(
            f"words         {tokens['words']:,}, {tokens['tokens_per_word']} tokens each; bytes without a character of their "
            f"own {tokens['byte_tokens']:,}, unknown {tokens['unknown_tokens']:,}"
        )
        for kind in ("words", "characters"):
            if tokens[f"broken_{kind}"]:
                lines.append(f"{kind} with the most tokens a character:")
            for broken in tokens[f"broken_{kind}"]:
                lines.append(
                    f"  {broken['count']:>9,} x {broken['text']}: {len(broken['tokens'])} tokens, {' '.join(broken['tokens'])}"
                )
    return "\n".join([*lines, *(f"warning: {warning}" for warning in found["warnings"])])


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"

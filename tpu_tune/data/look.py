"""Rows as the model will see them: which tokens are trained on, which are only read, and what was cut off.

The rows go through the code and options of a run (`tokenizing`, `options_from_config`), so that a wrong template, a
mask over the wrong words or a lost end of text shows before anything is trained on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tpu_tune.data import arrow
from tpu_tune.data.formats import check_renamed, columns_of, detect
from tpu_tune.data.preferences import ANY
from tpu_tune.data.sources import resolve
from tpu_tune.data.streams import Skipped, progress, read_any
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import CHOSEN, PLAIN, REJECTED, TokenizedSet
from tpu_tune.data.tokenizing import past_template, tokenize_rows
from tpu_tune.errors import UserError

_UNCUT = 2**40  # a max_length that cuts nothing
_LONGEST_CHARACTER = 8  # tokens that one character may be in pieces of
_GREEN, _RED, _DIM, _BOLD, _REVERSE, _STRUCK, _RESET = (
    f"\x1b[{code}m" for code in ("32", "31", "2", "1", "7", "31;9", "0")
)
ROLES = {CHOSEN: "chosen", REJECTED: "rejected"}


@dataclass
class View:
    """One example.

    Attributes:
      where: file and row, and which part of a long text it is.
      texts: each token as text; together they are the whole.
      trained, special: of each token, whether it is to be predicted, and whether it is a special one.
      cut: tokens of the row that are not seen at all.
      cut_text: what they say, where they are the row's end.
      notes: what is worth knowing, such as why it is not trained on.
      role: of a rated answer, as in `TokenizedSet`.
      pair: the row's format where it is a prompt and an answer, and no chat.
    """

    where: str
    texts: list[str]
    trained: np.ndarray
    special: np.ndarray
    cut: int = 0
    cut_text: str = ""
    notes: list[str] = field(default_factory=list)
    pair: str = ""
    role: int = PLAIN


def look(
    path: str, tokenizer: Any, options: TokenizeOptions, count: int = 3, seed: int = 0, row: int | None = None
) -> list[View]:
    """Draw some rows, in their order, and see them as a run would.

    Args:
      path: a data file, tokenized or not, or a directory, of which the training files are read.
      options: as `options_from_config` returns them.
      count: rows to draw.
      seed: decides which.
      row: this one instead, from 1.

    Raises:
      UserError: as in a run: rows that cannot be read or used, no row of that number.
    """
    files = resolve(path)[0] if os.path.isdir(path) else [path]
    tokenized = [os.path.isfile(file) and arrow.is_tokenized(file) for file in files]
    if all(tokenized):
        data = arrow.load(files, options.max_length, options.objective)
        chosen = _draw(range(len(data)), path, count, seed, row)
        return [view for index in chosen for view in _views(data, f"{path}, example {index + 1}", tokenizer, [index])]
    skipped = Skipped(options.skip_bad_rows)
    rows = ((where, found) for file in files for where, found in read_any(file, skipped))
    chosen = _draw(progress(_checked(rows, files[0], options), "look"), path, count, seed, row)
    views = [view for where, found in chosen for view in _row_views(where, found, tokenizer, options)]
    past = [view for view in views if view.pair]
    if past:
        summary = {"pairs": len(past), "formats": [view.pair for view in past]}
        past[0].notes += filter(None, [past_template(summary, options, "data.format")])
    return views


def _checked(rows: Iterator[Any], file: str, options: TokenizeOptions) -> Iterator[Any]:
    """Pass rows on; refuse a first one of no known format, and columns that none of them has."""
    number = renamed = 0
    for number, (where, row) in enumerate(rows, start=1):
        if number == 1 and not options.skip_bad_rows:
            try:
                detect(row, options.format, options.columns)
            except UserError as error:
                raise UserError(f"{file}: {error}") from error
        renamed += bool(columns_of(row, options.columns))
        yield where, row
    if not number:
        raise UserError(f"{file}: no rows")
    check_renamed(file, options.columns, renamed, number)


def _draw(items: Iterable[Any], path: str, count: int, seed: int, row: int | None) -> list[Any]:
    """Take item `row`, or `count` at random in one pass (reservoir sampling), in their order."""
    kept, generator, number = [], random.Random(seed), 0
    for number, item in enumerate(items, start=1):
        if row is not None:
            if number == row:
                return [item]
        elif len(kept) < count:
            kept.append((number, item))
        elif (index := generator.randrange(number)) < count:
            kept[index] = (number, item)
    if row is not None:
        raise UserError(f"{path}: has no row {row}; it has {number}")
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def _row_views(where: str, row: dict[str, Any], tokenizer: Any, options: TokenizeOptions) -> list[View]:
    data = tokenize_rows([row], tokenizer, options, [where])
    if data.summary["bad_rows"]:
        return [View(where, [], np.zeros(0, bool), np.zeros(0, bool), notes=[data.summary["bad_examples"][0]])]
    # As it would be if there were room for everything.
    uncut = dataclasses.replace(options, max_length=_UNCUT, source_max_len=0, target_max_len=0, drop_long=False)
    complete = tokenize_rows([row], tokenizer, uncut, [where])
    views = _views(data, where, tokenizer, range(len(data)))
    reasons = [f"not trained on: {reason}" for reason in data.summary["dropped"]]
    reasons += [f"'{key}' is not used: it is not in the text" for key in data.summary["unused"]]
    if not views:
        if not len(complete):
            everything = dataclasses.replace(uncut, train_on_source=True, response_markers=())
            complete = tokenize_rows([row], tokenizer, everything, [where])
        nothing = [View(where, [], np.zeros(0, bool), np.zeros(0, bool))]
        views = _views(complete, where, tokenizer, range(len(complete))) or nothing
        for view in views:
            view.trained = np.zeros_like(view.trained)
    else:
        cut = len(complete.tokens) - len(data.tokens)
        views[-1].cut = cut
        if cut and np.array_equal(complete.tokens[: len(data.tokens)], data.tokens):
            views[-1].cut_text = "".join(_texts(tokenizer, complete.tokens.tolist())[len(data.tokens) :])
    if data.summary["eos_lost"]:
        reasons.append("the end of an answer is cut off")
    if data.summary["open_ended"]:
        reasons.append("no end token after the last answer: the model will not learn to stop")
    if data.summary["rated"] and options.learns_from == ANY:
        names = "dpo, orpo, simpo, cpo or kto" if len(complete) > 1 else "kto"
        reasons.append(f"rated answers are for objective.name={names}")
    views[-1].notes += reasons
    if data.summary["pairs"]:
        [views[0].pair] = data.summary["formats"]
    return views


def _views(data: TokenizedSet, where: str, tokenizer: Any, indices: Iterable[int]) -> list[View]:
    views, indices = [], list(indices)
    special = np.asarray(sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}))
    for part, index in enumerate(indices, start=1):
        begin, end = int(data.offsets[index]), int(data.offsets[index + 1])
        ids = np.asarray(data.tokens[begin:end])
        views.append(
            View(
                where + _part(data, index, f", part {part} of {len(indices)}" if len(indices) > 1 else ""),
                _texts(tokenizer, ids.tolist()),
                np.asarray(data.loss_mask[begin:end]),
                np.isin(ids, special),
                role=PLAIN if data.roles is None else int(data.roles[index]),
            )
        )
    return views


def _part(data: TokenizedSet, index: int, part: str) -> str:
    """Which part of its row an example is."""
    return part if data.roles is None else f", {ROLES.get(int(data.roles[index]), part)}"


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token as text, "" for all but the last of those that make one character together."""
    texts, before, read = [], 0, 0

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    for at in range(1, len(ids) + 1):
        # A token's text depends on the one before it (a blank at the beginning of a text may be swallowed).
        text = decode(ids[before:at])
        if text.endswith("\ufffd") and at < len(ids) and at - read < _LONGEST_CHARACTER:
            texts.append("")
            continue
        new = text[len(decode(ids[before:read])) :]
        texts.append(new if new or ids[at - 1] < len(tokenizer) else f"<id {ids[at - 1]}>")
        before, read = read, at
    return texts


def show(view: View, color: bool) -> str:
    """The example as text for a terminal, or with `[[` and `]]` around what is trained on."""
    trained = int(view.trained.sum())
    head = f"{view.where}: {len(view.texts)} tokens, {trained} trained on, {len(view.texts) - trained} only read"
    if view.cut:
        head += f", {view.cut} cut off"
    parts = [f"{_BOLD}{head}{_RESET}" if color else f"== {head}", *(f"   ({note})" for note in view.notes)]
    kinds = zip(view.trained.tolist(), view.special.tolist(), strict=True)
    if not color:
        kinds = ((is_trained, False) for is_trained, _ in kinds)
    tokens = zip(kinds, view.texts, strict=True)
    body = []
    for (is_trained, is_special), run in itertools.groupby(tokens, key=lambda token: token[0]):
        text = _visible("".join(text for _, text in run))
        if color:
            trained_color = _RED if view.role == REJECTED else _GREEN
            body.append(f"{trained_color if is_trained else _DIM}{_REVERSE if is_special else ''}{text}{_RESET}")
        else:
            body.append(f"[[{text}]]" if is_trained else text)
    parts.append("".join(body))
    if view.cut_text:
        shown = _visible(view.cut_text[:500]) + ("..." if len(view.cut_text) > 500 else "")
        parts.append(f"{_STRUCK}{shown}{_RESET}" if color else f"-- cut off: {shown}")
    return "\n".join(parts)


def _visible(text: str) -> str:
    """Line breaks with a sign before them, and what a terminal would obey or not show at all by its number."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return "\u21b5\n"
    kind = unicodedata.category(character)
    if kind == "Cc" and character != "\t":
        return f"\\x{ord(character):02x}"
    if kind == "Cf" and character not in "\u200c\u200d":  # those two join letters, and emoji
        return f"\\u{ord(character):04x}"
    return character

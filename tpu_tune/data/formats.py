"""Row formats: their detection, and the conversion of a row to text, a pair or a chat.

A row's format is recognised by its keys, so that a file may hold rows of several. `data.format` names one outright, and
`data.columns` renames a file's own keys first (`{"question": "input", "answer": "output"}`). With `-as-chat` behind the
name, prompt and answer become turns of a chat.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tpu_tune.checkpoints.prompts import ALPACA_TURN, ALPACA_TURN_WITH_INPUT, ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from tpu_tune.data import preferences
from tpu_tune.data.messages import RowError, holds_something, is_nan
from tpu_tune.data.samples import Chat, Pair, Rated, Text, alpaca, alpaca_chat, chat, conversational_pair, string_of
from tpu_tune.errors import UserError

# Name -> keys that a row must have. The order is that of detection: a row of the Stanford set also carries `text`.
FORMATS: dict[str, tuple[str, ...]] = {
    **preferences.FORMATS,
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "prompt-generation": ("prompt", "generation"),
    "input-output": ("input", "output"),
    "text": ("text",),
}
AS_CHAT = "-as-chat"  # behind a format's name: prompt and answer are turns of a chat, and go through its template
PAIRS = ("alpaca", "prompt-completion", "prompt-generation", "input-output")
RATED = tuple(preferences.FORMATS)
_TURNS = (*PAIRS, *RATED)  # whose prompt and answer may become turns
_BARE = sorted(FORMATS, key=RATED.__contains__)  # plain formats first
NAMES = ("auto", *_BARE, f"auto{AS_CHAT}", *(name + AS_CHAT for name in _TURNS))  # what `data.format` may be

STANFORD_ALPACA_WITH_INPUT = ALPACA_WITH_INPUT + ALPACA_TURN_WITH_INPUT
STANFORD_ALPACA_WITHOUT_INPUT = ALPACA_WITHOUT_INPUT + ALPACA_TURN

# In what is said of a row that is good, and read in another format: nobody is to be told to skip it.
ANOTHER_READS = "another format reads it"

# Keys of rows that other trainers put into the text, or a template does. Where they are not used, it is said aloud.
_MEANINGFUL = (
    "system", "system_prompt", "history", "context", "input", "tools", "functions", "documents", "chat_template_kwargs",
    "chat_template", "image", "images", "audio", "audios", "video", "videos", "thinking", "reasoning",
    "reasoning_content",
)  # fmt: skip
# Of them, those that a format does use; what is said of chats holds for pairs that become one.
_OF_CHATS = ("system", "tools", "documents", "chat_template_kwargs")
USED = {
    **preferences.USED,
    "alpaca": ("input", "system", "history"),
    "messages": _OF_CHATS,
    "sharegpt": _OF_CHATS,
}

_SURROGATE = re.compile("[\ud800-\udfff]")

Sample = Text | Pair | Chat | Rated


def own_format(row: Mapping[str, Any]) -> str:
    """Name the format of a row by its keys alone, or return "".

    Tables of several kinds give each row the keys of all, most of them empty: a format counts whose keys are filled, or
    that reads all that is. Where one holds a part of what it needs, and no other reads that part, the row is of that
    format, and broken.
    """
    there = [name for name, keys in FORMATS.items() if all(key in row for key in keys)]
    if len(there) < 2:
        return there[0] if there else ""
    filled = {key for name in there for key in FORMATS[name] if holds_something(row[key])}
    for number, name in enumerate(there):
        keys = set(FORMATS[name])
        if not keys & filled or any(row[key] is None or is_nan(row[key]) for key in keys):
            continue
        if keys <= filled or filled <= {*keys, *USED.get(name, ())}:
            return next((broken for broken in there[:number] if filled & set(FORMATS[broken]) - keys), name)
    return next((name for name in there if filled & set(FORMATS[name])), there[0])


def columns_of(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> Mapping[str, str]:
    """The renaming that a row takes: none where it has none of the names, and is of a known format without."""
    columns = columns or {}
    return {} if columns and not any(key in row for key in columns) and own_format(row) else columns


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Apply `data.columns` (the file's key -> the format's key) to one row; see `columns_of`.

    Raises:
      RowError: the row lacks one of the keys.
    """
    columns = columns_of(row, columns)
    if not columns:
        return row
    missing = [key for key in columns if key not in row]
    if missing:
        raise RowError(f"data.columns names '{missing[0]}' but the row has only: {', '.join(map(str, row))}")
    kept = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return {**kept, **{new: row[old] for old, new in columns.items()}}


def check_renamed(path: str, columns: Mapping[str, str], renamed: int, rows: int) -> None:
    """Refuse names of columns that no row of a set has.

    Args:
      renamed: how many of its `rows` have them.

    Raises:
      UserError: none has.
    """
    if columns and rows and not renamed:
        raise UserError(f"{path}: data.columns names '{next(iter(columns))}', which no row has")


def format_of(
    row: Mapping[str, Any], format: str = "auto", columns: Mapping[str, str] | None = None, usual: str = ""
) -> str:
    """Name the format that a row is read in: where `format` is auto its own, else that one.

    Args:
      format: one of `NAMES`.
      usual: the format of the rows before it, to say what this one lacks.

    Returns:
      A key of `FORMATS`, with `AS_CHAT` behind it where prompt and answer become turns.

    Raises:
      RowError: no known format has the row's keys.
    """
    if bare(format) != "auto":
        return format
    row = rename(row, columns or {})
    if found := own_format(row):
        return found + AS_CHAT if format.endswith(AS_CHAT) and found in _TURNS else found
    near = [name for name in _BARE if name not in RATED[1:]]  # a prompt or a label alone says little
    near.sort(key=lambda name: name != "preference" or not any(key in row for key in FORMATS[name]))
    names = [name for name in (bare(usual), *near) if name and any(key in row for key in FORMATS[name])]
    if names or usual:
        raise RowError(_lacks(row, (names or [bare(usual)])[0]) + "; data.columns can rename keys")
    known = "; ".join(f"{name} ({', '.join(FORMATS[name])})" for name in _BARE)
    raise RowError(
        f"the format of the data is not known from its keys: {', '.join(map(str, row)) or 'none'}; "
        f"known formats: {known}; data.columns can rename keys"
    )


def bare(format: str) -> str:
    """The name of a format without `AS_CHAT`."""
    return format.removesuffix(AS_CHAT)


def _lacks(row: Mapping[str, Any], format: str) -> str:
    missing = next(key for key in FORMATS[format] if key not in row)
    return f"no '{missing}', which the format '{format}' needs; its keys: {', '.join(map(str, row))}"


def check_name(format: str) -> None:
    """Refuse what is no name of a format.

    Raises:
      UserError: it is none.
    """
    if format not in NAMES:
        raise UserError(f"data.format '{format}' is unknown; known: {', '.join(NAMES)}")


def detect(row: Mapping[str, Any], format: str = "auto", columns: Mapping[str, str] | None = None) -> str:
    """Name the format of a file's first row; the rows after it may be of others.

    Raises:
      UserError: no known format has these keys, or the named format's keys are missing.
    """
    check_name(format)
    try:
        found, keys = format_of(row, format, columns), rename(row, columns or {})
    except RowError as error:
        raise UserError(str(error)) from error
    missing = [key for key in FORMATS[bare(found)] if key not in keys]
    if missing:
        other = own_format(keys)
        way_out = f"{ANOTHER_READS} ({other}): leave data.format at auto" if other else "data.columns can rename them"
        raise UserError(
            f"data.format is '{format}' but the first row has no '{missing[0]}'; "
            f"its keys: {', '.join(map(str, keys))} ({way_out})"
        )
    return found


def in_words(formats: Mapping[str, int]) -> str:
    """The formats of a set, the most frequent first, with their rows where there are several."""
    if len(formats) < 2:
        return "".join(formats)
    return ", ".join(f"{name} {count:,}" for name, count in sorted(formats.items(), key=lambda item: -item[1]))


def convert(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None = None) -> Sample:
    """Turn a row of a known format into text, a pair or a chat.

    Args:
      format: as `format_of` gives it.

    Raises:
      RowError: a key is missing or holds something else than the format says, or a text holds half of a surrogate
        pair, which no tokenizer takes.
    """
    sample = _sample(row, format, columns)
    check_characters([getattr(sample, field.name) for field in dataclasses.fields(sample)])
    return sample


def check_keys(row: Mapping[str, Any], format: str) -> None:
    """Refuse a row, its columns renamed, that lacks a key of the format.

    Raises:
      RowError: it does; says so where another format reads it.
    """
    if all(key in row for key in FORMATS[format]):
        return
    other = own_format(row)
    raise RowError(_lacks(row, format) + (f"; {ANOTHER_READS} ({other}): leave the format at auto" if other else ""))


def check_characters(value: Any) -> None:
    """Refuse half of a surrogate pair in any text of a value.

    Raises:
      RowError: there is one.
    """
    if half := _half_surrogate(value):
        raise RowError(f"half of a surrogate pair (\\u{ord(half):04x}) is no character; `tpu-tune data clean` mends it")


def _half_surrogate(value: Any) -> str:
    """The first half of a surrogate pair in any text of a value, "" where there is none."""
    if isinstance(value, str):
        found = None if value.isascii() else _SURROGATE.search(value)
        return found[0] if found else ""
    if isinstance(value, Mapping):
        value = (*value.keys(), *value.values())
    return next(filter(None, map(_half_surrogate, value)), "") if isinstance(value, list | tuple) else ""


def _sample(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None) -> Sample:
    row = rename(row, columns or {})
    if any(map(is_nan, row.values())):  # what pandas writes into an empty cell
        row = {key: None if is_nan(value) else value for key, value in row.items()}
    as_chat, format = format.endswith(AS_CHAT), bare(format)
    check_keys(row, format)
    if format in RATED:
        return preferences.rated(row, format, as_chat)
    if format == "text":
        return Text(string_of(row, "text"))
    if format == "alpaca":
        return alpaca_chat(row) if as_chat else alpaca(row)
    if format in ("messages", "sharegpt"):
        return chat(row, FORMATS[format][0], strict=format == "sharegpt")
    source, target = FORMATS[format]
    if isinstance(row[source], Sequence) and not isinstance(row[source], str):
        return conversational_pair(row, source, target)
    pair = Pair(string_of(row, source), string_of(row, target))
    if not as_chat:
        return pair
    turn = [{"role": "user", "content": pair.source}]
    return conversational_pair({**row, source: turn, target: pair.target}, source, target)


def unused_keys(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None = None) -> list[str]:
    """Keys of a row that hold something which would change the text, and that its format does not use.

    Args:
      row, format, columns: as `convert` takes them; `convert` has accepted the row.
    """
    row, as_chat, format = rename(row, columns or {}), format.endswith(AS_CHAT), bare(format)
    if format == "text":
        return []  # the text is complete; what it was made of may stand beside it
    if format in RATED:
        used = preferences.used_keys(row, format, as_chat)
        return [key for key in _MEANINGFUL if key not in used and holds_something(row.get(key))]
    required = FORMATS[format]
    used = {*required, *USED.get(format, ())}
    if (as_chat and format != "alpaca") or isinstance(row[required[0]], list | tuple):
        used.update(_OF_CHATS)
    return [key for key in _MEANINGFUL if key not in used and holds_something(row.get(key))]

"""From a table's columns, or an object's keys, to `text`, `input` and `output`, or `messages`."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tpu_tune.data.formats import FORMATS, RowError, convert, own_format
from tpu_tune.data.ingest.blobs import Tally, row_of
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.preferences import USED
from tpu_tune.errors import UserError

# Further keys that belong to a format, and travel with it.
_FOR_CHATS = ("system", "tools", "documents", "chat_template_kwargs")
_ALSO = {
    "alpaca": ("input", "system", "history"),
    "messages": _FOR_CHATS,
    "sharegpt": _FOR_CHATS,
    "prompt-completion": _FOR_CHATS,
    "prompt-generation": _FOR_CHATS,
    **USED,
}
MAX_DEPTH = 100  # of lists and objects in a row
Pick = Callable[[Mapping[str, Any]], dict[str, Any] | None]


def picker(columns: Sequence[str], options: IngestOptions, where: str, objects: bool = False) -> Pick:
    """Return the function that turns one row of these columns into an output row (without `source`).

    The columns are those that `options` names; else those of each row's own format, or the only one there is. The
    function returns None for a row whose picked columns are NULL, and raises `RowError` for one without text there.

    Args:
      objects: whether they are the keys of an object: one of a known format need not have the columns that are named,
        which are a table's.

    Raises:
      UserError: a named column is missing, or none is named and the text column is not obvious; lists the columns.
    """
    pick = _picker(columns, options, where, objects)
    return (lambda row: _stripped(pick(row))) if options.strip_html else pick


def _picker(columns: Sequence[str], options: IngestOptions, where: str, objects: bool) -> Pick:
    named = [(options.column, "text"), (options.input_column, "input"), (options.output_column, "output")]
    main = tuple((old, new) for old, new in named if old)
    if bool(options.input_column) != bool(options.output_column):
        raise UserError("--input-column and --output-column belong together; name both")
    format = format_of(columns)
    missing = [old for old, _ in (*main, *options.columns) if old not in columns]
    if missing and not (objects and format):
        raise UserError(f"{where}: there is no column '{missing[0]}'; there is: {_listed(columns)}")
    if main and not {old for old, _ in main} & set(missing):
        return lambda row: _named(row, main, options.columns)
    if {new for old, new in options.columns if old in columns} & {"text", "input", "output", "messages"}:
        return lambda row: _named(row, (), options.columns)
    if format:
        return lambda row: _known(row, own_format(row) or format, options)
    if len(columns) == 1:
        return lambda row: _named(row, ((columns[0], "text"),), ())
    if options.columns:
        return lambda row: _named(row, (), options.columns)
    raise UserError(
        f"{where}: which column holds the text? give --column NAME, or --input-column A --output-column B; "
        f"there is: {_listed(columns)}"
    )


def format_of(columns: Collection[str]) -> str:
    """The known format of a row, or that has these columns; "" where none is."""
    return own_format(columns if isinstance(columns, Mapping) else dict.fromkeys(columns))


def note_columns(columns: Iterable[str], options: IngestOptions, tally: Tally) -> None:
    """Record which of the columns that `options` names are there."""
    names = (options.column, options.input_column, options.output_column, *(old for old, _ in options.columns))
    tally.met.update(f"column {name}" for name in names if name and name in columns)


def picked(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    options: IngestOptions,
    tally: Tally,
    name: str,
    columns: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield the output row of each row, with its `source`.

    Args:
      rows: (file and line, the row).
      name: the file or table, for messages about its columns.
      columns: of all rows; without them rows are objects with keys of their own, each of the format that it has, and
        those of none are read as the first row is.

    Raises:
      UserError: as `picker`; or a bad row that is not allowed.
    """
    pick = picker(columns, options, name) if columns else _object_picker(options, name, tally)
    note_columns(columns, options, tally)
    for where, row in rows:
        try:
            found = pick(row)
        except RowError as error:
            tally.skipped.add(where, str(error))
            continue
        if found is None:
            tally.empty += 1
        else:
            yield row_of(where, **found)


def _object_picker(options: IngestOptions, name: str, tally: Tally) -> Pick:
    picks: dict[tuple[str, bool], Pick] = {}
    main = [old for old in (options.column, options.input_column, options.output_column) if old]
    named = [*main, *(old for old, _ in options.columns)]

    def pick(row: Mapping[str, Any]) -> dict[str, Any] | None:
        note_columns(row, options, tally)
        kind = format_of(row), all(old in row for old in main)
        if kind not in picks:
            for old in named:
                if old not in row:
                    said = f"{name}: there is no column '{old}'; there is: {_listed(list(row))}"
                    tally.lacking.setdefault(old, said)
            # Keys of no known format are a slip in a file of one that is known.
            is_other = picks and not kind[0] and not (main and kind[1])
            picks[kind] = next(iter(picks.values())) if is_other else picker(list(row), options, name, objects=True)
        return picks[kind](row)

    return pick


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(str(column)[:40] for column in list(columns)[:20])
    return (shown or "no column") + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


def _named(
    row: Mapping[str, Any], main: tuple[tuple[str, str], ...], kept: tuple[tuple[str, str], ...]
) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for old, new in main:
        if old not in row:
            raise RowError(f"no '{old}'; its keys: {_listed(list(row))}")
        if row[old] is None:
            return None
        found[new] = text_of(row[old], old)
    for old, new in kept:
        found[new] = plain(row.get(old), old)
    return found


def _known(row: Mapping[str, Any], format: str, options: IngestOptions) -> dict[str, Any] | None:
    """A row of a format that the trainer knows, as it is; chats become `messages`."""
    kept = {new: plain(row[old], old) for old, new in options.columns if old in row}
    if format in ("messages", "sharegpt") and not (format == "sharegpt" and options.keep_conversations):
        chat = convert(row, format)
        found: dict[str, Any] = {"messages": [plain(message, "messages") for message in chat.messages]}
        if chat.tools:
            found["tools"] = plain(list(chat.tools), "tools")
        if chat.documents:
            found["documents"] = plain(list(chat.documents), "documents")
        if chat.template_kwargs:
            found["chat_template_kwargs"] = plain(dict(chat.template_kwargs), "chat_template_kwargs")
        return {**found, **kept}
    if missing := [key for key in FORMATS[format] if key not in row]:
        raise RowError(f"no '{missing[0]}'; its keys: {_listed(list(row))}")
    keys = [*FORMATS[format], *(key for key in _ALSO.get(format, ()) if row.get(key) is not None)]
    keys = list(dict.fromkeys(keys))
    if all(row.get(key) is None for key in FORMATS[format]):
        return None
    if format in ("text", "input-output", "alpaca"):
        made = {key: plain(row[key], key) if key == "history" else text_of(row.get(key), key) for key in keys}
        return {**made, **kept}
    return {**{key: plain(row.get(key), key) for key in keys}, **kept}


def _stripped(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """A row whose texts are HTML, as plain text; None where nothing of what is trained on is left."""
    from tpu_tune.data.clean.texts import parts, replace
    from tpu_tune.data.ingest.html import stripped

    format = format_of(row or ())
    if not format:
        return row and {key: stripped(value) if isinstance(value, str) else value for key, value in row.items()}
    found = parts(row, format, {})
    changes = {part.path: new for part in found if (new := stripped(part.text)) != part.text}
    left = any(changes.get(part.path, part.text).strip() for part in found if part.answer)
    return replace(row, changes) if left or not changes else None


def text_of(value: Any, column: str) -> str:
    """Return a cell as text.

    Raises:
      RowError: it is nothing that has a text.
    """
    value = plain(value, column)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    kind = "nothing" if value is None else "a list" if isinstance(value, list) else "an object"
    raise RowError(f"column '{column}' holds {kind}, not text")


def plain(value: Any, column: str, depth: int = 0) -> Any:
    """Return a value that JSON can hold: bytes decoded, dates and decimals as text, NaN as null.

    Raises:
      RowError: bytes that are no text, a value nested too deeply, or one that JSON cannot hold.
    """
    if depth > MAX_DEPTH:
        raise RowError(f"column '{column}' is nested too deeply")
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise RowError(f"column '{column}' holds bytes that are not text") from None
    if isinstance(value, Mapping):
        return {str(key): plain(inner, column, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, column, depth + 1) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "tolist"):  # an array or a number of NumPy's
        return plain(value.tolist(), column, depth + 1)
    if hasattr(value, "as_tuple") or isinstance(value, datetime.timedelta):
        return str(value)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise RowError(f"column '{column}' holds a {type(value).__name__}, which is not text") from None

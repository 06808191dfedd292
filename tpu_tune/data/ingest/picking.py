"""From a table's columns, or an object's keys, to `text`, `input` and `output`, or `messages`."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tpu_tune.data.formats import FORMATS, RowError, convert, own_format
from tpu_tune.data.ingest.blobs import Tally, row_of
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.errors import UserError

# Further keys that belong to a format, and travel with it.
_FOR_CHATS = ("system", "tools", "documents", "chat_template_kwargs")
_ALSO = {
    "alpaca": ("input", "system", "history"),
    "messages": _FOR_CHATS,
    "sharegpt": _FOR_CHATS,
    "prompt-completion": _FOR_CHATS,
    "prompt-generation": _FOR_CHATS,
}
MAX_DEPTH = 100  # of lists and objects in a row
Pick = Callable[[Mapping[str, Any]], dict[str, Any] | None]


def picker(columns: Sequence[str], options: IngestOptions, where: str) -> Pick:
    """Return the function that turns one row of these columns into an output row (without `source`).

    The columns are those that `options` names; else those of each row's own format, or the only one there is. The
    function returns None for a row whose picked columns are NULL, and raises `RowError` for one without text there.

    Raises:
      UserError: a named column is missing, or none is named and the text column is not obvious; lists the columns.
    """
    named = [(options.column, "text"), (options.input_column, "input"), (options.output_column, "output")]
    main = tuple((old, new) for old, new in named if old)
    if bool(options.input_column) != bool(options.output_column):
        raise UserError("--input-column and --output-column belong together; name both")
    for name in [*(old for old, _ in main), *(old for old, _ in options.columns)]:
        if name not in columns:
            raise UserError(f"{where}: there is no column '{name}'; there is: {_listed(columns)}")
    if main:
        return lambda row: _named(row, main, options.columns)
    if options.columns and {new for _, new in options.columns} & {"text", "input", "output", "messages"}:
        return lambda row: _named(row, (), options.columns)
    format = own_format(dict.fromkeys(columns))
    only = ((columns[0], "text"),) if len(columns) == 1 else ()
    if format or only or options.columns:
        return lambda row: _by_its_keys(row, format, only, options)
    raise UserError(
        f"{where}: which column holds the text? give --column NAME, or --input-column A --output-column B; "
        f"there is: {_listed(columns)}"
    )


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
      columns: of all rows; where rows are objects with keys of their own, those of the first are taken.

    Raises:
      UserError: as `picker`; or a bad row that is not allowed.
    """
    pick = picker(columns, options, name) if columns else None
    for where, row in rows:
        if pick is None:
            pick = picker(list(row), options, name)
        try:
            found = pick(row)
        except RowError as error:
            tally.skipped.add(where, str(error))
            continue
        if found is None:
            tally.empty += 1
        else:
            yield row_of(where, **found)


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


def _by_its_keys(
    row: Mapping[str, Any], usual: str, only: tuple[tuple[str, str], ...], options: IngestOptions
) -> dict[str, Any] | None:
    """A row of a file that may hold several kinds: by its own format, or as the first row was."""
    if format := own_format(row) or usual:
        return _known(row, format, options)
    return _named(row, only, () if only else options.columns)


def _known(row: Mapping[str, Any], format: str, options: IngestOptions) -> dict[str, Any] | None:
    """A row of a format that the trainer knows, as it is; chats become `messages`."""
    kept = {new: plain(row.get(old), old) for old, new in options.columns}
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

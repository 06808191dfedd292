"""Rows of every format as `messages`, so that those of one file are alike: `--as messages` of ingest and clean.

Training reads the same of a row before and after, but that prompt and answer now go through the chat template (as with
`data.format=auto-as-chat`): what was context only is marked `weight: 0`. A text, which asks nothing, becomes the words
of the assistant alone. A preference row has its prompt and its answers as lists of messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.data.formats import AS_CHAT, FORMATS, PAIRS, RATED, USED, Rated, Text, convert, format_of, rename
from tpu_tune.data.tokenized_set import CHOSEN
from tpu_tune.errors import UserError

AS = ("", "messages")  # what `--as` may be; "": rows stay as they are


def check(name: str) -> None:
    """Refuse a format that rows cannot be written in.

    Raises:
      UserError: it is not one of `AS`.
    """
    if name not in AS:
        raise UserError(f"--as {name}: rows can be written as {', '.join(filter(None, AS))} only")


def as_messages(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a row with `messages` in place of what its format reads; its other keys stay.

    Args:
      format: the row's own, a key of `FORMATS`; one that has `messages` already stays as it is.
      columns: as `data.columns`; the new row has the format's own keys.

    Raises:
      RowError: the row is not what its format says.
    """
    row = rename(row, columns or {})
    if format == "messages":
        return dict(row)
    sample = convert(row, format + AS_CHAT if format in (*PAIRS, *RATED) else format)
    if isinstance(sample, Rated):
        return _rated_as_messages(row, format, sample)
    read = {*FORMATS[format], *USED.get(format, USED["messages"] if format in PAIRS else ())}
    rest = {key: value for key, value in row.items() if key not in read and key != "messages"}
    if isinstance(sample, Text):
        return {"messages": [{"role": "assistant", "content": sample.text}], **rest}
    messages = [
        {**message, "weight": 0} if message["role"] == "assistant" and not sample.is_target(number) else dict(message)
        for number, message in enumerate(sample.messages)
    ]
    more = {
        "tools": list(sample.tools),
        "documents": list(sample.documents),
        "chat_template_kwargs": dict(sample.template_kwargs),
    }
    return {"messages": messages, **{key: value for key, value in more.items() if value}, **rest}


def _rated_as_messages(row: Mapping[str, Any], format: str, sample: Rated) -> dict[str, Any]:
    """The prompt and each answer as lists of messages, under TRL's keys."""
    first = sample.answers[0]
    made: dict[str, Any] = {"prompt": list(first.messages[: first.first_target])}
    answers = [list(answer.messages[answer.first_target :]) for answer in sample.answers]
    if format == "preference":
        made |= dict(zip(("chosen", "rejected"), answers, strict=True))
    else:
        made |= {"completion": answers[0], "label": sample.roles == (CHOSEN,)}
    more = {
        "tools": list(first.tools),
        "documents": list(first.documents),
        "chat_template_kwargs": dict(first.template_kwargs),
    }
    rest = {key: value for key, value in row.items() if key not in {*FORMATS[format], *USED[format], *made}}
    return {**made, **{key: value for key, value in more.items() if value}, **rest}


def any_as_messages(row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return `as_messages` of a row, and the format that it had.

    Raises:
      RowError: it is of no known format, or not what its format says.
    """
    format = format_of(row)
    return as_messages(row, format), format

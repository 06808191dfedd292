"""The texts inside a row of any known format: finding them, putting others in their place, cutting an answer short.

What is trained on is an answer: the text of a plain row, the output of a pair, what the assistant says in a chat, the
chosen or the labelled answer of a preference row. Everything else (prompts, system and user messages, tool results, and
answers that the model is to be led away from) is context. Keys that the format does not name are
never looked at. Rows are never changed in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpu_tune.checkpoints import json_text
from tpu_tune.data.formats import FORMATS, RATED, USED, RowError, check_keys, columns_of, rename
from tpu_tune.data.messages import role_of

Path = tuple[str | int, ...]
CHATS = ("messages", "sharegpt")  # formats of which a row is a list of messages
_RATED_KEYS = (
    "system", "conversations", "messages", "instruction", "input", "prompt", "chosen", "rejected", "completion",
    "output", "label", "kto_tag", "tools",
)  # fmt: skip
_RATED_ANSWERS = ("chosen", "completion", "output", "conversations", "messages")
_NO_TEXT = ("tools", "label", "kto_tag")


@dataclass(frozen=True)
class Part:
    """One text of a row.

    Attributes:
      path: keys and indices that lead to it.
      text: the text.
      answer: whether it is trained on.
    """

    path: Path
    text: str
    answer: bool


def fields(row: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> dict[str, str]:
    """The keys that the format reads from a row -> the row's own name for them, in the order of the text.

    Raises:
      RowError: the row lacks one that it must have.
    """
    own = {new: old for old, new in columns_of(row, columns).items()}
    keys = list(FORMATS[format])
    if format in RATED:
        keys = [key for key in _RATED_KEYS if key in (*keys, *USED[format])]
    elif format == "alpaca":
        keys.insert(1, "input")
    elif format != "text":
        keys = ["system", *keys, "tools"]
    named = rename(row, columns)
    check_keys(named, format)
    return {key: own.get(key, key) for key in keys if named.get(key) is not None}


def parts(row: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> list[Part]:
    """The texts of a row, in their order.

    Raises:
      RowError: a key holds something that the format does not know.
    """
    found, required, chat, rated = [], FORMATS[format], format in CHATS, format in RATED
    names = fields(row, format, columns)
    for key in required:
        if key not in names:
            raise RowError(f"'{key}' is null")
    for key, name in names.items():
        if key in _NO_TEXT:
            continue
        value, answer = row[name], key in _RATED_ANSWERS if rated else key == required[-1]
        if rated:
            value, answer = _opened(value), answer and not (format == "preference" and key == "conversations")
            if isinstance(value, Mapping):  # LLaMA-Factory's one message
                found += [
                    Part((name, *part.path[2:]), part.text, answer) for part in _messages([value], name, False, True)
                ]
                continue
        if chat and key in required:
            value = _opened(value)
            if not isinstance(value, list | tuple):
                raise RowError(f"'{name}' must be a non-empty list of messages")
        if isinstance(value, list | tuple) and (rated or key in required):
            found += _messages(value, name, answer, strict=format == "sharegpt" or key == "conversations")
        elif isinstance(value, str):
            found.append(Part((name,), value, answer))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(Part((name,), str(value), answer))
        elif key in required:
            raise RowError(f"'{name}' must be text, not a {type(value).__name__}")
    return found


def _messages(messages: list[Any], name: str, answers: bool, strict: bool) -> list[Part]:
    found = []
    if not messages:
        raise RowError(f"'{name}' must be a non-empty list of messages")
    for index, message in enumerate(messages):
        where = f"'{name}' message {index + 1}"
        if not isinstance(message, Mapping):
            raise RowError(f"{where} is not an object")
        answer = answers and role_of(message, where, strict) == "assistant"
        key = "content" if "content" in message else "value"
        content = message.get(key)
        if isinstance(content, str):
            found.append(Part((name, index, key), content, answer))
        elif isinstance(content, list | tuple):
            for number, piece in enumerate(content):
                if isinstance(piece, Mapping) and isinstance(piece.get("text"), str):
                    found.append(Part((name, index, key, number, "text"), piece["text"], answer))
        elif content is not None or not message.get("tool_calls"):
            raise RowError(f"{where} has no text in 'content' (or 'value')")
    return found


def replace(row: Mapping[str, Any], changes: Mapping[Path, str]) -> dict[str, Any]:
    """A copy of the row with other texts at these paths; everything else is the row's own."""
    new = dict(row)
    for path, text in changes.items():
        name, *rest = path
        if rest:
            _set_messages(new, name, _with(_opened(new[name]), rest, text))
        else:
            new[name] = text
    return new


def cut(row: Mapping[str, Any], format: str, part: Part, length: int) -> dict[str, Any] | None:
    """Cut one text after `length` characters (and white space before), and what comes after it in a chat.

    Returns:
      The shorter row, or None where no answer is left.
    """
    text = part.text[:length].rstrip()
    name, *rest = part.path
    if not rest or isinstance(rest[0], str):
        return replace(row, {part.path: text}) if text else None
    new = dict(row)
    index, key, *piece = rest
    messages = list(_opened(row[name])[: index + 1])
    message = {key: value for key, value in messages[index].items() if key != "tool_calls"}
    if piece:
        before = list(message[key][: piece[0]])
        message[key] = [*before, {**message[key][piece[0]], "text": text}] if text else before
        text = text or "".join(one.get("text") or "" for one in before).strip()
    else:
        message[key] = text
    messages[index] = message
    if not text:  # a question without its answer goes as well
        del messages[index]
        while messages and role_of(messages[-1], name, strict=format == "sharegpt") != "assistant":
            messages.pop()
    if not messages:
        return None
    _set_messages(new, name, messages)
    return new


def visible(row: Mapping[str, Any], found: list[Part]) -> str:
    """All texts of a row, a line break between them, with the calls of tools, in the order in which they stand."""
    lines = [part.text for part in found]
    for name in dict.fromkeys(part.path[0] for part in found if len(part.path) > 1):
        for message in _opened(row[name]):
            if message.get("tool_calls"):
                lines.append(json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True, default=str))
    return "\n".join(lines)


def _opened(value: Any) -> Any:
    """Lists inside CSV are written as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            opened = json_text.loads(value)
        except json.JSONDecodeError:
            return value
        return opened
    return value


def _set_messages(row: dict[str, Any], name: str, messages: list[Any]) -> None:
    row[name] = json.dumps(messages, ensure_ascii=False) if isinstance(row[name], str) else messages


def _with(value: Any, path: Sequence[str | int], text: str) -> Any:
    if not path:
        return text
    new = list(value) if isinstance(value, list | tuple) else dict(value)
    new[path[0]] = _with(value[path[0]], path[1:], text)
    return new

"""The messages of a chat as rows hold them: roles, contents, marks, and what is null in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tpu_tune.checkpoints import json_text

# Keys of a message that say whether it is trained on: OpenAI's and Mistral's, and axolotl's. No template is shown them.
TRAINING_MARKS = ("weight", "train", "training")

# ShareGPT's tags and their relatives -> the roles that chat templates know.
_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "developer",
    "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "tool": "tool",
}  # fmt: skip


class RowError(ValueError):
    """One row cannot be used; the message says why and the caller adds where."""


def holds_something(value: Any) -> bool:
    """Whether a value is anything but null, NaN and what is empty."""
    return not (value is None or value == "" or value == [] or value == {} or is_nan(value))


def is_nan(value: Any) -> bool:
    """Whether a value is NaN, which pandas writes for null."""
    return isinstance(value, float) and math.isnan(value)


def is_context_only(message: Mapping[str, Any]) -> bool:
    """Whether a message is marked not to be trained on (`weight: 0`, `train: false`, `training: false`)."""
    return any(key in message and not message[key] for key in TRAINING_MARKS)


def from_json(text: str, key: str) -> Any:
    """Read JSON text.

    Args:
      key: where it stands, for the message.

    Raises:
      RowError: it is none.
    """
    try:
        return json_text.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"'{key}' is not valid JSON ({error.msg})") from error


def messages_of(value: Any, key: str, strict: bool) -> list[dict[str, Any]]:
    """Return messages with `role` and `content`, and their further keys that are not null.

    Args:
      value: a list of messages, or one as JSON text.
      key: where it stands, for messages.
      strict: see `role_of`.

    Raises:
      RowError: it is no list of messages.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # lists inside CSV are written as JSON
        try:
            value = json_text.loads(value)
        except json.JSONDecodeError:
            pass
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"'{key}' must be a non-empty list of messages")
    return [_message(message, f"'{key}' message {number}", strict) for number, message in enumerate(value, start=1)]


def role_of(message: Mapping[str, Any], where: str, strict: bool) -> str:
    """The role of a message as chat templates know it, from `role` or ShareGPT's `from`.

    Args:
      where: names the message in errors.
      strict: refuse roles that are not ShareGPT's. Outside ShareGPT only human and gpt are translated: a chat template
        may know roles of its own.

    Raises:
      RowError: there is no role, or none that is known.
    """
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise RowError(f"{where} has no 'role' (or 'from')")
    if strict and role.lower() not in _ROLES:
        raise RowError(f"{where} is from '{role}'; known: {', '.join(_ROLES)}")
    return _ROLES[role.lower()] if strict else {"human": "user", "gpt": "assistant"}.get(role.lower(), role)


def _message(message: Any, where: str, strict: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is not an object")
    role = role_of(message, where, strict)
    content = message.get("content", message.get("value"))
    rest = {
        key: without_nulls(value, keep=NULL_IS_A_VALUE)
        for key, value in message.items()
        if key not in ("role", "from", "content", "value") and value is not None
    }
    _check_marks(rest, where)
    if isinstance(rest.get("tool_calls"), str):  # as `tools`: JSON text in files of one schema
        rest["tool_calls"] = from_json(rest["tool_calls"] or "[]", "tool_calls")
    calls = rest.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"{where} has 'tool_calls' that are not a list of objects")
    if isinstance(content, list | tuple):
        content = _join_parts(content, where)
    if content is None and (calls or rest.get("function_call")):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where} has no text in 'content' (or 'value')")
    return {"role": role, "content": content, **rest}


# Keys under which a null of a JSON file is a value like any other: in what a function is called with, and a schema's
# values; and those of them that may be null themselves.
NULL_IS_A_VALUE = ("arguments", "default", "const", "enum", "examples")
_MAY_BE_NULL = ("default", "const")


def without_nulls(value: Any, keep: Sequence[str] = ()) -> Any:
    """Leave out the keys of objects, at any depth, whose value is null.

    Arrow and Parquet give all rows one struct: a key that a row has not comes back as null.

    Args:
      keep: keys whose values are left as they are.
    """
    if isinstance(value, Mapping):
        return {
            key: item if key in keep else without_nulls(item, keep)
            for key, item in value.items()
            if item is not None or (key in keep and key in _MAY_BE_NULL)
        }
    if isinstance(value, list | tuple):
        return [without_nulls(item, keep) for item in value]
    return value


def _check_marks(message: dict[str, Any], where: str) -> None:
    for key in TRAINING_MARKS:
        if key not in message:
            continue
        if is_nan(message[key]):  # pandas' null
            del message[key]
        elif isinstance(message[key], str | list | dict) or message[key] not in (0, 1):
            raise RowError(f"{where} has '{key}' {message[key]!r}; it must be 0 or 1 (false or true)")


def _join_parts(parts: Sequence[Any], where: str) -> str:
    for part in parts:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            raise RowError(f"{where} holds parts other than text")
    return "".join(part["text"] for part in parts)

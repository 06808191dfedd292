"""Row formats: their detection, and the conversion of a row to text, a pair or a chat.

A format is recognised by its keys. `data.format` names one outright, and `data.columns` renames a file's own keys
first (`{"question": "input", "answer": "output"}`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpu_tune.checkpoints import json_text
from tpu_tune.errors import UserError

# Name -> keys that a row must have. The order is that of detection: a row of the Stanford set also carries `text`.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "prompt-generation": ("prompt", "generation"),
    "input-output": ("input", "output"),
    "text": ("text",),
}

# Stanford Alpaca's own prompt. The variants that go about differ in what follows the last colon: nothing here, one
# space in qlora, a line break in axolotl and LLaMA-Factory.
STANFORD_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
STANFORD_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# ShareGPT's tags and their relatives -> the roles that chat templates know.
_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "developer",
    "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "tool": "tool",
}  # fmt: skip


_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """One row cannot be used; the message says why and the caller adds where."""


@dataclass(frozen=True)
class Text:
    """A document to model as it is."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and the answer to it, joined without a separator."""

    source: str
    target: str


@dataclass(frozen=True)
class Chat:
    """A conversation: messages with `role` and `content`, for the chat template.

    Assistant messages before `first_target` are context only (the prompt of a conversational prompt/completion row).
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    first_target: int = 0


Sample = Text | Pair | Chat


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Apply `data.columns` (the file's key -> the format's key) to one row.

    Raises:
      RowError: the row lacks one of the keys.
    """
    if not columns:
        return row
    missing = [key for key in columns if key not in row]
    if missing:
        raise RowError(f"data.columns names '{missing[0]}' but the row has only: {', '.join(map(str, row))}")
    kept = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return {**kept, **{new: row[old] for old, new in columns.items()}}


def detect(row: Mapping[str, Any], format: str = "auto", columns: Mapping[str, str] | None = None) -> str:
    """Name the format of a file from its first row.

    Raises:
      UserError: no known format has these keys, or the named format's keys are missing.
    """
    try:
        keys = rename(row, columns or {})
    except RowError as error:
        raise UserError(str(error)) from error
    if format != "auto":
        if format not in FORMATS:
            raise UserError(f"data.format '{format}' is unknown; known: {', '.join(FORMATS)}")
        missing = [key for key in FORMATS[format] if key not in keys]
        if missing:
            raise UserError(
                f"data.format is '{format}' but the first row has no '{missing[0]}'; "
                f"its keys: {', '.join(map(str, keys))} (data.columns can rename them)"
            )
        return format
    for name, required in FORMATS.items():
        if all(key in keys for key in required):
            return name
    known = "; ".join(f"{name} ({', '.join(required)})" for name, required in FORMATS.items())
    raise UserError(
        f"the format of the data is not known from its keys: {', '.join(map(str, keys)) or 'none'}; "
        f"known formats: {known}; data.columns can rename keys"
    )


def convert(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None = None) -> Sample:
    """Turn a row of a known format into text, a pair or a chat.

    Raises:
      RowError: a key is missing or holds something else than the format says, or a text holds half of a surrogate
        pair, which no tokenizer takes.
    """
    sample = _sample(row, format, columns)
    check_characters([getattr(sample, field.name) for field in dataclasses.fields(sample)])
    return sample


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


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _sample(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None) -> Sample:
    row = rename(row, columns or {})
    if any(map(_is_nan, row.values())):  # what pandas writes into an empty cell
        row = {key: None if _is_nan(value) else value for key, value in row.items()}
    missing = [key for key in FORMATS[format] if key not in row]
    if missing:
        raise RowError(f"no '{missing[0]}', which the format '{format}' needs; its keys: {', '.join(map(str, row))}")
    if format == "text":
        return Text(_string(row, "text"))
    if format == "alpaca":
        return _alpaca(row)
    if format in ("messages", "sharegpt"):
        return _chat(row, FORMATS[format][0], strict=format == "sharegpt")
    source, target = FORMATS[format]
    if isinstance(row[source], Sequence) and not isinstance(row[source], str):
        return _conversational_pair(row, source, target)
    return Pair(_string(row, source), _string(row, target))


def _alpaca(row: Mapping[str, Any]) -> Pair:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    extra = _string(row, "input") if row.get("input") else ""
    if extra.strip():
        return Pair(STANFORD_ALPACA_WITH_INPUT.format(instruction=instruction, input=extra), output)
    return Pair(STANFORD_ALPACA_WITHOUT_INPUT.format(instruction=instruction), output)


def _chat(row: Mapping[str, Any], key: str, strict: bool) -> Chat:
    messages = _messages(row[key], key, strict)
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Chat(tuple(messages), _tools(row))


def _conversational_pair(row: Mapping[str, Any], source: str, target: str) -> Chat:
    prompt = _messages(row[source], source, strict=False)
    answer = row[target]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return Chat((*prompt, *_messages(answer, target, strict=False)), _tools(row), first_target=len(prompt))


def _messages(value: Any, key: str, strict: bool) -> list[dict[str, Any]]:
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
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None}
    if isinstance(content, list | tuple):
        content = _join_parts(content, where)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where} has no text in 'content' (or 'value')")
    return {"role": role, "content": content, **rest}


def _join_parts(parts: Sequence[Any], where: str) -> str:
    for part in parts:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            raise RowError(f"{where} holds parts other than text")
    return "".join(part["text"] for part in parts)


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json_text.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(f"'tools' is not valid JSON ({error.msg})") from error
    return tuple(tools) if isinstance(tools, list | tuple) else ()


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"'{key}' must be a string, not {'null' if value is None else 'a ' + type(value).__name__}")
    return value

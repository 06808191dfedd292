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
from dataclasses import dataclass, field
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
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_TURN_WITH_INPUT = "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_TURN_WITHOUT_INPUT = "\n\n### Instruction:\n{instruction}\n\n### Response:"
STANFORD_ALPACA_WITH_INPUT = _WITH_INPUT + _TURN_WITH_INPUT
STANFORD_ALPACA_WITHOUT_INPUT = _WITHOUT_INPUT + _TURN_WITHOUT_INPUT

# Keys of a message that say whether it is trained on: OpenAI's and Mistral's, and axolotl's. No template is shown them.
TRAINING_MARKS = ("weight", "train", "training")

# Keys of rows that other trainers put into the text, or a template does. Where they are not used, it is said aloud.
_MEANINGFUL = (
    "system", "system_prompt", "history", "context", "input", "tools", "functions", "documents", "chat_template_kwargs",
    "chat_template", "image", "images", "audio", "audios", "video", "videos", "thinking", "reasoning",
    "reasoning_content",
)  # fmt: skip
_OF_CHATS = ("system", "tools", "documents", "chat_template_kwargs")
_USED = {"alpaca": ("input", "system", "history"), "messages": _OF_CHATS, "sharegpt": _OF_CHATS}

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

    Attributes:
      messages: with their keys that are not null, `TRAINING_MARKS` included.
      tools: descriptions of functions.
      first_target: assistant messages before it are context only (the prompt of a conversational prompt/completion
        row).
      template_kwargs: the row's own variables for the template (`enable_thinking`).
      documents: what an answer is based on, for templates that read them.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    first_target: int = 0
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[Any, ...] = ()

    def is_target(self, index: int) -> bool:
        """Whether a message is trained on: an assistant's, in the completion, and not marked as context only."""
        message = self.messages[index]
        return message["role"] == "assistant" and index >= self.first_target and not is_context_only(message)


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


def unused_keys(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None = None) -> list[str]:
    """Keys of a row that hold something which would change the text, and that its format does not use.

    Args:
      row, format, columns: as `convert` takes them; `convert` has accepted the row.
    """
    row = rename(row, columns or {})
    if format == "text":
        return []  # the text is complete; what it was made of may stand beside it
    required = FORMATS[format]
    used = {*required, *_USED.get(format, ())}
    if isinstance(row[required[0]], list | tuple):
        used.update(_OF_CHATS)
    return [key for key in _MEANINGFUL if key not in used and _holds_something(row.get(key))]


def _holds_something(value: Any) -> bool:
    return not (value is None or value == "" or value == [] or value == {} or _is_nan(value))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def is_context_only(message: Mapping[str, Any]) -> bool:
    """Whether a message is marked not to be trained on (`weight: 0`, `train: false`, `training: false`)."""
    return any(key in message and not message[key] for key in TRAINING_MARKS)


def _alpaca(row: Mapping[str, Any]) -> Pair:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    extra, system = (_string(row, key) if _holds_something(row.get(key)) else "" for key in ("input", "system"))
    with_input = bool(extra.strip())
    # A system prompt stands in the place of Stanford's sentence, as in axolotl; earlier turns stand before the last.
    start = system if system.strip() else _WITH_INPUT if with_input else _WITHOUT_INPUT
    turns = [_TURN_WITHOUT_INPUT.format(instruction=said) + answer for said, answer in _history(row.get("history"))]
    last = (_TURN_WITH_INPUT if with_input else _TURN_WITHOUT_INPUT).format(instruction=instruction, input=extra)
    return Pair("".join([start, *turns, last]), output)


def _history(value: Any) -> list[tuple[str, str]]:
    """Earlier turns as LLaMA-Factory writes them: [[instruction, answer], ...], inside CSV as JSON."""
    if not _holds_something(value):
        return []
    if isinstance(value, str):
        value = _from_json(value, "history")
    is_pairs = isinstance(value, list | tuple) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in value
    )
    if not is_pairs:
        raise RowError("'history' must be a list of [instruction, answer] pairs")
    return [(said, answer) for said, answer in value]


def _chat(row: Mapping[str, Any], key: str, strict: bool) -> Chat:
    return Chat(tuple(_with_system(_messages(row[key], key, strict), row)), _tools(row), **_for_template(row))


def _conversational_pair(row: Mapping[str, Any], source: str, target: str) -> Chat:
    prompt = _with_system(_messages(row[source], source, strict=False), row)
    answer = row[target]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    messages = (*prompt, *_messages(answer, target, strict=False))
    return Chat(messages, _tools(row), first_target=len(prompt), **_for_template(row))


def _with_system(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _for_template(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's variables and documents for the template, inside CSV as JSON."""
    found: dict[str, Any] = {}
    for key, name, kind in (("chat_template_kwargs", "template_kwargs", Mapping), ("documents", "documents", list)):
        value = row.get(key)
        if not _holds_something(value):
            continue
        if isinstance(value, str):
            value = _from_json(value, key)
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, Mapping) for item in value)):
            raise RowError(f"'{key}' must be {'an object' if kind is Mapping else 'a list of objects'}")
        found[name] = dict(value) if kind is Mapping else tuple(value)
    return found


def _from_json(text: str, key: str) -> Any:
    try:
        return json_text.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"'{key}' is not valid JSON ({error.msg})") from error


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
    rest = {
        key: without_nulls(value, keep=_NULL_IS_A_VALUE)
        for key, value in message.items()
        if key not in ("role", "from", "content", "value") and value is not None
    }
    _check_marks(rest, where)
    if isinstance(rest.get("tool_calls"), str):  # as `tools`: JSON text in files of one schema
        rest["tool_calls"] = _from_json(rest["tool_calls"] or "[]", "tool_calls")
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
_NULL_IS_A_VALUE = ("arguments", "default", "const", "enum", "examples")
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
        if _is_nan(message[key]):  # pandas' null
            del message[key]
        elif isinstance(message[key], str | list | dict) or message[key] not in (0, 1):
            raise RowError(f"{where} has '{key}' {message[key]!r}; it must be 0 or 1 (false or true)")


def _join_parts(parts: Sequence[Any], where: str) -> str:
    for part in parts:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            raise RowError(f"{where} holds parts other than text")
    return "".join(part["text"] for part in parts)


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "tools")
    if not isinstance(tools, list | tuple):
        return ()
    # A tool alone may be JSON text too: that is how a file of one schema holds tools of different shapes.
    tools = [_from_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    return tuple(without_nulls(tools, keep=_NULL_IS_A_VALUE))


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"'{key}' must be a string, not {'null' if value is None else 'a ' + type(value).__name__}")
    return value

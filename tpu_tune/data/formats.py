"""Row formats: their detection, and the conversion of a row to text, a pair or a chat.

A row's format is recognised by its keys, so that a file may hold rows of several. `data.format` names one outright, and
`data.columns` renames a file's own keys first (`{"question": "input", "answer": "output"}`). With `-as-chat` behind the
name, prompt and answer become turns of a chat.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpu_tune.checkpoints.prompts import ALPACA_TURN, ALPACA_TURN_WITH_INPUT, ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from tpu_tune.data.messages import (
    NULL_IS_A_VALUE,
    TRAINING_MARKS,
    RowError,
    from_json,
    holds_something,
    is_context_only,
    is_nan,
    messages_of,
    without_nulls,
)
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
AS_CHAT = "-as-chat"  # behind a format's name: prompt and answer are turns of a chat, and go through its template
PAIRS = ("alpaca", "prompt-completion", "prompt-generation", "input-output")
NAMES = ("auto", *FORMATS, f"auto{AS_CHAT}", *(name + AS_CHAT for name in PAIRS))  # what `data.format` may be

# In what is said of a row that is good, and read in another format: nobody is to be told to skip it.
ANOTHER_READS = "another format reads it"

STANFORD_ALPACA_WITH_INPUT = ALPACA_WITH_INPUT + ALPACA_TURN_WITH_INPUT
STANFORD_ALPACA_WITHOUT_INPUT = ALPACA_WITHOUT_INPUT + ALPACA_TURN

# Keys of rows that other trainers put into the text, or a template does. Where they are not used, it is said aloud.
_MEANINGFUL = (
    "system", "system_prompt", "history", "context", "input", "tools", "functions", "documents", "chat_template_kwargs",
    "chat_template", "image", "images", "audio", "audios", "video", "videos", "thinking", "reasoning",
    "reasoning_content",
)  # fmt: skip
# Of them, those that a format does use; what is said of chats holds for pairs that become one.
_OF_CHATS = ("system", "tools", "documents", "chat_template_kwargs")
USED = {"alpaca": ("input", "system", "history"), "messages": _OF_CHATS, "sharegpt": _OF_CHATS}

_SURROGATE = re.compile("[\ud800-\udfff]")


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

    @property
    def says_nothing(self) -> bool:
        """Whether every answer to be trained on is empty, so that only its end could be learnt: to say nothing."""
        answers = [message for index, message in enumerate(self.messages) if self.is_target(index)]
        aside = ("role", "name", *TRAINING_MARKS)
        return bool(answers) and not any(
            holds_something(value) for message in answers for key, value in message.items() if key not in aside
        )


Sample = Text | Pair | Chat


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
        return found + AS_CHAT if format.endswith(AS_CHAT) and found in PAIRS else found
    names = [name for name in (bare(usual), *FORMATS) if name and any(key in row for key in FORMATS[name])]
    if names or usual:
        raise RowError(_lacks(row, (names or [bare(usual)])[0]) + "; data.columns can rename keys")
    known = "; ".join(f"{name} ({', '.join(required)})" for name, required in FORMATS.items())
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
    if format == "text":
        return Text(_string(row, "text"))
    if format == "alpaca":
        return _alpaca_chat(row) if as_chat else _alpaca(row)
    if format in ("messages", "sharegpt"):
        return _chat(row, FORMATS[format][0], strict=format == "sharegpt")
    source, target = FORMATS[format]
    if isinstance(row[source], Sequence) and not isinstance(row[source], str):
        return _conversational_pair(row, source, target)
    pair = Pair(_string(row, source), _string(row, target))
    if not as_chat:
        return pair
    turn = [{"role": "user", "content": pair.source}]
    return _conversational_pair({**row, source: turn, target: pair.target}, source, target)


def unused_keys(row: Mapping[str, Any], format: str, columns: Mapping[str, str] | None = None) -> list[str]:
    """Keys of a row that hold something which would change the text, and that its format does not use.

    Args:
      row, format, columns: as `convert` takes them; `convert` has accepted the row.
    """
    row, as_chat, format = rename(row, columns or {}), format.endswith(AS_CHAT), bare(format)
    if format == "text":
        return []  # the text is complete; what it was made of may stand beside it
    required = FORMATS[format]
    used = {*required, *USED.get(format, ())}
    if (as_chat and format != "alpaca") or isinstance(row[required[0]], list | tuple):
        used.update(_OF_CHATS)
    return [key for key in _MEANINGFUL if key not in used and holds_something(row.get(key))]


def _alpaca(row: Mapping[str, Any]) -> Pair:
    instruction, output, extra, system = _alpaca_texts(row)
    with_input = bool(extra.strip())
    # A system prompt stands in the place of Stanford's sentence, as in axolotl; earlier turns stand before the last.
    start = system if system.strip() else ALPACA_WITH_INPUT if with_input else ALPACA_WITHOUT_INPUT
    turns = [ALPACA_TURN.format(instruction=said) + answer for said, answer in _history(row.get("history"))]
    last = (ALPACA_TURN_WITH_INPUT if with_input else ALPACA_TURN).format(instruction=instruction, input=extra)
    return Pair("".join([start, *turns, last]), output)


def _alpaca_texts(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    extra, system = (_string(row, key) if holds_something(row.get(key)) else "" for key in ("input", "system"))
    return _string(row, "instruction"), _string(row, "output"), extra, system


def _alpaca_chat(row: Mapping[str, Any]) -> Chat:
    """The row as turns, its input in the line after the instruction, as LLaMA-Factory has it."""
    instruction, output, extra, system = _alpaca_texts(row)
    turns = [*_history(row.get("history")), (f"{instruction}\n{extra}" if extra.strip() else instruction, output)]
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for said, answer in turns:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return Chat(tuple(messages), first_target=len(messages) - 1)


def _history(value: Any) -> list[tuple[str, str]]:
    """Earlier turns as LLaMA-Factory writes them: [[instruction, answer], ...], inside CSV as JSON."""
    if not holds_something(value):
        return []
    if isinstance(value, str):
        value = from_json(value, "history")
    is_pairs = isinstance(value, list | tuple) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in value
    )
    if not is_pairs:
        raise RowError("'history' must be a list of [instruction, answer] pairs")
    return [(said, answer) for said, answer in value]


def _chat(row: Mapping[str, Any], key: str, strict: bool) -> Chat:
    return Chat(tuple(_with_system(messages_of(row[key], key, strict), row)), _tools(row), **_for_template(row))


def _conversational_pair(row: Mapping[str, Any], source: str, target: str) -> Chat:
    prompt = _with_system(messages_of(row[source], source, strict=False), row)
    answer = row[target]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    messages = (*prompt, *messages_of(answer, target, strict=False))
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
        if not holds_something(value):
            continue
        if isinstance(value, str):
            value = from_json(value, key)
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, Mapping) for item in value)):
            raise RowError(f"'{key}' must be {'an object' if kind is Mapping else 'a list of objects'}")
        found[name] = dict(value) if kind is Mapping else tuple(value)
    return found


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = from_json(tools, "tools")
    if not isinstance(tools, list | tuple):
        return ()
    # A tool alone may be JSON text too: that is how a file of one schema holds tools of different shapes.
    tools = [from_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    return tuple(without_nulls(tools, keep=NULL_IS_A_VALUE))


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"'{key}' must be a string, not {'null' if value is None else 'a ' + type(value).__name__}")
    return value

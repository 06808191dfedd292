"""What a row becomes: a text, a pair, a chat, or answers that are rated; and the conversion of plain rows' values."""

from __future__ import annotations

from collections.abc import Mapping
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
    messages_of,
    without_nulls,
)


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


@dataclass(frozen=True)
class Rated:
    """Answers to one prompt that somebody has rated: a chosen and a rejected one, or a single one.

    Attributes:
      answers: a pair, or a chat whose `first_target` is where the answer begins, for each.
      roles: of each, `tokenized_set.CHOSEN` (better, or desirable) or `REJECTED`.
    """

    answers: tuple[Pair | Chat, ...]
    roles: tuple[int, ...]


def alpaca(row: Mapping[str, Any]) -> Pair:
    instruction, output, extra, system = _alpaca_texts(row)
    with_input = bool(extra.strip())
    # A system prompt stands in the place of Stanford's sentence, as in axolotl; earlier turns stand before the last.
    start = system if system.strip() else ALPACA_WITH_INPUT if with_input else ALPACA_WITHOUT_INPUT
    turns = [ALPACA_TURN.format(instruction=said) + answer for said, answer in _history(row.get("history"))]
    last = (ALPACA_TURN_WITH_INPUT if with_input else ALPACA_TURN).format(instruction=instruction, input=extra)
    return Pair("".join([start, *turns, last]), output)


def _alpaca_texts(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    extra, system = (string_of(row, key) if holds_something(row.get(key)) else "" for key in ("input", "system"))
    return string_of(row, "instruction"), string_of(row, "output"), extra, system


def alpaca_chat(row: Mapping[str, Any]) -> Chat:
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


def chat(row: Mapping[str, Any], key: str, strict: bool) -> Chat:
    return Chat(tuple(with_system(messages_of(row[key], key, strict), row)), tools_of(row), **for_template(row))


def conversational_pair(row: Mapping[str, Any], source: str, target: str) -> Chat:
    prompt = with_system(messages_of(row[source], source, strict=False), row)
    answer = row[target]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    messages = (*prompt, *messages_of(answer, target, strict=False))
    return Chat(messages, tools_of(row), first_target=len(prompt), **for_template(row))


def with_system(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def for_template(row: Mapping[str, Any]) -> dict[str, Any]:
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


def tools_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = from_json(tools, "tools")
    if not isinstance(tools, list | tuple):
        return ()
    # A tool alone may be JSON text too: that is how a file of one schema holds tools of different shapes.
    tools = [from_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    return tuple(without_nulls(tools, keep=NULL_IS_A_VALUE))


def string_of(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"'{key}' must be a string, not {'null' if value is None else 'a ' + type(value).__name__}")
    return value

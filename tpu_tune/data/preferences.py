"""Rows of rated answers: `chosen` and `rejected` ones to a prompt, or single ones with a `label`.

The prompt stands under `prompt`, under `conversations` or `instruction` (LLaMA-Factory's forms), or nowhere: then it is
what both answers begin with, as in TRL. Anthropic's texts of "Human:" and "Assistant:" are cut at the last
"Assistant:" that both have, so that words which two answers begin with stay in the answers.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from tpu_tune.data.messages import TRAINING_MARKS, RowError, holds_something, messages_of
from tpu_tune.data.samples import (
    Chat,
    Pair,
    Rated,
    alpaca,
    alpaca_chat,
    chat,
    conversational_pair,
    for_template,
    string_of,
    tools_of,
    with_system,
)
from tpu_tune.data.tokenized_set import CHOSEN, REJECTED
from tpu_tune.errors import UserError

# Name -> keys that a row must have, as in `formats.FORMATS`. `kto_tag` is LLaMA-Factory's name of the label.
FORMATS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "prompt-completion-label": ("prompt", "completion", "label"),
    "kto-tag": ("kto_tag",),
}
_OF_CHATS = ("system", "tools", "documents", "chat_template_kwargs")
_PROMPTS = ("conversations", "instruction", "prompt")  # where a row's prompt may stand, in the order of looking
USED = {
    "preference": (*_PROMPTS, "input", "history", *_OF_CHATS),
    "prompt-completion-label": _OF_CHATS,
    "kto-tag": ("messages", *_PROMPTS, "completion", "output", "input", "history", *_OF_CHATS),
}

# What an objective learns from: rows as they are, two answers to a prompt, or single answers with a label.
ROWS, PAIRED, SINGLE, ANY = "rows", "pairs", "answers", "any"
_LEARNS_FROM = {"dpo": PAIRED, "orpo": PAIRED, "simpo": PAIRED, "cpo": PAIRED, "kto": SINGLE, "reward": PAIRED, "": ANY}

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def learns_from(objective: str) -> str:
    """What rows an objective (`objective.name`) learns from: `ROWS`, `PAIRED` or `SINGLE`; of "": `ANY`."""
    return _LEARNS_FROM.get(objective, ROWS)


def rated(row: Mapping[str, Any], format: str, as_chat: bool) -> Rated:
    """Turn a row into its rated answers.

    Args:
      row: its columns renamed, null in place of NaN.
      format: a key of `FORMATS`, all of whose keys it has.
      as_chat: make prompt and answer turns of a chat where they are text.

    Raises:
      RowError: what the row holds is no rated answer: no prompt, an empty answer, two equal ones, a label that is
        neither true nor false, or messages that do not end with the assistant's.
    """
    if format == "preference":
        answers = _two_answers(row, as_chat)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            _check_answer(name, answer)
        if _said(answers[0]) == _said(answers[1]):
            raise RowError(EQUAL)
        return Rated(answers, (CHOSEN, REJECTED))
    key = FORMATS[format][-1]
    answer = _one_answer(row, as_chat) if format == "kto-tag" else _prompt_completion(row, as_chat)
    _check_answer("completion" if format == "prompt-completion-label" else "the answer", answer)
    return Rated((answer,), (CHOSEN if _label(row[key], key) else REJECTED,))


LONG_PAIR = "the two answers with their prompts are longer than max_length together"
EQUAL = "'chosen' and 'rejected' are equal: there is nothing to prefer"


def texts_of(sample: Rated) -> list[str]:
    """What rated answers say: the prompt, in a chat each of its messages but the system's, and then each answer."""
    if isinstance(sample.answers[0], Pair):
        return [sample.answers[0].source, *(answer.target for answer in sample.answers)]
    first = sample.answers[0]
    messages = [*first.messages[: first.first_target]]
    messages += [message for answer in sample.answers for message in answer.messages[answer.first_target :]]
    return [message["content"] for message in messages if message["role"] != "system"]


def used_keys(row: Mapping[str, Any], format: str, as_chat: bool) -> set[str]:
    """Keys of a row that its answers are made of; `rated` has accepted the row."""
    sample = rated(row, format, as_chat)
    used = {*FORMATS[format], *USED[format]}
    if isinstance(sample.answers[0], Pair) and not holds_something(row.get("instruction")):
        used -= {*_OF_CHATS, "input", "history"}
    return used


def in_config(objective: str) -> str:
    """What a configuration says to have an objective: its name, or that of the head it belongs to."""
    return f"{'head' if objective in ('classification', 'reward') else 'objective'}.name={objective}"


def check_use(objective: str, format: str, row: Mapping[str, Any]) -> None:
    """Refuse a row that an objective does not learn from.

    Args:
      format: the row's, without `-as-chat`; one of `FORMATS` or a plain one.

    Raises:
      UserError: it is of the other kind; says what to set.
      RowError: only its label is missing.
    """
    wanted = learns_from(objective)
    if wanted == ANY or (wanted == ROWS) == (format not in FORMATS):
        if wanted == PAIRED and format != "preference":
            raise UserError(
                f"{in_config(objective)} learns from two answers to a prompt (chosen, rejected), and this is a "
                f"single one with a label ({format}); set objective.name=kto"
            )
        return
    if wanted == ROWS:
        names = "kto" if format != "preference" else "dpo, orpo, simpo or cpo, or kto for each answer by itself"
        raise UserError(
            f"these answers are rated ({format}), which {in_config(objective)} does not heed; set "
            f"objective.name={names}{_plain_reading(row)}"
        )
    if wanted == SINGLE and format == "prompt-completion":
        _label(None, "label")
    needs = "chosen and rejected" if wanted == PAIRED else "completion and label, or chosen and rejected"
    raise UserError(
        f"{in_config(objective)} learns from rated answers ({needs}), and this is a row of the format {format}; "
        f"set {'head.name=classification or lm' if objective == 'reward' else 'objective.name=sft'} for such rows"
    )


def _plain_reading(row: Mapping[str, Any]) -> str:
    """How to train on the plain row that stands beside the ratings."""
    for name, keys in (("messages", ["messages"]), ("prompt-completion", ["prompt", "completion"])):
        if all(holds_something(row.get(key)) for key in keys):
            return f", or data.format={name} to train on every {keys[-1].removesuffix('s')} as it is"
    return ""


def _label(value: Any, key: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):  # as a CSV file has it
        return value.lower() == "true"
    if value is None:
        raise RowError(f"'{key}' is missing: it must say true (desirable) or false (undesirable)")
    if isinstance(value, str | list | dict) or value not in (0, 1):
        raise RowError(f"'{key}' is {value!r}; it must be true (desirable) or false (undesirable)")
    return bool(value)


def _check_answer(name: str, answer: Pair | Chat) -> None:
    """Refuse an answer that says nothing, or that is not the assistant's."""
    if isinstance(answer, Pair):
        if not answer.target.strip():
            raise RowError(f"{name} is empty")
        return
    last = answer.messages[-1]["role"]
    if last != "assistant":
        raise RowError(f"{name} ends with a message of the role '{last}'; the last one must be the assistant's")
    if not answer.first_target:
        raise RowError(f"there is no prompt before {name}")
    if not any(answer.is_target(index) for index in range(len(answer.messages))):
        raise RowError(f"all of {name} is marked not to be trained on ({', '.join(TRAINING_MARKS)})")
    if answer.says_nothing:
        raise RowError(f"{name} is empty")


def _said(answer: Pair | Chat) -> Any:
    return answer.target if isinstance(answer, Pair) else answer.messages[answer.first_target :]


def _prompt_completion(row: Mapping[str, Any], as_chat: bool) -> Pair | Chat:
    if _is_text(row["prompt"]) and _is_text(row["completion"]):
        pair = Pair(string_of(row, "prompt"), string_of(row, "completion"))
        return _as_turns(pair, row) if as_chat else pair
    return conversational_pair(row, "prompt", "completion")


def _one_answer(row: Mapping[str, Any], as_chat: bool) -> Pair | Chat:
    """The last answer of a LLaMA-Factory row, a chat or Alpaca's."""
    for key in ("conversations", "messages"):
        if holds_something(row.get(key)):
            made = chat(row, key, strict=key == "conversations")
            return dataclasses.replace(made, first_target=len(made.messages) - 1)
    if "instruction" in row and "output" in row:
        return alpaca_chat(row) if as_chat else alpaca(row)
    if "prompt" in row and "completion" in row:
        return _prompt_completion(row, as_chat)
    raise RowError(f"'kto_tag' rates an answer, and there is none; the row's keys: {', '.join(map(str, row))}")


def _two_answers(row: Mapping[str, Any], as_chat: bool) -> tuple[Pair | Chat, Pair | Chat]:
    key = next((key for key in _PROMPTS if holds_something(row.get(key))), "")
    if key == "instruction":
        made = [{**row, "output": string_of(row, name)} for name in ("chosen", "rejected")]
        return tuple(map(alpaca_chat if as_chat else alpaca, made))
    if key != "conversations" and all(_is_text(row[name]) for name in (key, "chosen", "rejected") if name):
        texts = {name: string_of(row, name) for name in (key, "chosen", "rejected") if name}
        prompt, chosen, rejected = texts.values() if key else _common_text(row, **texts)
        pairs = (Pair(prompt, chosen), Pair(prompt, rejected))
        return tuple(_as_turns(pair, row) for pair in pairs) if as_chat else pairs
    return _two_chats(row, key)


def _two_chats(row: Mapping[str, Any], key: str) -> tuple[Chat, Chat]:
    strict = key == "conversations"
    answers = [_answer_messages(row, name, strict) for name in ("chosen", "rejected")]
    prompt: list[dict[str, Any]] = []
    if key and not _is_text(row[key]):
        prompt = messages_of(row[key], key, strict)
    elif key and answers[0][0]["role"] == "assistant":
        prompt = [{"role": "user", "content": string_of(row, key)}]
    if not prompt:  # both are whole conversations; a text beside them says their question once more
        prompt, *answers = _common_messages(*answers)
        if key and all(message["content"].strip() != string_of(row, key).strip() for message in prompt):
            raise RowError(f"'{key}' is not among the messages that 'chosen' and 'rejected' begin with")
    prompt = with_system(prompt, row)
    made = [
        Chat((*prompt, *answer), tools_of(row), first_target=len(prompt), **for_template(row)) for answer in answers
    ]
    return made[0], made[1]


def _answer_messages(row: Mapping[str, Any], name: str, strict: bool) -> list[dict[str, Any]]:
    """An answer as messages: it is text, one message (LLaMA-Factory), or a list of them."""
    value = row[name]
    if value is None:
        raise RowError(f"'{name}' is null; it must be text or messages")
    if _is_text(value):
        return [{"role": "assistant", "content": string_of(row, name)}]
    return messages_of([value] if isinstance(value, Mapping) else value, name, strict)


def _common_messages(chosen: list, rejected: list) -> tuple[list, list, list]:
    """What two conversations begin with, and the rest of each; as TRL has it, the rest has at least one message."""
    most = min(len(chosen), len(rejected)) - 1
    count = next((at for at in range(most) if chosen[at] != rejected[at]), most)
    if not count:
        raise RowError("there is no prompt, and 'chosen' and 'rejected' have no message in common to begin with")
    return chosen[:count], chosen[count:], rejected[count:]


def _common_text(row: Mapping[str, Any], chosen: str, rejected: str) -> tuple[str, str, str]:
    """What two texts begin with, and the rest of each; but for Anthropic's, what TRL takes for the prompt."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise RowError(f"{name} is empty")
    if chosen == rejected:
        raise RowError(EQUAL)
    common = os.path.commonprefix([chosen, rejected])
    count = min(len(common), len(chosen) - 1, len(rejected) - 1)
    if chosen.startswith(_HUMAN) and _ASSISTANT in common:
        count = common.rindex(_ASSISTANT) + len(_ASSISTANT)
    elif count == len(common):
        count -= common.endswith(" ")
    if not count:
        keys = ", ".join(str(key) for key in row if key not in ("chosen", "rejected"))
        others = f"; data.columns can rename one of the other keys to it: {keys}" if keys else ""
        raise RowError(f"there is no 'prompt', and 'chosen' and 'rejected' begin with nothing in common{others}")
    return chosen[:count], chosen[count:], rejected[count:]


def _as_turns(pair: Pair, row: Mapping[str, Any]) -> Chat:
    prompt: list[dict[str, Any]] = [{"role": "user", "content": pair.source}]
    if pair.source.startswith(_HUMAN) and pair.source.endswith(_ASSISTANT):
        parts = re.split(r"\n\n(Human|Assistant):", pair.source.removesuffix(_ASSISTANT))[1:]
        roles = ("user" if name == "Human" else "assistant" for name in parts[::2])
        prompt = [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]
        pair = Pair(pair.source, pair.target.strip())
    return conversational_pair({**row, "prompt": prompt, "completion": pair.target}, "prompt", "completion")


def _is_text(value: Any) -> bool:
    """Whether a value is text (or a number, which is read as such), and no list of messages as a CSV file has it."""
    return isinstance(value, str | int | float) and not str(value).lstrip().startswith("[{")

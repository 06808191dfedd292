"""Chats through the tokenizer's chat template, with a mask of what the assistant says.

Where the template marks the assistant's part with `{% generation %}`, Hugging Face's own mask is used. Most published
templates do not; then the part is found by rendering: the text of `messages[:i]` with the generation prompt ends where
the assistant's message i begins, and the text of `messages[:i + 1]` where it ends. Both are held against the whole
text, which is tokenized once (without special tokens: the template writes them), and tokens are masked by their
character offsets. Turns that are rendered otherwise once more messages follow are found where the difference is one
that templates are known for (thoughts left out, another closing token, system text that moves). A template for which
that fails is an error, never a mask of all ones or all zeros.

Against the masks of TRL's own training templates: a thought that the generation prompt opens belongs to the target, as
there. The closing token does too; the line break behind it does not, as a model stops before it and never writes it.
The role's header is never a target, which it is in TRL's templates of DeepSeek and gpt-oss: the prompt brings it. Where
a template closes no turn (GLM 4), the next role's token is trained on, as there; behind the last turn TRL adds one to
the text, and here the text stays the template's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune.checkpoints import json_text
from tpu_tune.checkpoints.chat_template import read_text
from tpu_tune.checkpoints.template_limits import bounded, template_errors
from tpu_tune.data.formats import Chat, RowError
from tpu_tune.data.messages import TRAINING_MARKS
from tpu_tune.errors import UserError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers gives templates each under the others' names
# A thought that a generation prompt opens, and closes again where thinking is off.
THOUGHT = re.compile(
    r"(?:<think>\s*(?:</think>)?|\[THINK\]\s*(?:\[/THINK\])?|<\|channel>thought\s*(?:<channel\|>)?)\s*\Z"
)
_EMPTYTHOUGHT = re.compile(r"\s*<think>\s*</think>")


def read_template(tokenizer: Any, chat_template: str = "") -> str | dict[str, str]:
    """Return the Jinja text: `chat_template` (text or a file's path), or the tokenizer's own, or "" where it has none.

    A tokenizer that has several (`default`, `tool_use`, `rag`) gives name -> text; `template_of` chooses for each row.

    Raises:
      UserError: `chat_template` is neither Jinja text nor a file that can be read.
    """
    chat_template = read_text(chat_template)
    own = getattr(tokenizer, "chat_template", None) or ""
    return chat_template or (dict(own) if isinstance(own, Mapping) else own)


def template_of(templates: str | Mapping[str, str], chat: Chat) -> str:
    """Choose the template of a chat: as transformers does, `tool_use` where there are tools, else `default`.

    A chat with documents takes `rag` where there is one; transformers takes that one only by name.

    Raises:
      UserError: there are several and none of them is `default`.
    """
    if isinstance(templates, str):
        return templates
    if chat.tools and "tool_use" in templates:
        return templates["tool_use"]
    if chat.documents and "rag" in templates:
        return templates["rag"]
    if "default" not in templates:
        names = ", ".join(templates)
        raise UserError(f"of the tokenizer's chat templates ({names}) none is 'default'; give data.chat_template")
    return templates["default"]


def has_generation_tag(template: str) -> bool:
    """Whether the template marks the assistant's part with `{% generation %}`."""
    return bool(_GENERATION_TAG.search(template))


def unread(template: str, chat: Chat) -> list[str]:
    """What a chat holds that its template never reads, so that it is not in the text."""
    message_keys = {key for message in chat.messages for key in message}
    held = {
        "tools": bool(chat.tools),
        "documents": bool(chat.documents),
        "tool_calls": "tool_calls" in message_keys,
        "function_call": "function_call" in message_keys,
        "reasoning_content": bool(message_keys & set(_REASONING)),
    }
    names = {"reasoning_content": _REASONING}
    found = [key for key, holds in held.items() if holds and not _mentions(template, names.get(key, (key,)))]
    found += [f"chat_template_kwargs.{key}" for key in chat.template_kwargs if not _mentions(template, (key,))]
    found += [f"{key} of a message" for key in ("train_detail", "training_detail") if key in message_keys]
    if any(_trains_others(message) for message in chat.messages):
        found.append("train or training of a message that is not the assistant's")
    return found


def _mentions(template: str, names: Sequence[str]) -> bool:
    return bool(re.search(rf"\b(?:{'|'.join(map(re.escape, names))})\b", template))


def _trains_others(message: Mapping[str, Any]) -> bool:
    return message["role"] != "assistant" and bool(message.get("train") or message.get("training"))


def check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Check variables for a template.

    Raises:
      RowError: one of them is what rendering itself is told by (`messages`, `tools`, `tokenize`).
    """
    if not variables:
        return
    taken = sorted({"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} & set(variables))
    if taken:
        raise RowError(f"chat_template_kwargs may not hold '{taken[0]}'; it is for the template's own variables")


def render(tokenizer: Any, template: str, chat: Chat, add_generation_prompt: bool = False) -> str:
    """Render a chat as text.

    Raises:
      UserError: there is no template, or it is not valid Jinja.
      RowError: the template refuses this chat.
    """
    if not template:
        raise UserError(
            "the tokenizer has no chat template; set data.chat_template to one (Jinja text or a file), "
            "or use input/output rows"
        )
    with _one_line(template):
        return tokenizer.apply_chat_template(
            **_shown(chat), chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )


def _shown(chat: Chat) -> dict[str, Any]:
    """What the template is shown of a chat."""
    return {
        **chat.template_kwargs,
        "conversation": [{k: v for k, v in m.items() if k not in TRAINING_MARKS} for m in chat.messages],
        "tools": list(chat.tools) or None,
        "documents": list(chat.documents) or None,
    }


def _one_line(template: str) -> contextlib.AbstractContextManager[None]:
    return template_errors(template, lambda reason: RowError(f"the chat template refuses it ({reason})"))


def with_arguments(tokenizer: Any, template: str, chat: Chat) -> Chat:
    """Give the arguments of tool calls the form that the template wants, an object or JSON text.

    They stay as they are where the template writes them as JSON so. It does not where it encodes text a second time,
    leaves it out, or fails; and where it writes an object as Python does, leaves it out, or fails.

    Raises:
      RowError: the template wants objects, and the arguments are no JSON; or it refuses the chat.
    """
    calls = list(_calls(chat))
    if not calls:
        return chat
    refusals, rendered, doubled = [], [], False
    for form in (lambda arguments: arguments, _as_object, _as_text):
        try:
            made = _map_arguments(chat, form)
            text = render(tokenizer, template, made)
        except RowError as error:
            refusals.append(error)
            continue
        if all(_is_written(call["arguments"], text) for call in _calls(made)):
            return made
        rendered.append(made)
        doubled = doubled or any(_is_doubled(call["arguments"], text) for call in _calls(made))
    if not rendered or (doubled and refusals):
        raise refusals[0]
    return rendered[0]  # the template does not write what is called, so that nothing depends on the form


def _calls(chat: Chat) -> Iterator[dict[str, Any]]:
    """The function of each tool call: what holds `name` and `arguments`."""
    for message in chat.messages:
        calls = message.get("tool_calls")
        for call in [*(calls if isinstance(calls, list | tuple) else ()), message.get("function_call")]:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("arguments"), str | Mapping):
                yield function


def _map_arguments(chat: Chat, form: Callable[[Any], Any]) -> Chat:
    messages = copy.deepcopy(chat.messages)
    made = dataclasses.replace(chat, messages=messages)
    for function in _calls(made):
        function["arguments"] = form(function["arguments"])
    return made


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json_text.loads(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise RowError(f"the arguments of a tool call are not JSON ({arguments[:60]!r})") from error


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _is_written(arguments: Any, text: str) -> bool:
    if isinstance(arguments, str):
        return arguments.strip() != "" and arguments.strip() in text and not _is_doubled(arguments, text)
    if not arguments or not isinstance(arguments, Mapping):
        return True
    return str(arguments) not in text and all(str(key) in text for key in arguments)


def _is_doubled(arguments: Any, text: str) -> bool:
    """Whether JSON text was encoded as JSON once more."""
    return isinstance(arguments, str) and any(json.dumps(arguments, ensure_ascii=ascii) in text for ascii in (0, 1))


def assistant_spans(tokenizer: Any, template: str, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat and find the character spans [start, end) that the assistant writes, by comparing prefixes.

    Returns:
      (text, spans), one span for each assistant message that is trained on, its closing token included.

    Raises:
      UserError: the template does not build a chat by appending, so that the spans cannot be known.
      RowError: the template refuses the chat.
    """
    return _find_spans(tokenizer, template, chat, [i for i in range(len(chat.messages)) if chat.is_target(i)])


def _find_spans(tokenizer: Any, template: str, chat: Chat, indices: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    whole = render(tokenizer, template, chat)
    header = constant_header(tokenizer, template, chat, whole)
    text = whole.removesuffix(header)
    spans = []
    for i in indices:
        turn = render(tokenizer, template, first_messages(chat, i + 1)).removesuffix(header)
        start, own_start = _start(tokenizer, template, chat, i, (text, turn))
        if text.startswith(turn):
            end = len(turn)
        else:
            end = start + _length_in_history(tokenizer, turn[own_start:], text[start:], chat.messages[i])
        spans.append((start, _until_the_end(tokenizer, text, start, end)))
    return text, spans


def first_messages(chat: Chat, count: int) -> Chat:
    """The chat cut behind so many messages."""
    return dataclasses.replace(chat, messages=chat.messages[:count])


def constant_header(tokenizer: Any, template: str, chat: Chat, whole: str) -> str:
    """What a template writes behind every chat, a generation prompt that nobody asked for; "" of most."""
    # Some templates (Llama 3's first) end every text with the assistant's header, asked for or not. It is no part of
    # the conversation. It shows as a flag without effect, and alone where there are no messages.
    if render(tokenizer, template, chat, add_generation_prompt=True) != whole:
        return ""
    from transformers.utils.chat_template_utils import render_jinja_template  # a heavy import, for reading data alone

    variables = {**tokenizer.special_tokens_map, **chat.template_kwargs}
    try:  # apply_chat_template itself refuses a chat without messages
        with bounded():
            rendered, _ = render_jinja_template([[]], chat_template=template, add_generation_prompt=True, **variables)
    except Exception:  # without messages a template may fail in any way
        return ""
    return rendered[0] if whole.endswith(rendered[0]) else ""


def _start(tokenizer: Any, template: str, chat: Chat, i: int, texts: tuple[str, str]) -> tuple[int, int]:
    """Where the assistant's message i starts in the whole text, and in the text that ends with it.

    Raises:
      UserError: that cannot be known.
    """
    text, turn = texts
    if i == 0:  # no prompt to render: the texts of two different answers part where the answer begins
        others = [render(tokenizer, template, _with_answer(first_messages(chat, 1), 0, word)) for word in ("0", "1")]
        prompt = others[0][: len(os.path.commonprefix(others))]
    else:
        prompt = render(tokenizer, template, first_messages(chat, i), add_generation_prompt=True)
        # A thought that the prompt opens (or opens and closes) is not in every turn; where it is, it is trained on.
        prompt = THOUGHT.sub("", prompt)
    if text.startswith(prompt):
        return len(prompt), len(prompt)
    moved = _moved_start(tokenizer, template, chat, i, prompt)
    if moved and turn.startswith(prompt):
        return moved, len(prompt)
    at = len(os.path.commonprefix([prompt, text]))
    raise UserError(
        f"the chat template does not say which tokens are the assistant's: its prompt for message {i + 1} is not "
        f"the beginning of the whole text ({prompt[at : at + 30]!r} against {text[at : at + 30]!r}); "
        "give data.chat_template with {% generation %} around the assistant's part"
    )


def _with_answer(chat: Chat, i: int, word: str) -> Chat:
    """The chat with another answer in message i, and other functions called there."""
    messages = copy.deepcopy(chat.messages[: i + 1])
    messages[i]["content"] = word
    for function in _calls(dataclasses.replace(chat, messages=messages[i:])):
        function["name"] = word
    return dataclasses.replace(chat, messages=(*messages, *chat.messages[i + 1 :]))


def _moved_start(tokenizer: Any, template: str, chat: Chat, i: int, prompt: str) -> int:
    # Mistral's templates put the system prompt and the tools into the last user's turn, which moves as messages
    # follow. The prompt's end, from its last control token on, then stands before the answer;
    # where the answer is, the whole text shows when another takes its place.
    tokens = [token for token in (*tokenizer.added_tokens_encoder, "[/INST]") if token in prompt]
    if not tokens:
        return 0
    tail = prompt[max(prompt.rindex(token) for token in tokens) :]
    others = [render(tokenizer, template, _with_answer(chat, i, word)) for word in ("0", "1")]
    before = others[0][: len(os.path.commonprefix(others))]
    own = render(tokenizer, template, chat)
    if before == others[0] or not own.startswith(before) or tail not in before:
        return 0
    return before.rindex(tail) + len(tail)


def _length_in_history(tokenizer: Any, new: str, text: str, message: Mapping[str, Any]) -> int:
    """How long a turn is in the whole text, where it is rendered otherwise than when it was new.

    Reasoning models' templates leave the thoughts out of every turn but the last, so that an earlier turn is the end
    of what it was: "<think>...</think>\n\nanswer<|im_end|>" -> "answer<|im_end|>". Others end the last turn otherwise
    (gpt-oss: <|return|>, then <|end|>), or end every text with EOS (Phi-3).

    Args:
      new: the turn as it was.
      text: the whole text from the turn's start on.

    Raises:
      UserError: neither explains the difference.
    """
    names = [str(call.get("name", "")) for call in _calls(Chat((message,)))]
    ending = message["content"].strip()[-16:] or (names[-1] if names else "")
    emptied = _EMPTYTHOUGHT.match(text)  # or they leave "<think></think>" of it
    for lead in (0, emptied.end()) if emptied else (0,):
        length = _length_without_thought(tokenizer, new, text[lead:], ending)
        if length:
            return lead + length
    at = len(os.path.commonprefix([new, text]))
    raise UserError(
        "the chat template does not say which tokens are the assistant's: a turn is rendered otherwise once other "
        f"messages follow ({new[at : at + 30]!r} becomes {text[at : at + 30]!r}); "
        "give data.chat_template with {% generation %} around the assistant's part"
    )


def _length_without_thought(tokenizer: Any, new: str, text: str, ending: str) -> int:
    if kept := _end_that_begins(new, text, ending):
        return len(kept)
    token = _tokens(tokenizer)
    body = new[: re.search(rf"(?:{token.pattern})*\s*\Z", new).start()]
    kept = _end_that_begins(body, text, ending)
    if body and not kept:
        return 0
    # The closing tokens that both have; where they have none in common, the one that stands there.
    closing, rest = new[len(body) :], text[len(kept) :]
    same = [match.end() for match in token.finditer(closing) if rest.startswith(closing[: match.end()])]
    if same or (match := token.match(rest)):
        return len(kept) + (same[-1] if same else match.end())
    return 0


def _end_that_begins(new: str, text: str, ending: str) -> str:
    """The longest end of a turn that the text begins with and that has the answer's last characters in it, or ""."""
    for skipped in range(new.rfind(ending) + 1 if ending else len(new)):
        if text.startswith(new[skipped : skipped + 32]) and text.startswith(new[skipped:]):
            return new[skipped:]
    return ""


def _tokens(tokenizer: Any) -> re.Pattern:
    """An added token of the vocabulary, with the space before it."""
    names = sorted((token for token in tokenizer.added_tokens_encoder if token.strip()), key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, names)) or '(?!)'})")


def _until_the_end(tokenizer: Any, text: str, start: int, end: int) -> int:
    # The model stops at the closing token; the line break that a template puts behind it is never generated. Where a
    # template closes no turn (GLM 4), the model stops by beginning the next one: its first token belongs to the target.
    said = text[start:end].rstrip()
    if said.endswith(tuple(tokenizer.added_tokens_encoder)):
        return start + len(said)
    following = _tokens(tokenizer).match(text, end)
    return following.end() if following and following.group().strip() != tokenizer.bos_token else end


def mask_from_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Mark the tokens that overlap one of the character spans.

    Args:
      offsets: (start, end) characters of each token, (tokens, 2).
      spans: [start, end) characters, in order.

    Returns:
      (tokens,) bool. A token across a span's border counts, as in Hugging Face's `char_to_token`.
    """
    bounds = np.asarray(offsets, np.int64).reshape(-1, 2)
    first, last = bounds[:, 0], np.maximum(bounds[:, 1], bounds[:, 0] + 1)  # an empty token counts where it stands
    mask = np.zeros(len(bounds), bool)
    for start, end in spans:
        mask |= (last > start) & (first < end)
    return mask


def encode_tagged(tokenizer: Any, template: str, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a chat whose template has `{% generation %}`, with Hugging Face's own mask.

    Returns:
      (input ids int32, mask bool), both (tokens,).
    """
    with _one_line(template):
        encoded = tokenizer.apply_chat_template(
            **_shown(chat),
            chat_template=template,
            return_assistant_tokens_mask=True,
            return_dict=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    mask = np.asarray(encoded["assistant_masks"], bool)
    others = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and not chat.is_target(i)]
    if others:
        text, spans = _find_spans(tokenizer, template, chat, others)
        spans = [(a, b + len(text[b:]) - len(text[b:].lstrip())) for a, b in spans]  # and the line break behind them
        mask &= ~mask_from_spans(encoded["offset_mapping"], spans)
    return np.asarray(encoded["input_ids"], np.int32), mask

"""Chats through the tokenizer's chat template, with a mask of what the assistant says.

Where the template marks the assistant's part with `{% generation %}`, Hugging Face's own mask is used. Most published
templates do not; then the part is found by rendering: the text of `messages[:i]` with the generation prompt ends where
the assistant's message i begins, and the text of `messages[:i + 1]` where it ends. Both must be prefixes of the whole
text, which is tokenized once (without special tokens: the template writes them), and tokens are masked by their
character offsets. The closing token belongs to the target, line breaks after it do not. A template for which that
fails is an error, never a mask of all ones or all zeros.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from tpu_tune.checkpoints.chat_template import read_text
from tpu_tune.data.formats import Chat, RowError
from tpu_tune.errors import UserError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_template(tokenizer: Any, chat_template: str = "") -> str:
    """Return the Jinja text: `chat_template` (text or a file's path), or the tokenizer's own, or "" where it has none.

    Raises:
      UserError: `chat_template` is neither Jinja text nor a file that can be read.
    """
    chat_template = read_text(chat_template)
    own = getattr(tokenizer, "chat_template", None)
    return chat_template or (own.get("default") if isinstance(own, dict) else own) or ""


def has_generation_tag(template: str) -> bool:
    """Whether the template marks the assistant's part with `{% generation %}`."""
    return bool(_GENERATION_TAG.search(template))


def render(
    tokenizer: Any,
    template: str,
    messages: Sequence[dict],
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
) -> str:
    """Render messages as text.

    Raises:
      UserError: there is no template, or it is not valid Jinja.
      RowError: the template refuses these messages.
    """
    if not template:
        raise UserError(
            "the tokenizer has no chat template; set data.chat_template to one (Jinja text or a file), "
            "or use input/output rows"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})") from error
    except (jinja2.TemplateError, TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise RowError(f"the chat template refuses it ({' '.join(str(error).split())})") from error


def assistant_spans(tokenizer: Any, template: str, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat and find the character spans [start, end) that the assistant writes, by comparing prefixes.

    Returns:
      (text, spans), one span for each assistant message from `chat.first_target` on, its closing token included.

    Raises:
      UserError: the template does not build a chat by appending, so that the spans cannot be known.
      RowError: the template refuses the chat.
    """
    messages, tools = chat.messages, chat.tools
    whole = render(tokenizer, template, messages, tools)
    header = _constant_header(tokenizer, template, chat, whole)
    text = whole.removesuffix(header)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < chat.first_target:
            continue
        start = _start(tokenizer, template, chat, i, text)
        turn = render(tokenizer, template, messages[: i + 1], tools).removesuffix(header)
        if text.startswith(turn):
            end = len(turn)
        else:
            end = start + _length_in_history(turn, text, start, message["content"])
        spans.append((start, _without_trailing_space(tokenizer, text, start, end)))
    return text, spans


def _constant_header(tokenizer: Any, template: str, chat: Chat, whole: str) -> str:
    # Some templates (Llama 3's first) end every text with the assistant's header, asked for or not. It is no part of
    # the conversation. It shows as a flag without effect, and alone where there are no messages.
    if render(tokenizer, template, chat.messages, chat.tools, add_generation_prompt=True) != whole:
        return ""
    from transformers.utils.chat_template_utils import render_jinja_template  # a heavy import, for reading data alone

    try:  # apply_chat_template itself refuses a chat without messages
        rendered, _ = render_jinja_template(
            [[]], chat_template=template, add_generation_prompt=True, **tokenizer.special_tokens_map
        )
    except (jinja2.TemplateError, TypeError, KeyError, IndexError):
        return ""
    return rendered[0] if whole.endswith(rendered[0]) else ""


def _start(tokenizer: Any, template: str, chat: Chat, i: int, text: str) -> int:
    if i == 0:  # no prompt to render: the texts of two different answers part where the answer begins
        others = [render(tokenizer, template, [{**chat.messages[0], "content": c}], chat.tools) for c in ("0", "1")]
        start = len(os.path.commonprefix(others))
        prompt = others[0][:start]
    else:
        prompt = render(tokenizer, template, chat.messages[:i], chat.tools, add_generation_prompt=True)
        start = len(prompt)
    if not text.startswith(prompt):
        at = len(os.path.commonprefix([prompt, text]))
        raise UserError(
            f"the chat template does not say which tokens are the assistant's: its prompt for message {i + 1} is not "
            f"the beginning of the whole text ({prompt[at : at + 30]!r} against {text[at : at + 30]!r}); "
            "give data.chat_template with {% generation %} around the assistant's part"
        )
    return start


def _length_in_history(turn: str, text: str, start: int, content: str) -> int:
    # Reasoning models' templates leave the thoughts out of every turn but the last, so that an earlier turn is the end
    # of what it was when it was new: "<think>...</think>\n\nanswer<|im_end|>" -> "answer<|im_end|>".
    new = turn[start:]
    ending = content.strip()[-16:]
    for skipped in range(len(new)):
        kept = new[skipped:]
        if ending not in kept:
            break
        if text.startswith(kept, start):
            return len(kept)
    at = len(os.path.commonprefix([turn, text]))
    raise UserError(
        "the chat template does not say which tokens are the assistant's: a turn is rendered otherwise once other "
        f"messages follow ({turn[at : at + 30]!r} becomes {text[at : at + 30]!r}); "
        "give data.chat_template with {% generation %} around the assistant's part"
    )


def _without_trailing_space(tokenizer: Any, text: str, start: int, end: int) -> int:
    # The model stops at the closing token; the line break that a template puts behind it is never generated.
    said = text[start:end].rstrip()
    return start + len(said) if said.endswith(tuple(tokenizer.added_tokens_encoder)) else end


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
    try:
        encoded = tokenizer.apply_chat_template(
            list(chat.messages),
            tools=list(chat.tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            return_dict=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
        raise RowError(f"the chat template refuses it ({' '.join(str(error).split())})") from error
    mask = np.asarray(encoded["assistant_masks"], bool)
    if chat.first_target:
        prompt = render(tokenizer, template, chat.messages[: chat.first_target], chat.tools, add_generation_prompt=True)
        mask &= np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 1] > len(prompt)
    return np.asarray(encoded["input_ids"], np.int32), mask

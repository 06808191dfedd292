"""An Ollama Modelfile beside a GGUF file: its chat template in Go's language, and the texts that end an answer.

Ollama runs no Jinja. It guesses a template from the GGUF file's, and where it does not know that one it leaves all
turns out. So the template is rendered on a few chats, and what stands around their texts is written as a Go template
(https://docs.ollama.com/modelfile, https://docs.ollama.com/template). That it says the same is checked before.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.ends import closing_ids
from tpu_tune.checkpoints.prompts import ALPACA, PLAIN, in_words, recorded
from tpu_tune.checkpoints.template_limits import template_errors
from tpu_tune.checkpoints.tokenizers import adds_bos
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError

Chat = Sequence[tuple[str, str]]

# Some templates strip texts, or look into them for a thought; these have nothing to be stripped or found.
_CHATS: tuple[Chat, ...] = tuple(
    [(role, f"{role[0].upper()}{number}9-text") for number, role in enumerate(roles)]
    for roles in (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user", "assistant", "user"),
    )
)


@dataclasses.dataclass(frozen=True)
class Turns:
    """What a chat template writes around the texts of a chat that is to be answered.

    Attributes:
      first: before the first user's text, where there is no system text.
      system: before a system text.
      after_system: between it and the first user's text.
      answer: between a user's text and an answer that was given.
      user: between an answer and the next user's text.
      prompt: after the last user's text, where the answer is to begin.
    """

    first: str
    system: str
    after_system: str
    answer: str
    user: str
    prompt: str

    def render(self, chat: Chat) -> str:
        """Return the text of a chat, as `go_template` makes Ollama put it."""
        text, before = "", self.first
        for role, content in chat:
            if role == "system":
                text, before = self.system + content, self.after_system
            elif role == "user":
                text, before = text + before + content, self.user
            else:
                text += self.answer + content
        return text + self.prompt

    def go_template(self) -> str:
        """Return a template in Go's language; there is no blank between its parts that would be written."""
        system = f"{{{{ if $.System }}}}{self.system}{{{{ $.System }}}}{self.after_system}{{{{ else }}}}{self.first}"
        return (
            "{{ $first := true }}{{ range .Messages }}"
            f'{{{{ if eq .Role "user" }}}}{{{{ if $first }}}}{system}{{{{ end }}}}{{{{ $first = false }}}}'
            f"{{{{ else }}}}{self.user}{{{{ end }}}}{{{{ .Content }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{self.answer}{{{{ .Content }}}}{{{{ end }}}}'
            f"{{{{ end }}}}{self.prompt}"
        )


def turns_of(tokenizer: Any) -> Turns | None:
    """Return what a tokenizer's chat template writes around the texts; None where that is not all it does.

    BOS is left out where the tokenizer itself puts it before every text, as llama.cpp then does.
    """
    texts = []
    for chat in _CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            with template_errors(tokenizer.chat_template, ValueError):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse any chat, in words of its own; one with a system text, say
            return None
        texts.append(text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text)
    parts = [_around(text, chat) for text, chat in zip(texts, _CHATS, strict=True)]
    if not all(parts):
        return None
    (first, _), (system, after_system, _), (_, answer, user, prompt), _ = parts
    turns = Turns(first, system, after_system, answer, user, prompt)
    same = all(turns.render(chat) == text for chat, text in zip(_CHATS, texts, strict=True))
    unwritable = any(mark in part for part in dataclasses.astuple(turns) for mark in ("{{", '"""'))
    return turns if same and not unwritable else None


def write_modelfile(gguf: str, source: WeightSource) -> bool:
    """Write the Modelfile of a GGUF file; return whether it has a template (else Ollama guesses one).

    Args:
      gguf: the file, `NAME.gguf`.
      source: that file, opened.

    Raises:
      UserError: it cannot be written.
    """
    tokenizer, taught = source.load_tokenizer(), recorded(source.config)
    lines, template, stops = [f"FROM ./{os.path.basename(gguf)}"], None, []
    if taught in (PLAIN, ALPACA):
        template = in_words(taught, "{{ .Prompt }}")
    elif tokenizer.chat_template:
        turns = turns_of(tokenizer)
        template = turns.go_template() if turns else None
        stops = tokenizer.convert_ids_to_tokens(sorted(closing_ids(tokenizer)))
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    path = modelfile_of(gguf)
    try:
        storage.write_bytes(path, "\n".join([*lines, ""]).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return template is not None


def modelfile_of(gguf: str) -> str:
    """Return the path of the Modelfile that belongs to a GGUF file."""
    return gguf.removesuffix(".gguf") + ".Modelfile"


def _around(text: str, chat: Chat) -> list[str] | None:
    """What stands before, between and behind the texts of a chat; None where one is not there once, in order."""
    parts = []
    for _, content in chat:
        before, found, text = text.partition(content)
        if not found or content in text:
            return None
        parts.append(before)
    return [*parts, text]

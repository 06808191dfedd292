"""The chat template that a model is used with, where that is not its tokenizer's own: given, kept, and written.

A template is Jinja text, or name -> text where a tokenizer has several (`default`, `tool_use`, `rag`). transformers
keeps them in `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, and kept them in `tokenizer_config.json`
before. What was trained with a template of its own carries it in these files: the adapter's directory too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError

FILE = "chat_template.jinja"
MORE = "additional_chat_templates"
_CONFIG = "tokenizer_config.json"
_LEGACY = "chat_template.json"

Template = str | Mapping[str, str]


def read_text(chat_template: str) -> str:
    """Return the Jinja text that `data.chat_template` gives: itself, or the content of the file that it names.

    Raises:
      UserError: it is neither Jinja text nor a file that can be read.
    """
    if not chat_template or "{" in chat_template:
        return chat_template
    try:
        return storage.read_bytes(os.path.expanduser(chat_template)).decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        name = f"data.chat_template '{chat_template}'"
        raise UserError(f"{name} is neither Jinja text nor a readable file") from error


def template_of(directory: str) -> Template:
    """Return the template that stands in a directory's files, as transformers reads them; "" where there is none.

    Raises:
      UserError: a file cannot be read, or its template is not one.
    """
    files = {"default": FILE}
    try:
        more = storage.list_names(os.path.join(directory, MORE))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror or error}") from error
    for name in more:
        if name.endswith(".jinja"):
            files[name.removesuffix(".jinja")] = os.path.join(MORE, name)
    found = {name: text for name, file in files.items() if (text := _read(os.path.join(directory, file))) is not None}
    if found:
        return found["default"] if list(found) == ["default"] else found
    file = os.path.join(directory, _CONFIG)
    content = _read(file)
    try:
        kept = json_text.loads(content).get("chat_template") if content is not None else None
        if isinstance(kept, list):
            kept = {entry["name"]: entry["template"] for entry in kept}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    texts = list(kept.values()) if isinstance(kept, Mapping) else [kept or ""]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{file}: its chat_template is neither text nor a list of named texts")
    return kept or ""


def with_template(source: WeightSource, template: Template) -> WeightSource:
    """Return a source whose tokenizer has this chat template in place of its own; "" changes nothing."""
    if not template:
        return source
    return dataclasses.replace(
        source, load_tokenizer=functools.partial(_load_tokenizer, source, template), chat_template=template
    )


def with_template_of(source: WeightSource, adapter: str) -> WeightSource:
    """Return a source with the template that an adapter was trained with, where one stands beside it."""
    return with_template(source, template_of(adapter))


def write_template(directory: str, template: Template) -> None:
    """Make a template the only one of a local directory with a tokenizer's files, for every reader of them."""
    if template_of(directory) == template:
        return  # the files stay those of the original, to the byte
    for name in (FILE, _LEGACY):
        if os.path.isfile(os.path.join(directory, name)):
            os.remove(os.path.join(directory, name))
    shutil.rmtree(os.path.join(directory, MORE), ignore_errors=True)
    texts = dict(template) if isinstance(template, Mapping) else {"default": template}
    for name, text in texts.items():
        file = os.path.join(directory, FILE if name == "default" else os.path.join(MORE, f"{name}.jinja"))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
    file = os.path.join(directory, _CONFIG)
    words = json.loads(_read(file) or "{}")
    if "chat_template" in words:  # some readers, gguf's among them, take this one first
        several = [{"name": name, "template": text} for name, text in texts.items()]
        words["chat_template"] = template if isinstance(template, str) else several
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(words, stream, indent=2, ensure_ascii=False)


def _load_tokenizer(source: WeightSource, template: Template) -> Any:
    tokenizer = source.load_tokenizer()
    tokenizer.chat_template = template if isinstance(template, str) else dict(template)
    return tokenizer


def _read(file: str) -> str | None:
    try:
        return storage.read_bytes(file).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error

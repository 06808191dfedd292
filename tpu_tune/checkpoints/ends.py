"""Which ids end an answer: those of `generation_config.json` and `config.json`, one or a list, as in transformers.

A model that was trained through a chat template also ends its answers with the token that closes them there, which
these files may not name. An export names it, as the Trainer of transformers does (`_align_special_tokens`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.checkpoints.template_limits import template_errors
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError

FILE = "generation_config.json"


def end_ids(source: WeightSource) -> set[int]:
    """Return the ids at which a model's own files say that an answer ends.

    Raises:
      UserError: a file cannot be read, or its `eos_token_id` is neither an id nor a list of ids.
    """
    ends = _ids(source.config, source.path)
    nested = source.config.get("text_config")
    if isinstance(nested, Mapping):
        ends |= _ids(nested, source.path)
    return ends | _ids(_generation_config(source.path), os.path.join(source.path, FILE))


def closing_ids(tokenizer: Any) -> set[int]:
    """Return the token that the chat template writes right behind an answer, where it writes one."""
    if not tokenizer.chat_template:
        return set()
    answer = "0123456789"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        with template_errors(tokenizer.chat_template, ValueError):
            text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template may refuse any chat, in words of its own; then it says nothing of an end
        return set()
    _, found, behind = text.rpartition(answer)
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][:1] if found else []
    return set(ids) & set(tokenizer.get_added_vocab().values())


def write_closing_end(directory: str, source: WeightSource) -> None:
    """Name the template's closing token as an end in a written `generation_config.json`, where the base's files do not.

    The ids that were there stay, and stay first.

    Args:
      directory: a local directory with a model or an adapter.
      source: what it was written from.
    """
    with contextlib.suppress(UserError):  # a model may come without a tokenizer
        missing = closing_ids(source.load_tokenizer()) - end_ids(source)
        if missing:
            content = {**_generation_config(source.path), **_generation_config(directory)}
            nested = source.config.get("text_config") or {}
            kept = content.get("eos_token_id", source.config.get("eos_token_id", nested.get("eos_token_id")))
            kept = [] if kept is None else list(kept) if isinstance(kept, list | tuple) else [kept]
            content.pop("_from_model_config", None)
            content["eos_token_id"] = [*kept, *sorted(missing)]
            with open(os.path.join(directory, FILE), "w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=2)


def _generation_config(directory: str) -> Mapping[str, Any]:
    """Return the content of a local directory's `generation_config.json`; {} where there is none."""
    file = os.path.join(directory, FILE)
    if not os.path.isfile(file):
        return {}
    try:
        content = json_text.loads(storage.read_bytes(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{file} cannot be read: it holds a {type(content).__name__} and no JSON object")
    return content


def _ids(config: Mapping[str, Any], where: str) -> set[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
        raise UserError(f"{where}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return set(ids)

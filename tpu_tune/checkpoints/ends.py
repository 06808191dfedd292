"""Which ids end an answer: those of `generation_config.json` and `config.json`, one or a list, as in transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError


def end_ids(source: WeightSource) -> set[int]:
    """Return the ids at which a model's own files say that an answer ends.

    Raises:
      UserError: a file cannot be read, or its `eos_token_id` is neither an id nor a list of ids.
    """
    file = os.path.join(source.path, "generation_config.json")
    ends = _ids(source.config, source.path)
    nested = source.config.get("text_config")
    if isinstance(nested, Mapping):
        ends |= _ids(nested, source.path)
    if not os.path.isfile(file):
        return ends
    try:
        content = json_text.loads(storage.read_bytes(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{file} cannot be read: it holds a {type(content).__name__} and no JSON object")
    return ends | _ids(content, file)


def _ids(config: Mapping[str, Any], where: str) -> set[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
        raise UserError(f"{where}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return set(ids)

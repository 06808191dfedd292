"""What a plan knows of a model: the content of its config.json, from wherever `model.path` points; no weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.checkpoints.huggingface import read_config
from tpu_tune.checkpoints.source import open_source
from tpu_tune.errors import UserError
from tpu_tune.models import architecture, check_length
from tpu_tune.planning.presets import PRESETS


def model_config(config: ConfigDict) -> dict[str, Any]:
    """Return a Hugging Face config.json's content for `config.model`, grown by `model.add_special_tokens`.

    `model.path` is a directory with a config.json (weights or not), a .gguf file (its header is read), a preset's name,
    or a hub id, of which the config.json alone is fetched. Every added token is counted as new, for which of them the
    tokenizer has already is not known without it.

    Raises:
      UserError: there is no such model, its family is not known, or the rows are longer than it has positions for.
    """
    path = config.model.path
    found = _read(path)
    added = len(config.model.add_special_tokens)
    if added:
        text = found.get("text_config")
        rows = found.get("vocab_size", (text or {}).get("vocab_size", 0)) + added
        found = {**found, "vocab_size": rows}
        if isinstance(text, Mapping):
            found["text_config"] = {**text, "vocab_size": rows}
    try:
        check_length(architecture(found), config.data.max_length)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found


def _read(path: str) -> dict[str, Any]:
    if not path:
        raise UserError(
            f"model.path is empty; give a directory, a .gguf file, a hub id, or one of {', '.join(PRESETS)}"
        )
    if path.endswith(".gguf"):
        return open_source(path).config
    if os.path.isdir(path):
        return read_config(path)
    if os.path.basename(path) == "config.json" and os.path.isfile(path):
        return read_config(os.path.dirname(path) or ".")
    if path in PRESETS:
        return dict(PRESETS[path])
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _from_hub(path)
    raise UserError(f"{path}: there is no such file or directory, and no preset of that name: {', '.join(PRESETS)}")


def _from_hub(name: str) -> dict[str, Any]:
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(name, "config.json")
    except Exception as error:  # the client's many errors mean one thing to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: not a local directory, and the Hugging Face hub did not give its config.json ({reason})"
        ) from error
    return read_config(os.path.dirname(file))

"""The config.json of a model that a plan is made for, from wherever `model.path` points; no weights are read."""

from __future__ import annotations

import os
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.checkpoints.huggingface import open_huggingface, read_config
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.vocabulary import with_vocabulary
from tpu_tune.errors import UserError
from tpu_tune.models import architecture, check_length, classifier_config, is_classifier, label_names
from tpu_tune.planning.presets import PRESETS


def model_config(config: ConfigDict) -> dict[str, Any]:
    """Return the content of the Hugging Face config.json for `config.model`, with `model.add_special_tokens` counted.

    `model.path` is a directory with a config.json (weights or not), a .gguf file (its header is read), a preset's name,
    or a hub id (only the config.json is downloaded). Where weights lie beside the config.json, they say as in training
    whether the head is tied to the embedding. Every added token counts as new, because only the tokenizer knows
    which of them it has already; a classification without a number of labels has two.

    Raises:
      UserError: there is no such model, its family is not supported, or rows are longer than its number of positions.
    """
    path = config.model.path
    content = _read(path)
    added = len(config.model.add_special_tokens)
    try:
        if added:
            content = with_vocabulary(content, architecture(content).vocab_size + added)
        if config.head.name != "lm":
            count = 1 if config.head.name == "reward" else config.head.num_labels or len(config.head.labels)
            own = label_names(content) if is_classifier(content) and count == 0 else None
            content = classifier_config(content, own or label_names({"num_labels": count or 2}))
        check_length(architecture(content), config.data.max_length)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return content


def _read(path: str) -> dict[str, Any]:
    if not path:
        raise UserError(
            f"model.path is empty; give a directory, a .gguf file, a hub id, or one of {', '.join(PRESETS)}"
        )
    if path.endswith(".gguf"):
        return open_source(path).config
    if os.path.isdir(path):
        return _from_directory(path)
    if os.path.basename(path) == "config.json" and os.path.isfile(path):
        return _from_directory(os.path.dirname(path) or ".")
    if path in PRESETS:
        return dict(PRESETS[path])
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _from_hub(path)
    raise UserError(f"{path}: there is no such file or directory, and it is none of the presets {', '.join(PRESETS)}")


def _from_directory(directory: str) -> dict[str, Any]:
    """Return a directory's config; weights beside it say whether the head is tied, as when they are loaded."""
    config = read_config(directory)
    try:
        return open_huggingface(directory).config
    except (UserError, OSError):  # no weights, or not all of them: a plan needs none, and training says what is wrong
        return config


def _from_hub(name: str) -> dict[str, Any]:
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(name, "config.json")
    except Exception as error:  # the client raises many types, all of which mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: there is no such directory, and its config.json cannot be downloaded from the hub ({reason})"
        ) from error
    return read_config(os.path.dirname(file))

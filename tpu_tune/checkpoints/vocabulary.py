"""Special tokens added to a model, as a pure transform of its weight source.

What comes out is a `WeightSource` like any other, with more rows in the embedding and the head, so that loading,
training and export see nothing but a bigger model. New rows are the mean of the old ones (as qlora and Hugging Face's
`resize_token_embeddings` begin them, the latter with noise on top), which says nothing yet and disturbs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.checkpoints.chat_template import Template, template_of, with_template
from tpu_tune.checkpoints.heads import with_configured_head
from tpu_tune.checkpoints.params import check_names, open_architecture
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, with_keys
from tpu_tune.models.families.checked import MOST_TOKENS
from tpu_tune.models.values import check, mapping, whole
from tpu_tune.tensors import QuantizedTensor

# Beside a PEFT adapter: token -> id, the tokens that its base was grown by.
RECORD = "added_special_tokens.json"


def open_configured(config: ConfigDict, template: Template = "") -> WeightSource:
    """Open the model that a configuration describes: `model.path` with `model.add_special_tokens` and the head.

    Args:
      config: the whole configuration.
      template: the chat template in place of the tokenizer's own (`chat_template.read_text` of `data.chat_template`);
        "" takes the one that stands beside `model.adapter`, or else the tokenizer's.

    Raises:
      UserError: nothing usable is there, or the tokens or the head cannot be added.
    """
    model = config.model
    source = with_configured_head(open_source(model.path), config)
    if model.add_special_tokens:
        source = with_added_tokens(source, list(model.add_special_tokens))
    return with_template(source, template or (template_of(model.adapter) if model.adapter else ""))


def with_added_tokens(source: WeightSource, tokens: Sequence[str]) -> WeightSource:
    """Return a source whose tokenizer has these special tokens, and whose embedding and head have rows for them.

    A token that the tokenizer has already keeps its id and its row. The others get the tokenizer's next ids; the row of
    such an id is the mean of all rows of the original matrix (of the head's bias: the mean of its entries), be it a
    spare row of a padded vocabulary or a row behind the last one.

    Args:
      source: an opened model; not changed.
      tokens: the tokens' texts, in the order of their ids.

    Raises:
      UserError: the model is not known, lacks a tensor, or has no usable tokenizer.
    """
    architecture = open_architecture(source)
    names = check_names(source, architecture)
    tokenizer = source.load_tokenizer()
    known = set(tokenizer.get_vocab().values())
    add_tokens(tokenizer, tokens)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    new = [number for number in ids.values() if number not in known]
    rows = architecture.vocab_size
    if architecture.layer_input_vocab not in (0, rows):
        raise UserError(
            f"{source.path}: no tokens can be added where vocab_size_per_layer_input="
            f"{architecture.layer_input_vocab} is not vocab_size={rows}"
        )
    size = max([rows, *[number + 1 for number in new]])
    fresh = sorted({*[number for number in new if number < rows], *range(rows, size)})
    growing = {names[name] for name in _per_token(architecture)}
    identity = json.dumps([source.fingerprint, ids])
    return dataclasses.replace(
        source,
        config=with_vocabulary(source.config, size),
        shapes={name: (size, *shape[1:]) if name in growing else shape for name, shape in source.shapes.items()},
        read=functools.partial(_read, source, frozenset(growing), fresh, size),
        load_tokenizer=functools.partial(_load_tokenizer, source, tuple(tokens)),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        added_tokens=ids,
    )


def write_record(directory: str, source: WeightSource) -> None:
    """Write into an adapter's directory the tokens that its base was grown by, and the tokenizer that has them.

    The tokenizer is written too where only its chat template is not the base's own.
    """
    if not source.added_tokens and not source.chat_template:
        return
    source.load_tokenizer().save_pretrained(directory)
    if not source.added_tokens:
        return
    with open(os.path.join(directory, RECORD), "w", encoding="utf-8") as stream:
        json.dump(source.added_tokens, stream, indent=2, ensure_ascii=False)


def read_record(directory: str) -> dict[str, int]:
    """Return token -> id of the tokens that an adapter's base was grown by; empty where there were none.

    Raises:
      UserError: the record is not what was written.
    """
    file = os.path.join(directory, RECORD)
    try:
        record = json_text.loads(storage.read_bytes(file))
        check({"the record": record}, {"the record": mapping(whole(0, MOST_TOKENS))}, file)
        return dict(record)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def with_tokens_of(source: WeightSource, adapter: str) -> WeightSource:
    """Return a source grown by the tokens that an adapter was trained with, where it was trained with any.

    Raises:
      UserError: the base gives these tokens other ids, so that it is not the adapter's.
    """
    tokens = read_record(adapter)
    return check_tokens(with_added_tokens(source, list(tokens)), adapter) if tokens else source


def check_tokens(source: WeightSource, adapter: str) -> WeightSource:
    """Hold the tokens that an adapter was trained with against a source, and return the source.

    Raises:
      UserError: a token is not there, or has another id.
    """
    for token, number in read_record(adapter).items():
        if token not in source.added_tokens:
            raise UserError(
                f"{adapter} was trained with the added token '{token}'; set model.add_special_tokens to the tokens in "
                f"its {RECORD}"
            )
        if source.added_tokens[token] != number:
            raise UserError(
                f"{adapter} was trained with '{token}' as token {number}, which is {source.added_tokens[token]} in "
                f"{source.path}; give the base that it was trained over"
            )
    return source


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add special tokens to a tokenizer, as `with_added_tokens` does."""
    # An added token keeps its own settings (Phi's strip blanks); one of the plain vocabulary becomes special.
    missing = [token for token in tokens if token not in tokenizer.added_tokens_encoder]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)


def _load_tokenizer(source: WeightSource, tokens: Sequence[str]) -> Any:
    tokenizer = source.load_tokenizer()
    add_tokens(tokenizer, tokens)
    return tokenizer


def _per_token(architecture: Architecture) -> list[str]:
    """Return the Hugging Face names of the tensors with a row for each token."""
    inputs = architecture.names.inputs_embed
    names = [f"{architecture.names.embed}.weight", *([f"{inputs}.weight"] if inputs else [])]
    for module in architecture.modules():
        if module.is_head and not architecture.num_labels:
            names += [] if module.tied_to else [module.weight]
            names += [f"{module.path}.bias"] if module.bias else []
    return names


def _read(source: WeightSource, growing: frozenset[str], fresh: Sequence[int], size: int, name: str) -> Any:
    value = source.read(name)
    if name not in growing or not fresh:
        return value
    if isinstance(value, QuantizedTensor):  # (in, out), while files are (out, in)
        value = np.asarray(value.dequantize()).T
    grown = np.empty((size, *value.shape[1:]), value.dtype)
    grown[: len(value)] = value
    grown[np.asarray(fresh)] = value.mean(axis=0, dtype=np.float64).astype(value.dtype)
    return grown


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a config.json's content with another vocab_size, also where the text model's is one of several."""
    own_inputs = "vocab_size_per_layer_input"
    is_there = own_inputs in (config.get("text_config") or config)
    return with_keys(config, {"vocab_size": size} | ({own_inputs: size} if is_there else {}))

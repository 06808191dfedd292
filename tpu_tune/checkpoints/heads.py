"""A classification or reward head on a model, as a pure transform of its weight source.

What comes out is the source of a `*ForSequenceClassification` (see `models.classifiers`): loading, training and export
see nothing but such a model. Where the files hold no head that fits, the head is new: drawn as transformers draws it,
from a normal distribution with the config's `initializer_range`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tpu_tune.checkpoints.params import open_architecture
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import SCORE, classifier_config, is_classifier, label_names

WEIGHT = f"{SCORE}.weight"


def with_configured_head(source: WeightSource, config: ConfigDict) -> WeightSource:
    """Return a source with the head that `config.head` names.

    Args:
      source: an opened model; not changed.
      config: the whole configuration, its labels resolved; else transformers' two labels stand for them.

    Raises:
      UserError: a classifier is to be trained as a language model, or the family has no classifier.
    """
    head = config.head
    if head.name == "lm":
        if is_classifier(source.config):
            raise UserError(
                f"{source.path}: this is a classifier or a reward model ({source.config['architectures'][0]}), which "
                "has no words to predict; set head.name=classification or head.name=reward"
            )
        return source
    count = 1 if head.name == "reward" else head.num_labels
    names = list(head.labels) or _names(source.config, count)
    problem = "" if head.name == "reward" or head.problem_type == "auto" else head.problem_type
    return with_head(source, names, problem, max(config.seed, 0))


def with_head(source: WeightSource, labels: Sequence[str], problem_type: str = "", seed: int = 0) -> WeightSource:
    """Return a source with a head of these labels: its own where it has one of as many, else a new one.

    Raises:
      UserError: the family has no classifier, or the model has no usable tokenizer.
    """
    language_head = open_architecture(source).names.head
    try:
        config = classifier_config(source.config, labels, problem_type, pad_token(source))
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    arch = open_architecture(dataclasses.replace(source, config=config))
    shape = (arch.num_labels, arch.embed_size or arch.hidden_size)
    if source.shapes.get(WEIGHT) == shape:
        return dataclasses.replace(source, config=config)
    heads = (f"{language_head}.", "lm_head.", f"{SCORE}.")
    scale = float(config.get("initializer_range") or 0.02)
    identity = json.dumps([source.fingerprint, list(shape), seed])
    return dataclasses.replace(
        source,
        config=config,
        shapes={name: size for name, size in source.shapes.items() if not name.startswith(heads)} | {WEIGHT: shape},
        read=functools.partial(_read, source, shape, scale, seed),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        new_head=True,
    )


def pad_token(source: WeightSource) -> int | None:
    """Return the id that is padding to a classifier: the config's, else the tokenizer's, else that of its EOS."""
    if source.config.get("pad_token_id") is not None:
        return source.config["pad_token_id"]
    tokenizer = source.load_tokenizer()
    found = getattr(tokenizer, "pad_token_id", None)
    inside = found is not None and found < open_architecture(source).vocab_size
    return found if inside else getattr(tokenizer, "eos_token_id", None)


def _names(config: dict[str, Any], count: int) -> list[str]:
    """Return the names that a classifier's config gives its labels; where it has others, transformers' LABEL_0, ..."""
    if is_classifier(config) and count in (0, len(label_names(config))):
        return label_names(config)
    return label_names({"num_labels": count or 2})


def _read(source: WeightSource, shape: tuple[int, ...], scale: float, seed: int, name: str) -> Any:
    if name != WEIGHT:
        return source.read(name)
    return (np.random.default_rng([seed, 20]).standard_normal(shape) * scale).astype(np.float32)

"""The files of a multimodal model, of which the tree holds the text part: its names there, and what is left aside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tpu_tune.checkpoints.params import check_names, open_architecture, sorted_names
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.models import WRAPPERS, Architecture, text_config
from tpu_tune.tensors import QuantizedTensor


def file_names(source: WeightSource, architecture: Architecture) -> dict[str, str]:
    """Return the tree's tensor name -> the name to write it under: its own in the source's files.

    Empty for a model that is no part of another one. A head that the files do not hold is named as their other tensors.

    Raises:
      UserError: the source's tensors are not the architecture's.
    """
    if not architecture.names.tower:
        return {}
    names = check_names(source, architecture)
    head = f"{architecture.names.head}.weight"
    older = head == "lm_head.weight" and names[f"{architecture.names.embed}.weight"].startswith("language_model.model.")
    return {head: f"language_model.{head}" if older else head} | names


def left_aside(source: WeightSource, architecture: Architecture) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and value of every tensor that has no place in the tree and belongs to the model, one at a time.

    They are as the file has them; a matrix in four bits, which no file written here holds, is dequantized.
    """
    for name in sorted_names(source, architecture)[2]:
        value = source.read(name)
        yield name, np.asarray(value.dequantize()).T if isinstance(value, QuantizedTensor) else value


def parts_left_aside(source: WeightSource, architecture: Architecture) -> dict[str, dict[str, int]]:
    """Return part -> its `tensors` and `parameters`, of what `left_aside` yields; nothing is read."""
    parts: dict[str, dict[str, int]] = {}
    for name in sorted_names(source, architecture)[2]:
        part = parts.setdefault(name.removeprefix("model.").partition(".")[0], {"tensors": 0, "parameters": 0})
        part["tensors"] += 1
        part["parameters"] += math.prod(source.shapes[name])
    return parts


def as_text_model(source: WeightSource) -> WeightSource:
    """Return a source whose config and tensors' names are its text model's, for formats of language models only."""
    if source.config["model_type"] not in WRAPPERS:
        return source
    architecture = open_architecture(source)
    stored = check_names(source, architecture)
    shapes = text_names(((name, source.shapes[there]) for name, there in stored.items()), architecture)
    return dataclasses.replace(source, config=text_config(source.config), shapes=dict(shapes))


def text_names(tensors: Iterable[tuple[str, Any]], architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """Yield tensors of the tree under the names that they have in the text model by itself."""
    tower = architecture.names.tower
    for name, value in tensors:
        if tower and name.startswith(f"{tower}."):
            name = f"model{name.removeprefix(tower)}"
        elif tower and name.startswith(f"{architecture.names.head}."):
            name = f"lm_head{name.removeprefix(architecture.names.head)}"
        yield name, value

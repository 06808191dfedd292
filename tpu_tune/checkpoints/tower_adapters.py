"""PEFT adapters of multimodal models: written for the text part alone, and read with whatever else they stand on.

PEFT matches names in the whole model, where `q_proj` is one of the vision tower's modules too, and its files have the
names of the class that the adapter was made on: the multimodal one, its form before transformers 4.52, or the text
model by itself.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune.config import Pattern
from tpu_tune.errors import UserError
from tpu_tune.models import WRAPPERS, Architecture
from tpu_tune.models.wrappers import spellings
from tpu_tune.transforms import LoraConfig, Targets
from tpu_tune.transforms.select import matches

log = logging.getLogger(__name__)


def exact_settings(targets: Targets, architecture: Architecture) -> dict[str, Any]:
    """Return the keys of adapter_config.json that choose modules, such that they choose the adapted ones and no other.

    PEFT reads a pattern without `layers_to_transform`, so selected layers are named one by one.
    """
    tower, names = architecture.names.tower, _names(architecture)
    adapted = [name for target in targets.adapted for name in target.names]
    ends = "|".join(sorted({name.rsplit(".")[-1] for name in adapted}))
    pattern = rf"{re.escape(tower)}\..*({ends})"
    exact = {name for name in names if re.fullmatch(pattern, name)} == set(adapted)
    saved = [module.name() if not module.layers else module.path.rsplit(".")[-1] for module in targets.saved]
    return {
        "target_modules": pattern if exact else adapted,
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def names_a_tower(target_modules: str | Sequence[str]) -> bool:
    """Whether `target_modules` is what `exact_settings` gives: the text part of a multimodal model."""
    first = (target_modules if isinstance(target_modules, str) else "".join(target_modules[:1])).replace("\\", "")
    return first.startswith(tuple(f"{wrapper.path}." for wrapper in WRAPPERS.values()))


def as_here(
    spec: LoraConfig, tensors: Mapping[str, np.ndarray], prefix: str, architecture: Architecture
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Return an adapter's settings and tensors under the names of the architecture's modules.

    Args:
      spec: the settings, as read; what they choose outside of the text part is dropped from them.
      tensors: the tensors, as read; those outside of the text part keep their names (see `left_aside`).
      prefix: what PEFT puts before every name.
      architecture: a multimodal model's text part.
    """
    names, tower = _names(architecture), architecture.names.tower
    renamed = {key: _tensor_here(key.removeprefix(prefix), set(names), tower) for key in tensors}
    there = _names_there(names, {key.removeprefix(prefix): here for key, here in renamed.items()}, architecture)
    spec = dataclasses.replace(
        spec,
        target_modules=_pattern_here(spec.target_modules, there),
        modules_to_save=[found for name in spec.modules_to_save for found in _saved_here(name, there)],
        rank_pattern={_key_here(key, there): value for key, value in spec.rank_pattern.items()},
        alpha_pattern={_key_here(key, there): value for key, value in spec.alpha_pattern.items()},
    )
    return spec, {prefix + here: tensors[key] for key, here in renamed.items()}


def left_aside(keys: Iterable[str], prefix: str, architecture: Architecture) -> list[str]:
    """Return those of an adapter's tensor names that stand on other parts of a multimodal model; none without one."""
    here = tuple(f"{prefix}{start}." for start in (architecture.names.tower, architecture.names.head))
    return [key for key in keys if architecture.names.tower and not key.startswith(here)]


def checked_left_aside(
    file: str, architecture: Architecture, tensors: Mapping[str, np.ndarray], prefix: str, in_use: bool
) -> set[str]:
    """Return the tensors that stand on other parts of a multimodal model; if these were trained, say that, or refuse.

    Raises:
      UserError: they were trained, and the adapter is not only `in_use` for text: what is written next would lack them.
    """
    aside = left_aside(tensors, prefix, architecture)
    trained = [key for key in aside if _changes(key, tensors[key])]
    if trained:
        what = f"{file}: {len(trained)} of its tensors were trained outside the text model, e.g. '{trained[0]}'"
        if not in_use:
            raise UserError(f"{what}; it can be used for text (generate, eval, tpu_tune.load), not trained on")
        log.warning("%s; text does not go through them, and they are left aside", what)
    return set(aside)


def _changes(key: str, tensor: np.ndarray) -> bool:
    """Whether a tensor changes the module that it stands on: where nothing was trained, PEFT saves a B of zeros."""
    idle = ("lora_A", "lora_embedding_A", "lora_magnitude_vector", ".base_layer.", ".original_module.")
    return not any(part in key for part in idle) and bool(np.any(np.asarray(tensor, np.float32)))


def _names(architecture: Architecture) -> list[str]:
    return [name for module in architecture.modules() for name in module.names()]


def _tensor_here(key: str, names: set[str], tower: str) -> str:
    """A tensor's name (without PEFT's prefix) as it is here: the name of a module, and what follows it."""
    for meant in spellings(key, tower):
        parts = meant.split(".")
        if any(".".join(parts[:count]) in names for count in range(1, len(parts))):
            return meant
    return key


def _names_there(names: Sequence[str], renamed: Mapping[str, str], architecture: Architecture) -> dict[str, str]:
    """Return module name here -> its name in the class that the adapter was made on, as the renamed tensors tell it."""
    tower, head = architecture.names.tower, architecture.names.head
    inside = ((key, here.removeprefix(tower)) for key, here in renamed.items() if here.startswith(f"{tower}."))
    path = next((key.removesuffix(rest) for key, rest in inside), tower)
    head_there = "language_model.lm_head" if path == "language_model.model" else head
    moved = {tower: path, head: head_there}
    return {
        name: next(
            (new + name.removeprefix(old) for old, new in moved.items() if f"{name}.".startswith(f"{old}.")), name
        )
        for name in names
    }


def _pattern_here(pattern: Pattern, there: Mapping[str, str]) -> Pattern:
    """`target_modules` as it matches here; what it chooses in other parts, or nowhere, has no place in it."""
    if isinstance(pattern, str):
        same = any(matches(name, pattern) for name in there) and all(name == other for name, other in there.items())
        return pattern if same or not pattern else _chosen(pattern, there) or pattern
    found = []
    for entry in pattern:
        short = any(matches(name, [entry]) for name in there)
        found += [entry] if short else _chosen([entry], there)
    return found or pattern


def _chosen(pattern: Pattern, there: Mapping[str, str]) -> list[str]:
    return [name for name, other in there.items() if matches(other, pattern)]


def _saved_here(name: str, there: Mapping[str, str]) -> list[str]:
    """An entry of `modules_to_save`, by the end of a module's name."""
    if any(full.endswith(name) for full in there):
        return [name]
    return [full for full, other in there.items() if other.endswith(name)]


def _key_here(key: str, there: Mapping[str, str]) -> str:
    """A key of `rank_pattern`: a name in full, as PEFT writes it, or a pattern of the end of one."""
    return next((re.escape(name) for name, other in there.items() if other == key.replace("\\", "")), key)

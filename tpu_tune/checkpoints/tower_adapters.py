"""PEFT adapters of multimodal models: written for the text part alone, and read with whatever else they stand on.

PEFT matches names in the whole model, where `q_proj` is one of the vision tower's modules too, and its files have the
names of the class that the adapter was made on: the multimodal one, its form before transformers 4.52, or the text
model by itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune.config import Pattern
from tpu_tune.models import Architecture
from tpu_tune.models.wrappers import spellings
from tpu_tune.transforms import LoraConfig, Targets
from tpu_tune.transforms.select import matches


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
    renamed = {prefix + _tensor_here(key.removeprefix(prefix), set(names), tower): key for key in tensors}
    elsewhere = [key.removeprefix(prefix) for key in left_aside(renamed, prefix, architecture)]
    spec = dataclasses.replace(
        spec,
        target_modules=_pattern_here(spec.target_modules, names, elsewhere, tower),
        modules_to_save=[
            found for name in spec.modules_to_save for found in _saved_here(name, names, elsewhere, tower)
        ],
        rank_pattern={_key_here(key, names, tower): value for key, value in spec.rank_pattern.items()},
        alpha_pattern={_key_here(key, names, tower): value for key, value in spec.alpha_pattern.items()},
    )
    return spec, {name: tensors[key] for name, key in renamed.items()}


def left_aside(keys: Iterable[str], prefix: str, architecture: Architecture) -> list[str]:
    """Return those of an adapter's tensor names that stand on other parts of a multimodal model; none without one."""
    here = tuple(f"{prefix}{start}." for start in (architecture.names.tower, architecture.names.head))
    return [key for key in keys if architecture.names.tower and not key.startswith(here)]


def changes(key: str, tensor: np.ndarray) -> bool:
    """Whether a tensor changes the module that it stands on: where nothing was trained, PEFT saves a B of zeros."""
    return not ("lora_A" in key or "lora_embedding_A" in key) and bool(np.any(np.asarray(tensor, np.float32)))


def _names(architecture: Architecture) -> list[str]:
    return [name for module in architecture.modules() for name in module.names()]


def _tensor_here(key: str, names: set[str], tower: str) -> str:
    """A tensor's name (without PEFT's prefix) as it is here: the name of a module, and what follows it."""
    for meant in spellings(key, tower):
        parts = meant.split(".")
        if any(".".join(parts[:count]) in names for count in range(1, len(parts))):
            return meant
    return key


def _pattern_here(pattern: Pattern, names: Sequence[str], elsewhere: Sequence[str], tower: str) -> Pattern:
    """`target_modules` as it matches here; what matches nothing is kept where the file has nothing for it either."""
    if isinstance(pattern, str):
        if not pattern or any(matches(name, pattern) for name in names):
            return pattern
        return [name for name in names if any(matches(other, pattern) for other in _others(name, tower))] or pattern
    found: list[str] = []
    for entry in pattern:
        if any(matches(name, [entry]) for name in names):
            found.append(entry)
            continue
        meant = [name for name in names if any(matches(other, [entry]) for other in _others(name, tower))]
        if meant or not any(f".{entry}." in f".{key}" for key in elsewhere):
            found += meant or [entry]
    return found


def _saved_here(name: str, names: Sequence[str], elsewhere: Sequence[str], tower: str) -> list[str]:
    if any(full.endswith(name) for full in names):
        return [name]
    meant = [full for full in names if any(other.endswith(name) for other in _others(full, tower))]
    return meant or ([] if any(name in key for key in elsewhere) else [name])


def _key_here(key: str, names: Sequence[str], tower: str) -> str:
    """A key of `rank_pattern`: a name in full, as PEFT writes it, or a pattern of the end of one."""
    meant = [name for name in spellings(key.replace("\\", ""), tower) if name in names]
    return re.escape(meant[0]) if meant else key


def _others(name: str, tower: str) -> list[str]:
    """What a module's name was, or is, in other classes than the one whose names are used here."""
    inside = name.removeprefix(f"{tower}.")
    if inside == name:
        return [name, f"language_model.{name}"]
    return [
        f"{path}.{inside}" for path in ("language_model.model", "model", "model.language_model", "model.text_model")
    ]

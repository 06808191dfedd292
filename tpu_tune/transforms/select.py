"""Which modules a list, a regular expression or `all-linear` means: PEFT's matching rules, on folded names.

Patterns are matched against full Hugging Face names with their layer index, then folded back: the answer is, for
each stacked module, the layers that were chosen. A pattern that matches nothing is an error that lists the choices.
Source of the rules: peft `tuners/tuners_utils.py`, `check_target_module_exists` and `get_pattern_key`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tpu_tune.config import Pattern
from tpu_tune.errors import UserError
from tpu_tune.tensors import Module

ALL_LINEAR = "all-linear"


def matches(name: str, pattern: Pattern) -> bool:
    """Return whether a module name is meant: a string as a full regex match, a list by equality or dotted suffix."""
    if isinstance(pattern, str):
        return _regex(pattern).fullmatch(name) is not None
    return name in pattern or any(name.endswith("." + entry) for entry in pattern)


def choose(modules: Iterable[Module], meant: Callable[[Module, str], bool]) -> dict[str, tuple[int | None, ...]]:
    """Return module path -> chosen layers (`(None,)` for a module that is there once), asking by full name.

    Raises:
      UserError: some experts of a layer are meant and others not, which stand in one leaf.
    """
    chosen = {}

    def takes(module: Module, layer: int | None) -> bool:
        names = module.names_of(layer)
        count = sum(meant(module, name) for name in names)
        if 0 < count < len(names):
            raise UserError(
                f"only {count} of the {len(names)} experts of '{module.name(layer)}' are named; they stand in one "
                "array and are taken together: leave out the expert's index"
            )
        return count > 0

    for module in modules:
        layers = tuple(layer for layer in module.layers or (None,) if takes(module, layer))
        if layers:
            chosen[module.path] = layers
    return chosen


def targeted(
    modules: Sequence[Module],
    pattern: Pattern,
    *,
    exclude: Pattern = (),
    also_exclude: Pattern = (),
    layers: Sequence[int] = (),
    layers_pattern: str = "",
    key: str = "lora.target_modules",
) -> dict[str, tuple[int | None, ...]]:
    """Return module path -> layers for a target pattern, by PEFT's rules.

    Args:
      modules: the tree's modules.
      pattern: names, regex or "all-linear" (every linear module but the output head and the routers of experts).
      exclude, also_exclude: patterns of the modules to leave out (`exclude_modules`, `modules_to_save`).
      layers: indices of the layers to take, () for all; as in PEFT, ignored for a regex and for names in full.
      layers_pattern: name of the layer list, where the general rule does not find the index.
      key: the config key, for messages.

    Raises:
      UserError: nothing matches, or a list entry matches nothing; the choices are listed.
    """
    if pattern == ALL_LINEAR or pattern == [ALL_LINEAR]:
        modules = [module for module in modules if module.kind == "linear" and not (module.is_head or module.is_router)]
        pattern = [module.path.rsplit(".")[-1] for module in modules]
    names = [name for module in modules for name in module.names()]
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if not any(matches(name, entry if isinstance(pattern, str) else [entry]) for name in names):
            raise UserError(f"{key}: '{entry}' matches no module; choose among {', '.join(choices(modules))}")

    def meant(module: Module, name: str) -> bool:
        if any(rule and matches(name, rule) for rule in (exclude, also_exclude)) or not matches(name, pattern):
            return False
        if not layers or isinstance(pattern, str) or name in pattern:
            return True
        rule = rf"(?:^|.*?\.)(?:{layers_pattern})\.(\d+)\." if layers_pattern else r".*?\.[^.]*\.(\d+)\."
        match = re.match(rule, name)
        return match is not None and int(match.group(1)) in layers

    chosen = choose(modules, meant)
    if not chosen and layers and choose(modules, lambda _, name: matches(name, pattern)):
        raise UserError(
            f"lora.layers_to_transform: no target is in the layers {', '.join(map(str, layers))}; they count from 0"
        )
    if not chosen:
        raise UserError(f"{key}: {pattern!r} leaves no module; choose among {', '.join(choices(modules))}")
    return chosen


def by_pattern(table: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a name, as PEFT's rank_pattern does."""
    for key, value in table.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def choices(modules: Iterable[Module]) -> list[str]:
    """Return the short names a user may write, once each, those without a matrix left out."""
    return list(dict.fromkeys(module.path.rsplit(".")[-1] for module in modules if module.is_matrix))


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"'{pattern}' is not a regular expression: {error}") from None

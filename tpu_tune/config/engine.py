"""Configurations out of dataclasses: `Schema` makes an `ml_collections.ConfigDict` of them, and checks what goes in.

A section is a frozen dataclass. A field's annotation is its key's type (`Literal`: its choices; sequences are lists and
mappings dicts with the user's own keys), its default the key's default, and `key` adds its meaning and bounds. The
configuration itself is a dataclass of keys and sections. Text, as the command line gives it, becomes the key's type.
Unknown keys and wrong values are errors of one line that names the key, or the nearest one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import json
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from tpu_tune.errors import UserError

# The largest and the smallest number of float32, in which a device computes; smaller ones are 0 there.
LARGEST, SMALLEST = 3.4028234e38, 1.1754944e-38

# What a value's type is called, and values of it among the entries of a list or dict.
_WORDS = {
    str: ("str", "text"),
    int: ("int", "whole numbers"),
    float: ("float", "numbers"),
    bool: ("bool", "true or false"),
    list: ("list", "lists"),
    dict: ("dict", "dicts"),
    type(None): ("none", "none"),
}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the numbers of a key may be, beside finite.

    Attributes:
      at_least, above, below, at_most: the interval.
      also: a value outside it that is meant as something else, such as -1 for the rest of the devices.
      whole: what stands for `at_most` where there is none and the number is whole: counts on a device are int32.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf
    also: int | None = None
    whole: int = 2**31 - 1

    def broken(self, number: float) -> str:
        """Return what is wrong with a number, after "it must be"; "" when nothing is."""
        most = self.whole if isinstance(number, int) and self.at_most == math.inf else self.at_most
        is_float32 = isinstance(number, int) or number == 0 or SMALLEST <= abs(number) <= LARGEST
        if number == self.also or (is_float32 and self.at_least <= number <= most and self.above < number < self.below):
            return ""
        parts = []
        if not is_float32:
            finite = isinstance(number, int) or math.isfinite(number)
            parts.append(f"0 or between {SMALLEST:.1e} and {LARGEST:.1e}, as float32 is," if finite else "finite")
        if self.above > -math.inf:
            parts.append("positive" if self.above == 0 else f"above {self.above:g}")
        if self.at_least > -math.inf:
            plain = self.at_least == 0 and self.below == self.at_most == math.inf
            parts.append("not negative" if plain else f"at least {self.at_least:g}")
        if self.below < math.inf:
            parts.append(f"below {self.below:g}")
        if self.at_most < math.inf or number > most:
            parts.append(f"at most {most}")
        return (f"{self.also} or " if self.also is not None else "") + " and ".join(parts)


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field of a section.

    Args:
      default: its value where nobody says otherwise.
      meaning: one line.
      bounds: as in `Bounds`, on each number that the value holds.
    """
    metadata = {"meaning": meaning, "bounds": Bounds(**bounds)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its type as annotated, its default, its meaning ("" where the dataclass has none) and bounds."""

    type: Any
    default: Any
    meaning: str
    bounds: Bounds


class Schema:
    """What keys a configuration has.

    Attributes:
      noun: "config" or "recipe", for messages.
      keys: dotted name -> key.
    """

    def __init__(self, noun: str, root: type, rules: Callable[[ConfigDict], None], hidden: Sequence[str] = ()) -> None:
        """Read the dataclasses.

        Args:
          noun: see above.
          root: dataclass of keys and sections.
          rules: raises a UserError where keys do not go together.
          hidden: fields of sections that are no keys.
        """
        self.noun, self._rules = noun, rules
        self.keys = dict(_keys(root, hidden))

    def default(self) -> ConfigDict:
        """Return a fresh configuration with every key at its default."""
        tree: dict[str, Any] = {}
        for name, one in self.keys.items():
            room, _, last = name.rpartition(".")
            (tree.setdefault(room, {}) if room else tree)[last] = copy.deepcopy(one.default)
        # Dicts of the user's keys stay plain ones: a ConfigDict refuses keys with dots, and module names have them.
        # Types are held by `_convert`, which knows keys that may be of two and names the key that is wrong.
        options = {"type_safe": False, "convert_dict": False}
        return ConfigDict(
            {k: ConfigDict(v, **options) if isinstance(v, dict) else v for k, v in tree.items()}, **options
        )

    def flatten(self, config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield (dotted key, value) for every leaf of a configuration."""
        for name, value in config.items():
            name = f"{prefix}{name}"
            if isinstance(value, ConfigDict | Mapping) and name not in self.keys:
                yield from self.flatten(value, name + ".")
            else:
                yield name, _plain(value)

    def from_file(self, path: str | os.PathLike) -> ConfigDict:
        """Run a config file's `get_config()` and check the result.

        Raises:
          UserError: the file is missing, does not run, or holds an unknown key or a wrong value.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise UserError(f"{path}: there is no such config file; configs/ has examples")
        spec = importlib.util.spec_from_file_location("tpu_tune_config_file", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            config = module.get_config()
            if not isinstance(config, Mapping | ConfigDict):
                raise UserError(f"get_config() returns a {type(config).__name__}; it must return the configuration")
            return self.from_dict(config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # whatever a user's own Python can raise
            raise UserError(f"{path}: {type(error).__name__}: {error}") from error

    def from_dict(self, values: Mapping[str, Any] | ConfigDict) -> ConfigDict:
        """Lay `values` (nested, possibly partial) over the defaults and check the result."""
        config = self.default()
        for name, value in self.flatten(values):
            self.assign(config, name, value)
        return self.check(config)

    def assign(self, config: ConfigDict, name: str, value: Any) -> None:
        """Set one dotted key in place, converting text as the command line gives it to the key's type.

        Raises:
          UserError: no such key (the nearest is named), or a value that its type does not admit.
        """
        for free in self.keys:
            if name.startswith(free + ".") and dict in _kinds(self.keys[free].type):  # one entry of a dict
                before = config_get(config, free)
                value = {**(before if isinstance(before, Mapping) else {}), name[len(free) + 1 :]: value}
                name = free
        if name not in self.keys:
            raise UserError(f"unknown {self.noun} key '{name}'" + self._nearest(name))
        room, _, last = name.rpartition(".")
        try:
            value = _convert(f"{self.noun} key '{name}'", self.keys[name].type, value)
        except RecursionError:
            raise UserError(f"{self.noun} key '{name}' is nested too deep") from None
        (config[room] if room else config)[last] = value

    def check(self, config: ConfigDict) -> ConfigDict:
        """Hold every key against its type, choices and bounds, and keys against each other; return the configuration.

        Raises:
          UserError: naming the key, its value and what is allowed.
        """
        for name, one in self.keys.items():
            said = f"{self.noun} key '{name}'"
            _check(said, one.type, one.bounds, _convert(said, one.type, config_get(config, name)))
        self._rules(config)
        return config

    def _nearest(self, name: str) -> str:
        last = {known.rsplit(".")[-1]: known for known in reversed(self.keys)}  # the first of a name
        near = difflib.get_close_matches(name, self.keys, 1, 0.5)
        near = near or [last[found] for found in difflib.get_close_matches(name.rsplit(".")[-1], last, 1, 0.5)]
        return f"; did you mean '{near[0]}'?" if near else ""


def config_get(config: ConfigDict, name: str) -> Any:
    """Read one dotted key."""
    for part in name.split("."):
        config = config[part]
    return config


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Return the configuration as plain nested dicts and lists, ready for `json.dump`."""
    return _plain(config)


def _keys(root: type, hidden: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Key]]:
    hints = typing.get_type_hints(root)
    for field in dataclasses.fields(root):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from _keys(type(default), hidden, f"{field.name}.")
        elif not prefix or field.name not in hidden:
            meaning, bounds = field.metadata.get("meaning", ""), field.metadata.get("bounds", Bounds(whole=2**63 - 1))
            yield prefix + field.name, Key(hints[field.name], _plain(default), meaning, bounds)


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict | Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _kinds(hint: Any) -> dict[type, Any]:
    """The types of JSON that an annotation admits -> the part of the annotation that says so."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return {kind: part for one in typing.get_args(hint) for kind, part in _kinds(one).items()}
    if origin is Literal:
        return {str: hint}
    if origin is Any or origin in (str, int, float, bool, type(None)):
        return {origin: hint}
    return {dict if issubclass(origin, Mapping) else list: hint}


def _item(hint: Any) -> Any:
    """The annotation of the entries of a list or dict."""
    return (typing.get_args(hint) or (Any, Any))[1 if issubclass(typing.get_origin(hint) or hint, Mapping) else 0]


_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def _convert(said: str, hint: Any, value: Any, entry: bool = False) -> Any:
    """Give a value the type of an annotation, reading text as the command line writes it."""
    kinds = _kinds(hint)
    if Any in kinds:
        if isinstance(value, str) and value in _PYTHON_WORDS:  # as the command line's other booleans
            return _PYTHON_WORDS[value]
        with contextlib.suppress(ValueError):
            return json.loads(value) if isinstance(value, str) else _plain(value)
        return value
    if isinstance(value, str):
        value = _read(said, kinds, value)
    value = _plain(value)
    if isinstance(value, bool):
        if kinds.get(str, str) is not str and bool not in kinds:  # "true" among the choices
            value = str(value).lower()
    elif isinstance(value, numbers.Real):  # NumPy's scalars too
        whole = int in kinds and value == value // 1
        with contextlib.suppress(OverflowError):  # a whole number that no float holds stays one, and is refused
            value = int(value) if whole else float(value) if float in kinds or isinstance(value, float) else value
    if type(value) not in kinds:
        place = "holds {!r}; its entries must be" if entry else "is {!r}; it must be of type"
        raise UserError(f"{said} {place.format(value)} {' or '.join(_WORDS[kind][entry] for kind in kinds)}")
    if isinstance(value, dict):
        return {name: _convert(said, _item(kinds[dict]), item, True) for name, item in value.items()}
    if isinstance(value, list):
        return [_convert(said, _item(kinds[list]), item, True) for item in value]
    return value


def _read(said: str, kinds: Mapping[type, Any], text: str) -> Any:
    """Read text as one of some types; text that is none of them stays as it is."""
    stripped = text.strip()
    if list in kinds or dict in kinds:
        if stripped.startswith(("[", "{")):
            try:
                return json.loads(stripped)
            except ValueError as error:
                raise UserError(f"{said}: {stripped!r} is not JSON ({error})") from None
        if list not in kinds or dict in _kinds(_item(kinds[list])):  # a list of objects is written as JSON only
            return text
        if str not in kinds or ("," in stripped and not set(stripped) & set("*+?()|^$\\")):
            return [part.strip() for part in stripped.split(",") if part.strip()]
        # One name; a regular expression of nothing but letters would be a full path.
        return [stripped] if re.fullmatch(r"[\w.]+", stripped) else text
    words = {"true": True, "1": True, "false": False, "0": False} if bool in kinds else {}
    words |= {"none": None, "null": None} if type(None) in kinds else {}
    if stripped.lower() in words:
        return words[stripped.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if kind in kinds:
                return kind(stripped)
    return text


def _check(said: str, hint: Any, bounds: Bounds, value: Any, must: str = "is {}; it must be") -> None:
    """Hold a value of the right type against choices and bounds."""
    hint, wrong = _kinds(hint).get(type(value), Any), ""
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _check(said, Any if hint is Any else _item(hint), bounds, item, "holds {}; its entries must be")
    elif typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        value, wrong = f"'{value}'", f"one of {', '.join(typing.get_args(hint))}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        wrong = bounds.broken(value)
    if wrong:
        raise UserError(f"{said} {must.format(value)} {wrong}".replace("must be not", "must not be"))

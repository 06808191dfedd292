"""A recipe's configuration: which steps, and every option of each, as an `ml_collections.ConfigDict`.

The options are those of the steps' own dataclasses, so that `data run` and the single commands cannot part ways. A
recipe file defines `get_config()` and starts from `default()`; the command line overrides single keys
(`--config.clean.near_duplicates=0.8`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.config import flatten, from_file
from tpu_tune.data import clean, cluster, ingest
from tpu_tune.data.recipe.step_options import SplitStep, TokenizeStep
from tpu_tune.errors import UserError

STEPS: dict[str, type] = {  # name -> its options, in the order in which steps can follow each other
    "ingest": ingest.IngestOptions,
    "clean": clean.CleanOptions,
    "cluster": cluster.ClusterOptions,
    "split": SplitStep,
    "tokenize": TokenizeStep,
}
_SET_HERE = ("skip_bad", "outliers", "map")  # options that the recipe itself gives
_OWN = {
    "output_dir": str,  # the recipe's folder: one folder a step, and report.html
    "inputs": list,  # what ingest reads, or .jsonl files where ingest is left out
    "steps": list,  # which of the steps, in their order
    "skip_bad": bool,  # count what cannot be read and go on
    "num_workers": int,  # processes of ingest and tokenize; 0: what the input is worth
    "runner": str,  # local | beam: who runs ingest, clean and tokenize
    "beam_options": list,  # Apache Beam's own options, e.g. ["--runner=DataflowRunner", "--project=..."]
}


def default() -> ConfigDict:
    """Return a fresh recipe: all steps, every option at its default."""
    values: dict[str, Any] = {
        "output_dir": "output/data",
        "inputs": [],
        "steps": list(STEPS),
        "skip_bad": False,
        "num_workers": 0,
        "runner": "local",
        "beam_options": [],
    }
    for name, options in STEPS.items():
        values[name] = _section(options)
    return ConfigDict(values, type_safe=False, convert_dict=True)


def _section(options: type) -> ConfigDict:
    given = {field.name: _default(field) for field in dataclasses.fields(options) if field.name not in _SET_HERE}
    return ConfigDict(given, type_safe=False, convert_dict=False)


def _default(field: dataclasses.Field) -> Any:
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return list(value) if isinstance(value, tuple) else value


def read(path: str) -> ConfigDict:
    """Run a recipe file's `get_config()` and check the result.

    Raises:
      UserError: the file is missing, does not run, or holds an unknown key or a wrong value.
    """
    return from_file(path, from_dict)


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """Lay `values` (nested, possibly partial) over the defaults and check the result."""
    recipe = default()
    for key, value in flatten(values):
        assign(recipe, key, value)
    return check(recipe)


def assign(recipe: ConfigDict, key: str, value: Any) -> None:
    """Set one dotted key in place; text is read as JSON where that gives the key's type.

    Raises:
      UserError: no such key (the nearest is named), or a value of another type.
    """
    name, _, option = key.partition(".")
    hints = typing.get_type_hints(STEPS[name]) if name in STEPS else _OWN
    last = option if name in STEPS else key
    known = [*_OWN, *(f"{step}.{field}" for step in STEPS for field in recipe[step])]
    inner, _, entry = last.partition(".")
    if name in STEPS and entry and inner in recipe[name] and isinstance(recipe[name][inner], Mapping | ConfigDict):
        recipe[name][inner] = {**dict(recipe[name][inner]), entry: value}  # one entry of a dict
        return
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        raise UserError(f"unknown recipe key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    node = recipe[name] if name in STEPS else recipe
    node[last] = _convert(key, hints[last], value)


def _convert(key: str, hint: Any, value: Any) -> Any:
    allowed = _kinds(hint)
    if isinstance(value, str) and str not in allowed | {None}:
        value = _read(value, list in allowed)
    elif isinstance(value, str) and len(allowed) > 1:  # such as a number or "auto"
        found = _read(value, False)
        value = found if type(found) in allowed else value
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed and int not in allowed:
        value = float(value)
    if type(value) not in allowed and not (isinstance(value, Mapping) and dict in allowed):
        names = sorted("none" if kind is type(None) else kind.__name__ for kind in allowed)
        words = " or ".join(sorted(names, key="none".__eq__))  # none last
        raise UserError(f"recipe key '{key}' is {value!r}; it must be of type {words}")
    return value


def _read(text: str, several: bool) -> Any:
    try:
        return json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
    except json.JSONDecodeError:
        return [part.strip() for part in text.split(",") if part.strip()] if several else text


def _kinds(hint: Any) -> set[Any]:
    """The types that a value may have: those of a union, sequences as list, mappings as dict."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, tuple):
        return {list}
    return {dict} if isinstance(kind, type) and issubclass(kind, Mapping) else {kind}


def check(recipe: ConfigDict) -> ConfigDict:
    """Hold a recipe against what steps need of each other, and return it.

    Raises:
      UserError: naming the key, its value and what is allowed.
    """
    steps = list(recipe.steps)
    unknown = [name for name in steps if name not in STEPS]
    if unknown:
        raise UserError(f"recipe key 'steps' names '{unknown[0]}'; there are {', '.join(STEPS)}")
    if not steps or steps != [name for name in STEPS if name in steps]:
        raise UserError(
            f"recipe key 'steps' is {steps}; it must be some of {', '.join(STEPS)}, in this order, each once"
        )
    if not recipe.inputs:
        raise UserError("recipe key 'inputs' is empty; name what to read, e.g. --config.inputs=pages/,posts.csv")
    if recipe.runner not in ("local", "beam"):
        raise UserError(f"recipe key 'runner' is '{recipe.runner}'; it must be local or beam")
    if "tokenize" in steps and not recipe.tokenize.tokenizer_path:
        raise UserError("recipe key 'tokenize.tokenizer_path' is empty; give the model's directory, id or .gguf file")
    return recipe


def options_of(recipe: ConfigDict, step: str, **given: Any) -> Any:
    """Return a step's options as its dataclass."""
    hints = typing.get_type_hints(STEPS[step])
    values = {}
    for key, value in recipe[step].items():
        if isinstance(value, list) and list not in {typing.get_origin(hints[key]), hints[key]}:
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values[key] = dict(value) if isinstance(value, ConfigDict) else value
    return STEPS[step](**values, **given)

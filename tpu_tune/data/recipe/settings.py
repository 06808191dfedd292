"""A recipe's configuration: which steps, and every option of each, as an `ml_collections.ConfigDict`.

The options are those of the steps' own dataclasses, so that `data run` and the single commands cannot part ways. A
recipe file defines `get_config()` and starts from `default()`; the command line overrides single keys
(`--config.clean.near_duplicates=0.8`). Keys are read and checked by `tpu_tune.config.engine`, as those of a run are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from ml_collections import ConfigDict

from tpu_tune.config.engine import Schema, key
from tpu_tune.data.clean import CleanOptions
from tpu_tune.data.cluster import ClusterOptions
from tpu_tune.data.ingest import IngestOptions
from tpu_tune.data.recipe.step_options import SplitStep, TokenizeStep
from tpu_tune.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """A recipe's own keys, and the options of its steps in the order in which they can follow each other."""

    output_dir: str = key("output/data", "the recipe's folder: one folder a step, and report.html")
    inputs: Sequence[str] = key([], "what ingest reads, or .jsonl files where ingest is left out")
    steps: Sequence[str] = key(
        ["ingest", "clean", "cluster", "split", "tokenize"], "which of the steps, in their order"
    )
    skip_bad: bool = key(False, "count what cannot be read and go on")
    num_workers: int = key(0, "processes of ingest and tokenize; 0: what the input is worth", at_least=0)
    runner: Literal["local", "beam"] = key("local", "who runs ingest, clean and tokenize")
    beam_options: Sequence[str] = key([], 'Apache Beam\'s own, e.g. ["--runner=DataflowRunner", "--project=..."]')
    ingest: IngestOptions = IngestOptions()
    clean: CleanOptions = CleanOptions()
    cluster: ClusterOptions = ClusterOptions()
    split: SplitStep = SplitStep()
    tokenize: TokenizeStep = TokenizeStep()


STEPS = {field.name: type(field.default) for field in fields(Recipe) if is_dataclass(field.default)}


def _hold(recipe: ConfigDict) -> None:
    unknown = [name for name in recipe.steps if name not in STEPS]
    if unknown:
        raise UserError(f"recipe key 'steps' names '{unknown[0]}'; there are {', '.join(STEPS)}")
    if not recipe.steps or recipe.steps != [name for name in STEPS if name in recipe.steps]:
        raise UserError(
            f"recipe key 'steps' is {recipe.steps}; it must be some of {', '.join(STEPS)}, in this order, each once"
        )
    if not recipe.inputs:
        raise UserError("recipe key 'inputs' is empty; name what to read, e.g. --config.inputs=pages/,posts.csv")
    if "tokenize" in recipe.steps and not recipe.tokenize.tokenizer_path:
        raise UserError("recipe key 'tokenize.tokenizer_path' is empty; give the model's directory, id or .gguf file")


_SCHEMA = Schema("recipe", Recipe, _hold, hidden=("skip_bad", "outliers", "map"))  # which the recipe itself gives
default, read = _SCHEMA.default, _SCHEMA.from_file
from_dict, assign = _SCHEMA.from_dict, _SCHEMA.assign


def options_of(recipe: ConfigDict, step: str, **given: Any) -> Any:
    """Return a step's options as its dataclass."""
    return STEPS[step](**{name: _frozen(value) for name, value in recipe[step].items()}, **given)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value

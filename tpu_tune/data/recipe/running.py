"""Running a recipe: its steps in order, each kept, and one report renewed after each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.data.recipe import settings
from tpu_tune.data.recipe.recipe_report import write_report
from tpu_tune.data.recipe.stages import Done, run_stages
from tpu_tune.data.recipe.steps import stages_of

REPORT = "report.html"
_VERSION = "1"  # raise it when a step would give something else from the same input and options


def run_recipe(recipe: Mapping[str, Any] | ConfigDict) -> list[Done]:
    """Run a recipe; steps that were finished before, from the same inputs and options, are not run again.

    Args:
      recipe: from `default()` or `settings.read`, or nested dicts of what differs from the defaults.

    Returns:
      The finished steps in their order. `report.html` in the recipe's folder is renewed after each.

    Raises:
      UserError: a wrong recipe, or a step failed; what was finished before stays.
    """
    recipe = settings.from_dict(recipe)
    folder, finished = Path(recipe.output_dir).expanduser(), []

    def renew(done: Done) -> None:
        finished.append(done)
        write_report(folder / REPORT, f"Data: {os.fspath(folder)}", finished)

    return run_stages(stages_of(recipe), list(recipe.inputs), folder, _VERSION, renew)

"""`tpu-tune data run`: all steps of a recipe file, in order."""

from __future__ import annotations

import argparse
import json
import os

from tpu_tune.cli.common import Commands


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "run",
        run,
        "run the steps of a recipe; what is done already is not done again",
        "tpu-tune data run --config configs/data_python_docs.py --config.clean.near_duplicates=0.8",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="recipe file; --config.KEY=VALUE overrides a key"
    )
    parser.add_argument(
        "--runner",
        choices=("local", "beam"),
        help="who runs ingest, clean and tokenize: this machine, or Apache Beam (default: the recipe's)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count what cannot be read and go on")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.data import recipe as recipes

    recipe = recipes.settings.read(options.config)
    for key, value in options.overrides:
        recipes.settings.assign(recipe, key, value)
    recipe.runner = options.runner or recipe.runner
    recipe.skip_bad = options.skip_bad or recipe.skip_bad
    finished = recipes.run_recipe(recipe)
    report = os.path.join(recipe.output_dir, recipes.REPORT)
    if options.json:
        steps = [
            {"step": done.name, "cached": done.cached, "seconds": done.seconds, "outputs": done.outputs, **done.report}
            for done in finished
        ]
        print(json.dumps({"report": report, "steps": steps}, indent=2, ensure_ascii=False))
        return 0
    for done in finished:
        rows = done.report["rows_out"]
        took = "was done" if done.cached else f"{done.seconds:.1f} s"
        print(f"{done.name:<9} {rows:>10,} rows  {took:>9}  {' '.join(done.outputs)}")
    print(f"report: {report}\ntrain on it:\n  {recipes.advice(recipe.steps, finished[-1].outputs)}")
    return 0

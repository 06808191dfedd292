"""`tpu-tune lr-find`: which learning rate to train with."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from tpu_tune.cli.common import Commands, read_config
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "lr-find",
        run,
        "find a learning rate: a range test on the model and data of a config, then short runs",
        "tpu-tune lr-find --config configs/qlora.py --config.model.path=DIR --config.data.train=chats.jsonl",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="config file; --config.KEY=VALUE overrides a key"
    )
    parser.add_argument(
        "--min", type=float, default=1e-7, metavar="RATE", help="the range test's lowest (default 1e-7)"
    )
    parser.add_argument("--max", type=float, default=1.0, metavar="RATE", help="the range test's highest (default 1)")
    parser.add_argument(
        "--steps",
        type=int,
        default=60,
        metavar="N",
        help="of the range test, and of the longest runs of --bracket (default 60)",
    )
    parser.add_argument(
        "--bracket",
        nargs="?",
        const="",
        metavar="LOW,HIGH",
        help="runs at five rates from LOW to HIGH, then at the best three, drawn closer, twice as long, then at the best two; "
        "without LOW,HIGH around what the range test suggests",
    )
    parser.add_argument("--output", default="lr.png", metavar="FILE", help="the picture (default lr.png)")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    config, around = read_config(options), _bracket(options.bracket)
    _check_output(options.output)
    from tpu_tune.training import distributed

    with distributed.leaving_alone():
        distributed.join()
    import jax

    from tpu_tune.curves.learning_rate.find import figures, find
    from tpu_tune.curves.learning_rate.plot import draw

    def say(line: str) -> None:
        if jax.process_index() == 0:
            print(line, file=sys.stderr, flush=True)

    with distributed.leaving_alone():
        found = find(config, options.min, options.max, options.steps, around, options.bracket == "", say)
    if jax.process_index() != 0:
        return 0
    try:
        draw(found, options.output, os.path.basename(config.model.path))
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be written: {error.strerror or error}") from error
    told = {**figures(found, config), "plot": options.output}
    print(json.dumps(told, indent=2) if options.json else _text(told))
    return 0


def _bracket(text: str | None) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--bracket {text}: give two rates, lowest first, such as 1e-5,1e-3") from None
    return low, high


def _check_output(path: str) -> None:
    """Raise before the work where the picture clearly has no place."""
    folder = os.path.dirname(path) or "."
    if "://" not in path and not os.path.isdir(folder):
        raise UserError(f"--output {path}: there is no directory {folder}")


def _text(told: dict[str, Any]) -> str:
    rows = [("steps", "learning rate", "train loss", "eval loss", "")]
    best = {
        steps: min(run["score"] for run in told["runs"] if run["steps"] == steps and run["score"] is not None)
        for steps in {run["steps"] for run in told["runs"] if run["score"] is not None}
    }
    for run in told["runs"]:
        note = "ran away" if run["score"] is None else "best" if run["score"] == best[run["steps"]] else ""
        losses = [f"{run[key]:.4f}" if run.get(key) is not None else "-" for key in ("train_loss", "eval_loss")]
        rows.append((str(run["steps"]), f"{run['learning_rate']:.1e}", *losses, note))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    table = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    low, high = told["good"]
    return "\n".join(
        [
            *table,
            f"suggested learning rate: {told['learning_rate']:.1e}",
            f"why: {told['reason']}",
            f"too slow below about {low:.1e}, too fast above about {high:.1e}; {told['configured']}",
            f"train with it: --config.train.learning_rate={told['learning_rate']:.1e}",
            f"plot: {told['plot']}",
        ]
    )

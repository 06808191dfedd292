"""`tpu-tune lr-find`: find a learning rate to train with."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, add_config, join_hosts, read_config, say
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "lr-find",
        run,
        "find a learning rate for a config: a range test on its model and data, then short runs",
        "tpu-tune lr-find --config configs/qlora.py --config.model.path=DIR --config.data.train=chats.jsonl",
    )
    add_config(parser, required=True)
    parser.add_argument(
        "--min", type=numbers.real(), default=1e-7, metavar="RATE", help="lowest rate of the range test (default 1e-7)"
    )
    parser.add_argument(
        "--max", type=numbers.real(), default=1.0, metavar="RATE", help="highest rate of the range test (default 1)"
    )
    parser.add_argument(
        "--steps",
        type=numbers.whole(),
        default=60,
        metavar="N",
        help="length of the range test, and of the longest runs of --bracket; the short runs after the test have a "
        "quarter of it, 15 at most (default 60)",
    )
    parser.add_argument(
        "--bracket",
        nargs="?",
        const="",
        metavar="LOW,HIGH",
        help="search with rounds of longer runs: five rates from LOW to HIGH, then three around the best, then the "
        "best two, each round twice as long as the one before (default LOW,HIGH: around the range test's suggestion)",
    )
    parser.add_argument("--output", default="lr.png", metavar="FILE", help="picture to write (default lr.png)")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from tpu_tune.curves.learning_rate.finder_options import FinderOptions

    config, bracket = read_config(options), _rates(options.bracket)
    _check_output(options.output)
    finder = FinderOptions(options.min, options.max, options.steps, bracket, narrow=options.bracket == "")
    finder.check()
    join_hosts()
    import jax

    from tpu_tune.curves.learning_rate.find import figures, find
    from tpu_tune.curves.learning_rate.plot import draw
    from tpu_tune.training import distributed

    is_main = jax.process_index() == 0
    with distributed.leaving_alone():
        result = find(config, finder, say if is_main else lambda line: None)
    if not is_main:
        return 0
    try:
        draw(result, options.output, os.path.basename(config.model.path))
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be written: {error.strerror or error}") from error
    report = {**figures(result, config), "plot": options.output}
    print(json.dumps(report, indent=2) if options.json else _text(report))
    return 0


def _rates(text: str | None) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        low, high = (float(rate) for rate in text.split(","))
    except ValueError:
        raise UserError(f"--bracket {text}: give two rates, lowest first, such as 1e-5,1e-3") from None
    return low, high


def _check_output(path: str) -> None:
    """Raise before the work if the picture's directory does not exist."""
    directory = os.path.dirname(path) or "."
    if "://" not in path and not os.path.isdir(directory):
        raise UserError(f"--output {path}: there is no directory {directory}")


def _text(report: dict[str, Any]) -> str:
    table = [("steps", "learning rate", "train loss", "eval loss", "")]
    best = {
        steps: min(run["score"] for run in report["runs"] if run["steps"] == steps and run["score"] is not None)
        for steps in {run["steps"] for run in report["runs"] if run["score"] is not None}
    }
    for run in report["runs"]:
        note = "diverged" if run["score"] is None else "best" if run["score"] == best[run["steps"]] else ""
        losses = [f"{run[key]:.4f}" if run.get(key) is not None else "-" for key in ("train_loss", "eval_loss")]
        table.append((str(run["steps"]), f"{run['learning_rate']:.1e}", *losses, note))
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    low, high = report["good"]
    return "\n".join(
        [
            *["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table],
            f"suggested learning rate: {report['learning_rate']:.1e}",
            f"why: {report['reason']}",
            f"rates below about {low:.1e} are too low, above about {high:.1e} too high; {report['configured']}",
            f"train with it: --config.train.learning_rate={report['learning_rate']:.1e}",
            f"plot: {report['plot']}",
        ]
    )

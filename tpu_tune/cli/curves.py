"""`tpu-tune curves`: what the curves of runs look like, and what they say."""

from __future__ import annotations

import argparse
import json
import os

from tpu_tune.cli.common import Commands
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "curves",
        run,
        "draw the learning curves of runs, and say whether they are underfit, overfit or well-fit",
        "tpu-tune curves output --html report.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directory (output_dir), or a metrics.jsonl; several are laid over each other",
    )
    parser.add_argument(
        "--x", choices=("steps", "tokens", "epochs"), default="steps", help="what to draw over (default steps)"
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.9,
        metavar="BETA",
        help="weight of the past in the moving average of training curves, 0 for none (default 0.9)",
    )
    parser.add_argument("--output", metavar="PNG", help="write the curves as a picture")
    parser.add_argument("--html", metavar="FILE", help="write a report: one HTML file that needs nothing else")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    if not 0 <= options.smooth < 1:
        raise UserError(f"--smooth is {options.smooth:g}; it must be at least 0 and below 1")
    for name, path in (("--output", options.output), ("--html", options.html)):
        if path and os.path.isdir(path):
            raise UserError(f"{name} {path} is a directory; name a file")
    from tpu_tune.curves.runs import read_runs

    runs = read_runs(options.runs)
    diagnoses = [run.diagnosis() for run in runs]
    written = {}
    if options.output:
        from tpu_tune.curves.overlay import plot_runs

        plot_runs(runs, options.output, options.x, options.smooth)
        written["output"] = options.output
    if options.html:
        from tpu_tune.curves.report import write_report

        write_report(runs, diagnoses, options.html, options.x, options.smooth)
        written["html"] = options.html
    from tpu_tune.curves import text

    if options.json:
        rows = [
            {"run": run.path, "notes": run.notes, "diagnosis": diagnosis.as_dict(), "figures": text.figures(run)}
            for run, diagnosis in zip(runs, diagnoses, strict=True)
        ]
        print(json.dumps({"runs": rows, **written}))
        return 0
    for run, diagnosis in zip(runs, diagnoses, strict=True):
        print("\n".join(text.lines(run, diagnosis, options.smooth)))
    for path in written.values():
        print(f"written: {path}")
    return 0

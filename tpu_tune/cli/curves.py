"""`tpu-tune curves`: draw the learning curves of runs, and diagnose them."""

from __future__ import annotations

import argparse
import json
import os

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "curves",
        run,
        "draw the learning curves of runs, diagnose them (underfit, overfit, well-fit, unstable), and compare several",
        "tpu-tune curves output --html report.html\n  tpu-tune curves output other",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directory (output_dir), or a metrics.jsonl; several are compared, and drawn into the same picture",
    )
    parser.add_argument(
        "--x", choices=("steps", "tokens", "epochs"), default="steps", help="what the x axis shows (default steps)"
    )
    parser.add_argument(
        "--smooth",
        type=numbers.real(),
        default=0.9,
        metavar="BETA",
        help="how much training curves are smoothed, 0 for not at all (default 0.9): as much as an exponential average "
        "with this weight of the past, but centred, so that nothing lags; the number of points is written beside them",
    )
    parser.add_argument("--output", metavar="PNG", help="picture to write")
    parser.add_argument("--html", metavar="FILE", help="report to write: one HTML file that works offline")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    if not 0 <= options.smooth < 1:
        raise UserError(f"--smooth is {options.smooth:g}; it must be at least 0 and below 1")
    for name, path in (("--output", options.output), ("--html", options.html)):
        if path and os.path.isdir(path):
            raise UserError(f"{name} {path} is a directory; name a file")
    from tpu_tune.curves import terminal
    from tpu_tune.curves.comparison import beside, compare
    from tpu_tune.curves.runs import read_runs

    runs = read_runs(options.runs)
    diagnoses = [run.diagnosis() for run in runs]
    compared = compare(runs, diagnoses) if len(runs) > 1 else None
    diagnoses = beside(runs, diagnoses)
    written = {}
    if options.output:
        from tpu_tune.curves.comparison_plot import plot_runs

        plot_runs(runs, options.output, options.x, options.smooth)
        written["output"] = options.output
    if options.html:
        from tpu_tune.curves.report import write_report

        write_report(runs, diagnoses, options.html, options.x, options.smooth)
        written["html"] = options.html
    if options.json:
        rows = [
            {"run": run.path, "notes": run.notes, "diagnosis": diagnosis.as_dict(), "figures": terminal.figures(run)}
            for run, diagnosis in zip(runs, diagnoses, strict=True)
        ]
        comparison = {"comparison": compared.as_dict()} if compared else {}
        print(json.dumps({"runs": rows, **comparison, **written}))
        return 0
    for run, diagnosis in zip(runs, diagnoses, strict=True):
        print("\n".join(terminal.lines(run, diagnosis, options.smooth)))
    if compared:
        print("\n".join(compared.lines()))
    for path in written.values():
        print(f"written: {path}")
    return 0

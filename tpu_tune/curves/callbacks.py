"""Callbacks of training: `curves.png` and a line on the progress at every evaluation, `report.html` at the end.

`tpu_tune.train` passes `on_evaluate` to the training loop, which itself knows nothing of curves. No failure here ends a
run: it is logged as a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.curves.diagnosis import diagnose
from tpu_tune.curves.learning_rate.hint import NewHints
from tpu_tune.curves.report import write_report
from tpu_tune.curves.run_plot import plot_curves
from tpu_tune.curves.runs import read_run
from tpu_tune.curves.terminal import verdict_lines
from tpu_tune.errors import UserError

log = logging.getLogger(__name__)


def on_evaluate(output_dir: str) -> Callable[[list[dict[str, Any]]], str | None]:
    """Return the loop's callback after an evaluation.

    It takes all metrics rows so far, draws `curves.png` into the run directory, and returns lines to print, or None.
    """
    run_summary: dict[str, Any] = {}
    new_hint = NewHints()

    def callback(rows: list[dict[str, Any]]) -> str | None:
        try:
            plot_curves(rows, os.path.join(output_dir, "curves.png"))
        except Exception as error:  # a picture is no reason to stop training
            log.warning("curves.png could not be written: %s", error)
        try:
            run_summary.update(run_summary or RunDirectory(output_dir).summary())
            diagnosis = diagnose(rows, (), run_summary.get("vocab_size"), run_summary.get("total_steps"))
            lines = ["" if diagnosis.done else diagnosis.line(), new_hint(rows)]  # `on_train_end` has the last verdict
            return "\n".join(filter(None, lines)) or None
        except Exception as error:  # nor is a remark
            log.warning("the curves could not be judged (%s: %s)", type(error).__name__, error)
            return None

    return callback


def on_train_end(output_dir: str) -> list[str]:
    """Write `report.html` into the run directory; return the verdict, its evidence and advice as lines to print."""
    try:
        run = read_run(output_dir)
        diagnosis = run.diagnosis()
        path = os.path.join(output_dir, "report.html")
        write_report([run], [diagnosis], path)
        return [*verdict_lines(diagnosis), f"report: {path}"]
    except (UserError, OSError) as error:
        log.warning("no report was written: %s", error)
    except Exception as error:  # the result is written, and tpu-tune curves can make the report again
        log.warning("no report was written (%s: %s)", type(error).__name__, error)
    return []

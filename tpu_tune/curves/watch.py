"""What a run does with its curves while it trains: a picture and a line at every evaluation, a report at the end.

`tpu_tune.train` hands `watch` to the training loop, which knows nothing of curves. None of this may end a run: what goes
wrong here is a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.curves.diagnosis import diagnose
from tpu_tune.curves.learning_rate.hint import teller
from tpu_tune.curves.plot import plot_curves
from tpu_tune.curves.report import write_report
from tpu_tune.curves.runs import read_run
from tpu_tune.curves.text import verdict_lines
from tpu_tune.errors import UserError

log = logging.getLogger(__name__)


def watch(output_dir: str) -> Callable[[list[dict[str, Any]]], str | None]:
    """Return what the loop calls with all rows after an evaluation: it draws `curves.png` and returns a line to show."""
    about: dict[str, Any] = {}
    hints: list[str] = []
    tell = teller(hints.append)

    def look(rows: list[dict[str, Any]]) -> str | None:
        try:
            plot_curves(rows, os.path.join(output_dir, "curves.png"))
        except Exception as error:  # a picture is no reason to stop training
            log.warning("curves.png could not be written: %s", error)
        try:
            about.update(about or RunDirectory(output_dir).summary())
            found = diagnose(rows, (), about.get("vocab_size"), about.get("total_steps"))
            hints.clear()
            tell(rows)
            lines = [*([] if found.done else [found.line()]), *hints]  # `conclude` says the last verdict
            return "\n".join(lines) or None
        except Exception as error:  # nor is a remark
            log.warning("the curves could not be judged (%s: %s)", type(error).__name__, error)
            return None

    return look


def conclude(output_dir: str) -> list[str]:
    """Write `report.html` into the run directory; return the verdict, with its evidence and advice, as lines to show."""
    try:
        run = read_run(output_dir)
        diagnosis = run.diagnosis()
        path = os.path.join(output_dir, "report.html")
        write_report([run], [diagnosis], path)
        return [*verdict_lines(diagnosis), f"report: {path}"]
    except (UserError, OSError) as error:
        log.warning("no report was written: %s", error)
    except Exception as error:  # the run is done and its result written; a report can be made again by tpu-tune curves
        log.warning("no report was written (%s: %s)", type(error).__name__, error)
    return []

"""`report.html`: everything that a run says about itself in one file that needs nothing else, not even a network.

The verdict with its numbers, the curves (inline SVG, drawn without any script; a small one shows values under the
pointer), sample answers, the data's counts, memory and speed, and what of the configuration differs from the defaults.
The page is rendered from `templates/run_report.html`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.curves import svg_chart
from tpu_tune.curves.comparison import compare
from tpu_tune.curves.diagnosis import Diagnosis
from tpu_tune.curves.plot_style import run_colors
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import FEW, QUANTITIES, series, smoothed_over, smoothing_window
from tpu_tune.data.html_report import render
from tpu_tune.errors import UserError

# Keys of the data's summary, in a reader's words.
_DATA = {
    "format": "format", "rows": "rows read", "used_examples": "examples used", "used_tokens": "tokens",
    "used_target_tokens": "tokens with a loss", "packed_rows": "packed rows", "width": "tokens a row",
    "fill": "share of a row that is text", "truncated": "rows cut to length", "eos_lost": "answers that lost their end",
    "bad_rows": "bad rows skipped", "dropped": "rows left out",
}  # fmt: skip


def write_report(
    runs: Sequence[CurveRun],
    diagnoses: Sequence[Diagnosis],
    path: str | os.PathLike,
    x: str = "steps",
    beta: float = 0.9,
) -> None:
    """Write the report of one run or of several, aside and renamed.

    Raises:
      UserError: it cannot be written.
    """
    try:
        storage.write_bytes(path, page(runs, diagnoses, x, beta).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


def page(runs: Sequence[CurveRun], diagnoses: Sequence[Diagnosis], x: str = "steps", beta: float = 0.9) -> str:
    """Return the report as HTML; arguments as `write_report`."""
    charts: list[tuple[str, svg_chart.Chart]] = []
    for quantity in QUANTITIES:
        drawn = svg_chart.draw(runs, quantity, x, beta, len(charts))
        if drawn is not None:
            charts.append((quantity.name, drawn))
    return render(
        "tpu_tune.curves",
        "run_report.html",
        title=", ".join(run.name for run in runs),
        runs=list(zip(runs, diagnoses, strict=True)),
        smoothed=_smoothed(runs, beta),
        comparison=compare(runs, diagnoses) if len(runs) > 1 else None,
        colors=_colors(runs),
        charts=charts,
        sections=[*_samples(runs), _data(runs), _speed(runs), _config(runs)],
        data=[drawn.data for _, drawn in charts],
    )


def _smoothed(runs: Sequence[CurveRun], beta: float) -> str:
    """Over how many points the training losses are smoothed."""
    counts = [len(series(run.metrics, "loss")[0]) for run in runs]
    widths = sorted({smoothing_window(count, beta) for count in counts if count >= FEW} or {1})
    return smoothed_over(widths[-1]) if len(widths) < 2 else f"smoothed over {widths[0]} to {widths[-1]} points"


def _colors(runs: Sequence[CurveRun]) -> list[tuple[str, str]]:
    """What each colour stands for: (name, colour)."""
    if len(runs) == 1:
        return list(zip(("train", "eval"), run_colors(0, 1), strict=True))
    return [(run.name, run_colors(number, len(runs))[0]) for number, run in enumerate(runs)]


@dataclass(frozen=True)
class Section:
    """A titled table of the report; one without rows is left out.

    Attributes:
      title: its heading.
      head: the columns' names.
      rows: of cells.
      verbatim: keep the cells' line breaks.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    verbatim: bool = False


def _samples(runs: Sequence[CurveRun]) -> list[Section]:
    return [
        Section(
            "Sample answers" + (f": {run.name}" if len(runs) > 1 else ""),
            ["prompt", "before training", "after"],
            [[row["prompt"], row["before"], row["after"]] for row in run.samples],
            verbatim=True,
        )
        for run in runs
    ]


def _data(runs: Sequence[CurveRun]) -> Section:
    columns, sets = [""], []
    for run in runs:
        for side, counts in run.summary.get("data", {}).items():
            if isinstance(counts, Mapping):
                columns.append(side if len(runs) == 1 else f"{run.name}, {side}")
                sets.append(counts)
    rows = [[words, *[_value(counts.get(key)) for counts in sets]] for key, words in _DATA.items()]
    return Section("Data", columns, [row for row in rows if any(row[1:])])


def _speed(runs: Sequence[CurveRun]) -> Section:
    rows = []
    for words, value in (
        ("devices", lambda run: run.summary.get("devices")),
        ("model", lambda run: run.summary.get("model")),
        ("parameters", lambda run: run.summary.get("parameters")),
        ("of them trained", lambda run: run.summary.get("trainable_parameters")),
        ("steps", lambda run: run.summary.get("total_steps")),
        ("rows a step", lambda run: run.summary.get("rows_per_step")),
        ("tokens a second, median", lambda run: _middle(run, "tokens_per_second")),
        ("tokens a second, as estimated before", lambda run: _estimated(run, "tokens_per_second")),
        ("the estimate is", lambda run: run.summary.get("estimate", {}).get("how")),
        ("measured, of the estimate", _share_of_estimate),
        ("taken for what was left open", lambda run: _chosen(run.summary.get("chosen"))),
        ("seconds an evaluation, median", lambda run: _middle(run, "eval_runtime")),
        (
            "tokens trained on",
            lambda run: max((r["num_tokens"] for r in run.metrics if r.get("num_tokens")), default=None),
        ),
        ("peak memory of a device", lambda run: _bytes(run.summary.get("device_peak_bytes"))),
        ("peak memory of the process", lambda run: _bytes(run.summary.get("host_peak_bytes"))),
        ("the result, read back from its files, is", lambda run: _read_back(run.summary.get("result_read_back"))),
    ):
        row = [words, *[_value(value(run)) for run in runs]]
        if any(row[1:]):
            rows.append(row)
    names = ["" if len(runs) == 1 else run.name for run in runs]
    return Section("Memory and speed", ["", *names], rows)


def _config(runs: Sequence[CurveRun]) -> Section:
    default = dict(configuration.flatten(configuration.default()))
    flat = [dict(configuration.flatten(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "output_dir"]
    rows = []
    for key in keys:
        values = [one.get(key) for one in flat]
        if any(value is not None and value != default.get(key) for value in values):
            rows.append([key, *[_value(value) for value in values], _value(default.get(key))])
    names = ["this run"] if len(runs) == 1 else [run.name for run in runs]
    return Section("Configuration, where it differs from the defaults", ["key", *names, "default"], rows)


def _value(value: Any) -> str:
    if value is None or value == {} or value == []:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float, Mapping)):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {count}" for key, count in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _middle(run: CurveRun, key: str) -> float | None:
    _, values = series(run.metrics, key)
    return float(f"{np.median(values):.4g}") if len(values) else None


def _estimated(run: CurveRun, key: str) -> float | None:
    """A figure of the plan that the run was started with."""
    value = run.summary.get("estimate", {}).get(key)
    return float(f"{value:.4g}") if isinstance(value, (int, float)) else None


def _share_of_estimate(run: CurveRun) -> str | None:
    """How much of the estimated speed was measured."""
    measured, estimated = _middle(run, "tokens_per_second"), _estimated(run, "tokens_per_second")
    return f"{measured / estimated:.0%}" if measured and estimated else None


def _chosen(found: Any) -> str | None:
    if not isinstance(found, Mapping):
        return None
    keys = ", ".join(f"{key}={value}" for key, value in found.items() if key != "why")
    return f"{keys}: {found.get('why', '')}"


def _read_back(found: Any) -> str | None:
    """What reading the written result back has shown."""
    if not isinstance(found, Mapping):
        return None
    return ("NOT what was trained: " if found.get("failed") else "what was trained: ") + str(found.get("words"))


def _bytes(count: Any) -> str | None:
    return f"{count / 1e9:.2f} GB" if isinstance(count, (int, float)) else None

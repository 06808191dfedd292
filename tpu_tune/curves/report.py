"""`report.html`: everything that a run says about itself in one file that needs nothing else, not even a network.

The verdict with its numbers, the curves (inline SVG, drawn without any script; a small one shows values under the
pointer), sample answers, the data's counts, memory and speed, and what of the configuration differs from the defaults.
Every text from outside is escaped, and the page forbids itself to load anything.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.curves import svg_chart
from tpu_tune.curves.diagnosis import Diagnosis
from tpu_tune.curves.plot_style import run_colors
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import QUANTITIES, series
from tpu_tune.errors import UserError

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
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
    drawn = []
    for quantity in QUANTITIES:
        found = svg_chart.draw(runs, quantity, x, beta, len(drawn))
        if found is not None:
            drawn.append((quantity.name, found))
    title = ", ".join(run.name for run in runs)
    body = [
        "".join(
            f'<input class="show" type="radio" name="show" id="show-{name}"{" checked" if name == "both" else ""}>'
            for name in ("both", "raw", "smooth")
        ),
        f"<main><h1>{_text(title)}</h1>",
        '<div class="cards">',
        *map(_card, runs, diagnoses),
        "</div>",
        "<h2>Curves</h2>",
        _switch(beta),
        _key(runs),
        '<div class="charts">',
        *[f"<section><h3>{_text(name)}</h3>{found.svg}</section>" for name, found in drawn],
        "</div>",
        *[part for run in runs for part in _samples(run, len(runs) > 1)],
        _data(runs),
        _speed(runs),
        _config(runs),
        "<footer>Written by tpu-tune. Hover over a curve for its values, or focus it and use the arrow keys.</footer>",
        '</main><div id="values" hidden></div>',
        f'<script type="application/json" id="charts">{_json([found.data for _, found in drawn])}</script>',
        f"<script>{_asset('report.js')}</script>",
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_asset('report.css')}</style></head><body>\n"
    )
    return head + "\n".join(part for part in body if part) + "\n</body></html>\n"


def _card(run: CurveRun, diagnosis: Diagnosis) -> str:
    going = "" if diagnosis.done else " so far"
    return (
        f'<div class="card {_text(diagnosis.verdict.replace(" ", "-"))}"><div class="run">{_text(run.path)}</div>'
        f'<div class="verdict">{_text(diagnosis.title)}{going}</div>'
        f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in diagnosis.evidence)}</ul>"
        f"<div>What to try:</div><ul>{''.join(f'<li>{_text(line)}</li>' for line in diagnosis.advice)}</ul>"
        f"{''.join(f'<div class=note>{_text(note)}</div>' for note in run.notes)}</div>"
    )


def _switch(beta: float) -> str:
    words = {"both": "both", "raw": "as logged", "smooth": f"smoothed ({beta:g})"}
    return '<div class="switch">' + "".join(f'<label for="show-{k}">{w}</label>' for k, w in words.items()) + "</div>"


def _key(runs: Sequence[CurveRun]) -> str:
    names = [
        (side if len(runs) == 1 else f"{run.name}", color)
        for place, run in enumerate(runs)
        for side, color in zip(("train", "eval"), run_colors(place, len(runs)), strict=True)
    ]
    if len(runs) > 1:
        names = names[::2]
    found = "".join(
        f'<span class="key"><span class="dot" style="background:{c}"></span>{_text(n)}</span>' for n, c in names
    )
    return f'<div>{found}<span class="key">dots: evaluations</span></div>'


def _samples(run: CurveRun, named: bool) -> Iterable[str]:
    if not run.samples:
        return []
    rows = [[row["prompt"], row["before"], row["after"]] for row in run.samples]
    title = "Sample answers" + (f": {run.name}" if named else "")
    return [f"<h2>{_text(title)}</h2>", _table(["prompt", "before training", "after"], rows, "pre")]


def _data(runs: Sequence[CurveRun]) -> str:
    columns, sets = [""], []
    for run in runs:
        for side, counts in run.summary.get("data", {}).items():
            if isinstance(counts, Mapping):
                columns.append(side if len(runs) == 1 else f"{run.name}, {side}")
                sets.append(counts)
    rows = [[words, *[_value(counts.get(key)) for counts in sets]] for key, words in _DATA.items()]
    rows = [row for row in rows if any(row[1:])]
    return f"<h2>Data</h2>{_table(columns, rows)}" if rows else ""


def _speed(runs: Sequence[CurveRun]) -> str:
    rows = []
    for words, value in (
        ("devices", lambda run: run.summary.get("devices")),
        ("model", lambda run: run.summary.get("model")),
        ("parameters", lambda run: run.summary.get("parameters")),
        ("of them trained", lambda run: run.summary.get("trainable_parameters")),
        ("steps", lambda run: run.summary.get("total_steps")),
        ("rows a step", lambda run: run.summary.get("rows_per_step")),
        ("tokens a second, median", lambda run: _middle(run, "tokens_per_second")),
        ("seconds an evaluation, median", lambda run: _middle(run, "eval_runtime")),
        (
            "tokens trained on",
            lambda run: max((r["num_tokens"] for r in run.metrics if r.get("num_tokens")), default=None),
        ),
        ("peak memory of a device", lambda run: _bytes(run.summary.get("device_peak_bytes"))),
        ("peak memory of the process", lambda run: _bytes(run.summary.get("host_peak_bytes"))),
    ):
        row = [words, *[_value(value(run)) for run in runs]]
        if any(row[1:]):
            rows.append(row)
    names = ["" if len(runs) == 1 else run.name for run in runs]
    return f"<h2>Memory and speed</h2>{_table(['', *names], rows)}" if rows else ""


def _config(runs: Sequence[CurveRun]) -> str:
    default = dict(configuration.flatten(configuration.default()))
    flat = [dict(configuration.flatten(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "output_dir"]
    rows = []
    for key in keys:
        values = [one.get(key) for one in flat]
        if any(value is not None and value != default.get(key) for value in values):
            rows.append([key, *[_value(value) for value in values], _value(default.get(key))])
    if not rows:
        return ""
    names = ["this run"] if len(runs) == 1 else [run.name for run in runs]
    return f"<h2>Configuration, where it differs from the defaults</h2>{_table(['key', *names, 'default'], rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    names = "".join(f"<th>{_text(name)}</th>" for name in head) if any(head) else ""
    lines = "".join("<tr>" + "".join(f"<td{style}>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{names}</tr>' if names else ''}{lines}</table>"


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


def _bytes(count: Any) -> str | None:
    return f"{count / 1e9:.2f} GB" if isinstance(count, (int, float)) else None


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _asset(name: str) -> str:
    return resources.files("tpu_tune.curves").joinpath(name).read_text(encoding="utf-8")

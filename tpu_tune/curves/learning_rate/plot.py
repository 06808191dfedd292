"""The picture of `tpu-tune lr-find`: the range test with its regions, and the short runs."""

from __future__ import annotations

import io
import math
import os
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tpu_tune.checkpoints import storage
from tpu_tune.curves.learning_rate.find import Found

_INK, _MUTED, _LINE, _POINT = "#1f2937", "#6b7280", "#2563eb", "#ea580c"
_REGIONS = {"too slow": "#dbeafe", "good": "#dcfce7", "too fast": "#fee2e2"}


def draw(found: Found, path: str | os.PathLike, title: str = "") -> Figure:
    """Draw what was found into a PNG file, written aside and renamed; it may be in a bucket."""
    panels = (found.test is not None) + bool(found.runs)
    figure = Figure(figsize=(8, 4.2 * panels), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    if found.test is not None:
        _draw_test(axes[0], found)
    if found.runs:
        _draw_runs(axes[-1], found)
    ends = [
        rate
        for rate in (*(found.test.rates if found.test is not None else ()), *[run.learning_rate for run in found.runs])
    ]
    for one in axes:
        one.set_xscale("log")
        one.set_xlim(min(ends) / 1.3, max(ends) * 1.3)
        _shade(one, found)
        one.axvline(found.suggestion.rate, color=_INK, linewidth=1.5, linestyle="--")
        one.set_ylabel("loss")
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    axes[-1].set_xlabel("learning rate")
    axes[0].set_title(
        f"{title + ': ' if title else ''}suggested learning rate {found.suggestion.rate:.1e}", loc="left", color=_INK
    )
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    storage.write_bytes(path, drawn.getvalue())
    return figure


def regions(found: Found, left: float, right: float) -> dict[str, tuple[float, float]]:
    """Return the ends of "too slow", "good" and "too fast" between two rates; those that are not there are left out."""
    cuts = [left, found.suggestion.low, found.suggestion.high, right]
    cuts = [
        left if math.isnan(cut) and place < 2 else right if math.isnan(cut) else min(max(cut, left), right)
        for place, cut in enumerate(cuts)
    ]
    named = dict(zip(_REGIONS, zip(cuts[:-1], cuts[1:], strict=True), strict=True))
    return {name: ends for name, ends in named.items() if ends[0] < ends[1]}


def _shade(axes: Any, found: Found) -> None:
    for name, (left, right) in regions(found, *axes.get_xlim()).items():
        axes.axvspan(left, right, color=_REGIONS[name], zorder=0, label=name)
        axes.text(
            math.sqrt(left * right),
            0.97,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            color=_MUTED,
        )


def _draw_test(axes: Any, found: Found) -> None:
    test = found.test
    scaled = test.losses / test.untrained * test.smoothed[0]
    axes.plot(test.rates, scaled, ".", color=_LINE, alpha=0.35, label="a step")
    axes.plot(test.rates, test.smoothed, color=_LINE, linewidth=2, label="smoothed")
    start, lowest = test.smoothed[0], np.nanmin(test.smoothed)
    axes.set_ylim(max(0, lowest - 0.6 * (start - lowest)), start + 1.5 * (start - lowest))
    axes.set_title(
        "range test: loss while the rate climbs, against the untouched model's on the same batches",
        loc="left",
        fontsize=9,
        color=_MUTED,
    )


def _draw_runs(axes: Any, found: Found) -> None:
    finite = [run for run in found.runs if math.isfinite(run.score)]
    for number in sorted({run.round for run in finite}):
        part = sorted((run for run in finite if run.round == number), key=lambda run: run.learning_rate)
        axes.plot(
            [run.learning_rate for run in part],
            [run.score for run in part],
            "o-",
            color=_POINT,
            alpha=0.4 + 0.6 * number / finite[-1].round,
            label=f"{part[0].steps} steps",
        )
    for run in found.runs:
        if run not in finite:
            axes.plot(run.learning_rate, 0.9, "x", color=_POINT, transform=axes.get_xaxis_transform())
    axes.set_title(
        f"{found.scored_by.replace('_', ' ')} at the end of short runs (x: ran away)",
        loc="left",
        fontsize=9,
        color=_MUTED,
    )
    axes.legend(frameon=False, loc="upper right")

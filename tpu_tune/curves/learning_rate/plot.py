"""The picture of `tpu-tune lr-find`: the range test with its regions, and the short runs."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tpu_tune.curves.learning_rate.find import FinderResult
from tpu_tune.curves.plot_style import EVAL, INK, MUTED, TRAIN, save_png

_REGIONS = {"too low": "#dbeafe", "good": "#dcfce7", "too high": "#fee2e2"}


def draw(result: FinderResult, path: str | os.PathLike, title: str = "") -> Figure:
    """Draw a result into a PNG file, in a bucket or on a disk; a reader never sees half a file."""
    panels = (result.test is not None) + bool(result.runs)
    figure = Figure(figsize=(9, 4.2 * panels), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    if result.test is not None:
        _draw_test(axes[0], result)
    if result.runs:
        _draw_runs(axes[-1], result)
    rates = [*(result.test.rates if result.test is not None else ()), *[run.learning_rate for run in result.runs]]
    for panel in axes:
        panel.set_xscale("log")
        panel.set_xlim(min(rates) / 1.3, max(rates) * 1.3)
        _shade(panel, result)
        panel.axvline(result.suggestion.rate, color=INK, linewidth=1.5, linestyle="--", label="suggested")
        panel.set_ylabel("loss")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        lines = [line for line in panel.lines if not line.get_label().startswith("_")]
        # Beside the panel, where it hides no point.
        panel.legend(handles=lines, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    axes[-1].set_xlabel("learning rate")
    heading = f"{title + ': ' if title else ''}suggested learning rate {result.suggestion.rate:.1e}"
    figure.suptitle(heading, x=0.01, ha="left", color=INK)
    save_png(figure, path)
    return figure


def regions(result: FinderResult, left: float, right: float) -> dict[str, tuple[float, float]]:
    """Return the ends of "too low", "good" and "too high" between two rates; empty regions are left out."""
    low, high = (min(max(rate, left), right) for rate in (result.suggestion.low, result.suggestion.high))
    ends = zip(_REGIONS, ((left, low), (low, high), (high, right)), strict=True)
    return {name: (start, end) for name, (start, end) in ends if start < end}


def _shade(axes: Any, result: FinderResult) -> None:
    for name, (left, right) in regions(result, *axes.get_xlim()).items():
        axes.axvspan(left, right, color=_REGIONS[name], zorder=0, label=name)
        axes.text(
            math.sqrt(left * right),
            0.97,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            color=MUTED,
        )


def _draw_test(axes: Any, result: FinderResult) -> None:
    test = result.test
    scaled = test.losses / test.untrained * test.smoothed[0]
    axes.plot(test.rates, scaled, ".", color=TRAIN, alpha=0.35, label="a step")
    axes.plot(test.rates, test.smoothed, color=TRAIN, linewidth=2, label="smoothed")
    start, lowest = test.smoothed[0], np.nanmin(test.smoothed)
    axes.set_ylim(max(0, lowest - 0.6 * (start - lowest)), start + 1.5 * (start - lowest))
    axes.set_title(
        "range test: loss as the rate grows, relative to the untrained model's on the same batches",
        loc="left",
        fontsize=9,
        color=MUTED,
    )


def _draw_runs(axes: Any, result: FinderResult) -> None:
    finite = [run for run in result.runs if math.isfinite(run.score)]
    for number in sorted({run.round for run in finite}):
        in_round = sorted((run for run in finite if run.round == number), key=lambda run: run.learning_rate)
        axes.plot(
            [run.learning_rate for run in in_round],
            [run.score for run in in_round],
            "o-",
            color=EVAL,
            alpha=0.4 + 0.6 * number / finite[-1].round,
            label=f"{in_round[0].steps} steps",
        )
    for run in result.runs:
        if run not in finite:
            axes.plot(run.learning_rate, 0.9, "x", color=EVAL, transform=axes.get_xaxis_transform())
    axes.set_title(
        f"{result.scored_by.replace('_', ' ')} at the end of short runs (x: diverged)",
        loc="left",
        fontsize=9,
        color=MUTED,
    )

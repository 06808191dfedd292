"""All quantities of one or several runs in one PNG picture, run over run: what `tpu-tune curves --output` draws."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tpu_tune.curves.plot_style import (
    INK,
    MUTED,
    limit_spikes,
    run_colors,
    save_png,
    scientific,
    space_panels,
    style_axes,
)
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import AXES, FEW, QUANTITIES, Quantity, has_rewards, panel, smoothed_over, smoothing_window
from tpu_tune.curves.statistics import smooth
from tpu_tune.errors import UserError


def plot_runs(runs: Sequence[CurveRun], path: str | os.PathLike, x: str = "steps", beta: float = 0.9) -> None:
    """Draw all quantities of runs into a PNG file, in a bucket or on a disk; a reader never sees half a file.

    Args:
      runs: from `read_runs`.
      path: the PNG file.
      x: what the x axis shows: steps, tokens or epochs.
      beta: how much training curves of 30 points or more are smoothed: see `smoothing_window`.

    Raises:
      UserError: the file cannot be written, or the metrics have no tokens or epochs.
    """
    rewards = any(has_rewards(run.metrics) for run in runs)
    quantities = [one for one in QUANTITIES if rewards or not one.train.startswith(("rewards/", "logps/"))]
    rows = len(quantities) // 2
    figure = Figure(figsize=(12, 1 + 3 * rows), dpi=100, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(rows, 2, height_ratios=(1.5, *[1] * (rows - 1)))
    legend: dict[str, Any] = {}
    for index, quantity in enumerate(quantities):
        axes = figure.add_subplot(grid[index // 2, index % 2])
        legend |= _draw(axes, runs, quantity, x, beta)
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside upper center",
        ncols=min(4, max(1, len(legend))),
        frameon=False,
        labelcolor=INK,
    )
    space_panels(figure)
    try:
        save_png(figure, path)
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


def _draw(axes: Any, runs: Sequence[CurveRun], quantity: Quantity, x: str, beta: float) -> dict[str, Any]:
    """Draw one panel; return a line for each name in the legend."""
    style_axes(axes)
    legend, drawn = {}, []
    for index, run in enumerate(runs):
        for side, color in zip(("train", "eval"), run_colors(index, len(runs)), strict=True):
            positions, values = panel(run.metrics, quantity, side, x)
            if not len(positions):
                continue
            drawn.append(values)
            style = {"color": color, "linewidth": 1.8}
            if side == "eval":
                style |= {"marker": "o", "markersize": 4, "linestyle": "-" if len(runs) == 1 else "--"}
            elif len(positions) < FEW:
                style |= {"marker": "o", "markersize": 3}
            elif beta and quantity.noisy:
                axes.plot(positions, values, color=color, alpha=0.25, linewidth=0.9)
                window = smoothing_window(len(values), beta)
                values = smooth(values, window)
                side = f"{side}, {smoothed_over(window)}"
            (line,) = axes.plot(positions, values, **style)
            if quantity.noisy:
                legend[side if len(runs) == 1 else f"{run.name}, {side}"] = line
    limit_spikes(axes, np.concatenate(drawn) if drawn else np.zeros(0))
    axes.set_title(quantity.name, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(AXES[x])
    if quantity.name == "learning rate":
        axes.yaxis.set_major_formatter(FuncFormatter(scientific))
    if not drawn:
        axes.text(0.5, 0.5, "not in the metrics", transform=axes.transAxes, ha="center", color=MUTED)
    return legend

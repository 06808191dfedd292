"""All quantities of one run or of several laid over each other, as a PNG: what `tpu-tune curves --output` draws."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tpu_tune.checkpoints import storage
from tpu_tune.curves.plot import EVAL, INK, TRAIN, dress, limit, short
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import AXES, FEW, QUANTITIES, Quantity, ema, panel
from tpu_tune.errors import UserError

RUN_COLORS = ("#2563eb", "#ea580c", "#0f766e", "#7c3aed", "#be123c", "#a16207", "#0891b2", "#4d7c0f")


def colors(run: int, runs: int) -> tuple[str, str]:
    """Return the colors of a run's training and evaluation curve; a single run's differ, of several each has its own."""
    return (TRAIN, EVAL) if runs == 1 else (RUN_COLORS[run % len(RUN_COLORS)],) * 2


def plot_runs(runs: Sequence[CurveRun], path: str | os.PathLike, x: str = "steps", beta: float = 0.9) -> None:
    """Draw the quantities of runs into a PNG file, written aside and renamed.

    Args:
      runs: from `read_runs`.
      path: the PNG file.
      x: steps, tokens or epochs.
      beta: of the exponential moving average over training curves of 30 points or more, drawn over the raw values.

    Raises:
      UserError: the file cannot be written, or the rows know no tokens or epochs.
    """
    figure = Figure(figsize=(12, 10), dpi=100, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1.5, 1, 1))
    lines: dict[str, Any] = {}
    for place, quantity in enumerate(QUANTITIES):
        axes = figure.add_subplot(grid[place // 2, place % 2])
        lines |= _draw(axes, runs, quantity, x, beta)
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside upper center",
        ncols=min(4, max(1, len(lines))),
        frameon=False,
        labelcolor=INK,
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.04, wspace=0.04)
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    try:
        storage.write_bytes(path, drawn.getvalue())
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


def _draw(axes: Any, runs: Sequence[CurveRun], quantity: Quantity, x: str, beta: float) -> dict[str, Any]:
    """Draw one panel; return a line for each name in the legend."""
    dress(axes)
    lines, seen = {}, []
    for place, run in enumerate(runs):
        for side, color in zip(("train", "eval"), colors(place, len(runs)), strict=True):
            at, values = panel(run.metrics, quantity, side, x)
            if not len(at):
                continue
            seen.append(values)
            style = {"color": color, "linewidth": 1.8}
            if side == "eval":
                style |= {"marker": "o", "markersize": 4, "linestyle": "-" if len(runs) == 1 else "--"}
            elif len(at) < FEW:
                style |= {"marker": "o", "markersize": 3}
            elif beta and quantity.noisy:
                axes.plot(at, values, color=color, alpha=0.25, linewidth=0.9)
                values = ema(values, beta)
            (line,) = axes.plot(at, values, **style)
            lines[side if len(runs) == 1 else f"{run.name}, {side}"] = line
    limit(axes, np.concatenate(seen) if seen else np.zeros(0))
    axes.set_title(quantity.name, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(AXES[x])
    if quantity.name == "learning rate":
        axes.yaxis.set_major_formatter(FuncFormatter(short))
    if not seen:
        axes.text(0.5, 0.5, "not in the metrics", transform=axes.transAxes, ha="center", color="#6b7280")
    return lines

"""`curves.png`: training and evaluation loss, learning rate and gradient norm over a run, from its metrics rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tpu_tune.curves.plot_style import (
    EVAL,
    INK,
    MUTED,
    NORM,
    RATE,
    TRAIN,
    limit_spikes,
    save_png,
    scientific,
    space_panels,
    style_axes,
)
from tpu_tune.curves.series import FEW, has_rewards, series, smoothed_over, smoothing_window
from tpu_tune.curves.statistics import smooth


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = "") -> None:
    """Draw the curves of a run into a PNG file, in a bucket or on a disk; a reader never sees half a file.

    Args:
      metrics: rows of metrics.jsonl (`RunDirectory.metrics`), in any order; a few or none are fine.
      path: the PNG file.
      title: the run's name, shown above the curves.
    """
    rows = 3 if has_rewards(metrics) else 2
    figure = Figure(figsize=(10, 3 + 2 * rows), dpi=130, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(rows, 2, height_ratios=(2.3, *[1] * (rows - 1)))
    if rows == 3:
        _draw_rewards(figure.add_subplot(grid[2, 0]), metrics, "rewards (dashed: held-out)", _REWARDS)
        _draw_rewards(figure.add_subplot(grid[2, 1]), metrics, "share of pairs ranked rightly", _ACCURACY)
    _draw_loss(figure.add_subplot(grid[0, :]), metrics, title)
    _draw_small(figure.add_subplot(grid[1, 0]), metrics, "learning_rate", "learning rate", RATE)
    _draw_small(figure.add_subplot(grid[1, 1]), metrics, "grad_norm", "gradient norm", NORM)
    last = max((row["step"] for row in metrics if "step" in row), default=0)
    for axes in figure.axes:
        axes.set_xlim(-0.015 * max(last, 5), 1.015 * max(last, 5))  # the same for all panels
    space_panels(figure)
    save_png(figure, path)


def _draw_loss(axes: Any, metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    steps, losses = series(metrics, "loss")
    eval_steps, eval_losses = series(metrics, "eval_loss")
    style_axes(axes)
    if len(steps) >= FEW:
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=1)
        window = smoothing_window(len(steps))
        label = f"train, {smoothed_over(window)}"
        axes.plot(steps, smooth(losses, window), color=TRAIN, linewidth=2, label=label)
    elif len(steps):
        axes.plot(steps, losses, color=TRAIN, linewidth=2, marker="o", markersize=4, label="train")
    if len(eval_steps):
        best = int(np.argmin(eval_losses))
        label = f"eval (best {eval_losses[best]:.4g} at step {eval_steps[best]:.0f})"
        axes.plot(eval_steps, eval_losses, color=EVAL, linewidth=2, marker="o", markersize=5, label=label, zorder=3)
        axes.plot(eval_steps[best], eval_losses[best], "o", color=EVAL, markersize=11, fillstyle="none", zorder=3)
    both = np.concatenate([losses, eval_losses])
    if len(both) and both.min() > 0 and both.max() > 100 * np.median(both):
        axes.set_yscale("log")  # shows how far a loss blew up, and the other losses too
    else:
        limit_spikes(axes, both)
    axes.set_ylabel("loss")
    axes.set_xlabel("step")
    axes.set_title(title or "loss", loc="left", color=INK, fontsize=13, fontweight="bold")
    if len(steps) or len(eval_steps):
        axes.legend(frameon=False, loc="best", labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no losses yet", transform=axes.transAxes, ha="center", color=MUTED)


_REWARDS = {"rewards/chosen": RATE, "rewards/rejected": EVAL, "rewards/margins": NORM}
_ACCURACY = {"rewards/accuracies": TRAIN}


def _draw_rewards(axes: Any, metrics: Sequence[Mapping[str, Any]], name: str, colors: Mapping[str, str]) -> None:
    style_axes(axes)
    for key, color in colors.items():
        for side, style in (("", "-"), ("eval_", "--")):
            steps, values = series(metrics, side + key)
            if len(steps):
                label = key.removeprefix("rewards/") if not side else None
                axes.plot(steps, values, style, color=color, linewidth=1.5, label=label)
    axes.set_title(name, loc="left", color=INK, fontsize=10)
    axes.set_xlabel("step")
    if len(colors) > 1:
        axes.legend(frameon=False, loc="best", labelcolor=INK, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _draw_small(axes: Any, metrics: Sequence[Mapping[str, Any]], key: str, name: str, color: str) -> None:
    steps, values = series(metrics, key)
    style_axes(axes)
    marker = "o" if len(steps) < FEW else None
    axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=3)
    axes.set_title(name, loc="left", color=INK, fontsize=10)
    axes.set_xlabel("step")
    limit_spikes(axes, values)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if key == "learning_rate":
        axes.yaxis.set_major_formatter(FuncFormatter(scientific))

"""`curves.png`: training and evaluation loss, learning rate and gradient norm over a run, from its metrics rows."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tpu_tune.checkpoints import storage
from tpu_tune.curves.series import series
from tpu_tune.curves.statistics import running

TRAIN, EVAL, _RATE, _NORM = "#2563eb", "#ea580c", "#0f766e", "#7c3aed"
_SMOOTH_FROM = 30  # points; fewer are shown as they are
INK, _MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean of `window` points of the running median of five.

    Centred, so that it does not lag behind a falling loss; the median keeps a single spike out. Windows shrink evenly
    towards both ends.
    """
    return running(np.mean, running(np.median, values, 2), max(0, window // 2))


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = "") -> None:
    """Draw the curves of a run into a PNG file, written aside and renamed; it may be in a bucket.

    Args:
      metrics: rows of metrics.jsonl (`RunDirectory.metrics`), in any order; few or none are fine.
      path: the PNG file.
      title: shown above; the run's name.
    """
    figure = Figure(figsize=(10, 7), dpi=130, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2.3, 1))
    _draw_loss(figure.add_subplot(grid[0, :]), metrics, title)
    _draw_small(figure.add_subplot(grid[1, 0]), metrics, "learning_rate", "learning rate", _RATE)
    _draw_small(figure.add_subplot(grid[1, 1]), metrics, "grad_norm", "gradient norm", _NORM)
    last = max((row["step"] for row in metrics if "step" in row), default=0)
    for axes in figure.axes:
        axes.set_xlim(-0.015 * max(last, 5), 1.015 * max(last, 5))  # the same for all panels
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.04, wspace=0.04)
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    storage.write_bytes(path, drawn.getvalue())


def _draw_loss(axes: Any, metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    steps, losses = series(metrics, "loss")
    eval_steps, eval_losses = series(metrics, "eval_loss")
    dress(axes)
    if len(steps) >= _SMOOTH_FROM:
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(losses, len(steps) // 15), color=TRAIN, linewidth=2, label="train, smoothed")
    elif len(steps):
        axes.plot(steps, losses, color=TRAIN, linewidth=2, marker="o", markersize=4, label="train")
    if len(eval_steps):
        best = int(np.argmin(eval_losses))
        label = f"eval (best {eval_losses[best]:.4g} at step {eval_steps[best]:.0f})"
        axes.plot(eval_steps, eval_losses, color=EVAL, linewidth=2, marker="o", markersize=5, label=label, zorder=3)
        axes.plot(eval_steps[best], eval_losses[best], "o", color=EVAL, markersize=11, fillstyle="none", zorder=3)
    both = np.concatenate([losses, eval_losses])
    if len(both) and both.min() > 0 and both.max() > 100 * np.median(both):
        axes.set_yscale("log")  # a run that blew up shows how far, and the rest too
    else:
        limit(axes, both)
    axes.set_ylabel("loss")
    axes.set_xlabel("step")
    axes.set_title(title or "loss", loc="left", color=INK, fontsize=13, fontweight="bold")
    if len(steps) or len(eval_steps):
        axes.legend(frameon=False, loc="best", labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no losses yet", transform=axes.transAxes, ha="center", color=_MUTED)


def _draw_small(axes: Any, metrics: Sequence[Mapping[str, Any]], key: str, name: str, color: str) -> None:
    steps, values = series(metrics, key)
    dress(axes)
    marker = "o" if len(steps) < _SMOOTH_FROM else None
    axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=3)
    axes.set_title(name, loc="left", color=INK, fontsize=10)
    axes.set_xlabel("step")
    limit(axes, values)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if key == "learning_rate":
        axes.yaxis.set_major_formatter(FuncFormatter(short))


def short(value: float, _: object = None) -> str:
    """0.00015 as 1.5e-4."""
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if value else "0"


def limit(axes: Any, values: np.ndarray) -> None:
    """Keep one spike from flattening the rest: it leaves through the top of the panel."""
    if len(values) < 20:
        return
    top, usual = values.max(), np.percentile(values, 98)
    low = values.min()
    if top - low > 3 * (usual - low) > 0:
        margin = 0.1 * (usual - low)
        axes.set_ylim(low - margin, usual + 5 * margin)


def dress(axes: Any) -> None:
    """Give a panel the look that all have."""
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.xaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_color(_MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))

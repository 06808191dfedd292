"""The common look of the pictures: colors, axes, number formats, and how a figure becomes a PNG file."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpu_tune.checkpoints import storage

TRAIN, EVAL, RATE, NORM = "#2563eb", "#ea580c", "#0f766e", "#7c3aed"
INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
RUN_COLORS = (TRAIN, EVAL, RATE, NORM, "#be123c", "#a16207", "#0891b2", "#4d7c0f")


def run_colors(index: int, count: int) -> tuple[str, str]:
    """Return the colors of the training and the evaluation curve of run number `index` of `count` runs in one picture.

    The two curves of a single run differ in color; of several runs each has one color for both.
    """
    return (TRAIN, EVAL) if count == 1 else (RUN_COLORS[index % len(RUN_COLORS)],) * 2


def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG file, in a bucket or on a disk; a reader never sees half a file."""
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    storage.write_bytes(path, png.getvalue())


def style_axes(axes: Any) -> None:
    """Apply the common grid, spines and ticks to a panel."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))


def space_panels(figure: Figure) -> None:
    """Set the distances between the panels of a constrained layout."""
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.04, wspace=0.04)


def limit_without_spikes(values: np.ndarray) -> float | None:
    """Return an upper limit above the usual values that leaves out rare spikes, or None without spikes.

    Args:
      values: (n,) finite; with fewer than 20 nothing counts as a spike.
    """
    if len(values) < 20:
        return None
    low, high, usual = values.min(), values.max(), float(np.percentile(values, 98))
    return usual + 0.5 * (usual - low) if high - low > 3 * (usual - low) > 0 else None


def limit_spikes(axes: Any, values: np.ndarray) -> None:
    """Limit the y axis so that a spike leaves the panel through the top instead of flattening all other values."""
    top = limit_without_spikes(values)
    if top is not None:
        low = values.min()
        axes.set_ylim(low - (top - low) / 15, top)


def scientific(value: float, _: object = None) -> str:
    """Format 0.00015 as 1.5e-4; also a matplotlib tick formatter."""
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if value else "0"

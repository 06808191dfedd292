"""One quantity as an inline SVG picture for the HTML report, with its numbers for the script that shows them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from tpu_tune.curves.plot_style import limit_without_spikes, run_colors, scientific
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import AXES, FEW, Quantity, panel, smoothing_window
from tpu_tune.curves.statistics import smooth

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 36
_PLOT_WIDTH, _PLOT_HEIGHT = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
_MAX_POINTS = 1200  # of a line; of more, only the lowest and the highest of each block are kept


@dataclass(frozen=True)
class Chart:
    """A drawn panel.

    Attributes:
      svg: the picture, complete without a script.
      data: input of the report's script: the ranges of both axes, and the points of each line.
    """

    svg: str
    data: dict[str, Any]


@dataclass(frozen=True)
class _Line:
    """One curve of a panel; arrays have one number per kept point.

    Attributes:
      name: shown on hover.
      color: CSS color.
      side: train | eval.
      dashed: whether the line is dashed.
      x, y: positions and values.
      smooth: the smoothed values, or None.
    """

    name: str
    color: str
    side: str
    dashed: bool
    x: np.ndarray
    y: np.ndarray
    smooth: np.ndarray | None


def draw(runs: Sequence[CurveRun], quantity: Quantity, x: str, beta: float, number: int) -> Chart | None:
    """Draw one quantity of runs; return None if no run has it.

    Args:
      runs: from `read_runs`.
      quantity: the quantity to draw.
      x: what the x axis shows: steps, tokens or epochs.
      beta: how much training curves with many points are smoothed: see `smoothing_window`.
      number: the chart's number on its page, from 0.
    """
    lines = list(_lines(runs, quantity, x, beta))
    if not lines:
        return None
    all_x = np.concatenate([line.x for line in lines])
    x_range = _padded(float(all_x.min()), float(all_x.max()))
    y_range = _y_range(np.concatenate([line.y for line in lines]))
    format_y = scientific if quantity.name == "learning rate" else _short_number
    elements = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" data-chart="{number}" '
        f'aria-label="{html.escape(quantity.name)} over {AXES[x]}">',
        f'<clipPath id="clip{number}"><rect x="{_LEFT}" y="{_TOP}" width="{_PLOT_WIDTH}" '
        f'height="{_PLOT_HEIGHT}"/></clipPath>',
        *_axes(x_range, y_range, AXES[x], format_y),
        f'<g clip-path="url(#clip{number})">',
        *[element for line in lines for element in _line_elements(line, x_range, y_range)],
        "</g>",
        '<g class="hover"></g></svg>',
    ]
    data = {
        "name": quantity.name,
        "axis": AXES[x],
        "xRange": x_range,
        "yRange": y_range,
        "box": [_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT],
        "lines": [
            {
                "name": line.name,
                "color": line.color,
                "x": _rounded(line.x),
                "y": _rounded(line.y),
                "smooth": None if line.smooth is None else _rounded(line.smooth),
            }
            for line in lines
        ],
    }
    return Chart("".join(elements), data)


def thin(values: np.ndarray, max_points: int = _MAX_POINTS) -> np.ndarray:
    """Return the indices of about `max_points` values: the lowest and the highest of each block of neighbours."""
    if len(values) <= max_points:
        return np.arange(len(values))
    blocks = np.array_split(np.arange(len(values)), max_points // 2)
    return np.unique([block[choose(values[block])] for block in blocks for choose in (np.argmin, np.argmax)])


def _lines(runs: Sequence[CurveRun], quantity: Quantity, x: str, beta: float) -> Iterator[_Line]:
    for index, run in enumerate(runs):
        for side, color in zip(("train", "eval"), run_colors(index, len(runs)), strict=True):
            positions, values = panel(run.metrics, quantity, side, x)
            if not len(positions):
                continue
            smooths = side == "train" and quantity.noisy and beta > 0 and len(positions) >= FEW
            kept = thin(values)
            name = side if quantity.eval else quantity.name
            yield _Line(
                name=name if len(runs) == 1 else f"{run.name}, {name}",
                color=color,
                side=side,
                dashed=side == "eval" and len(runs) > 1,
                x=positions[kept],
                y=values[kept],
                smooth=smooth(values, smoothing_window(len(values), beta))[kept] if smooths else None,
            )


def _line_elements(line: _Line, x_range: Sequence[float], y_range: Sequence[float]) -> list[str]:
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    style = f'fill="none" stroke="{line.color}" stroke-linejoin="round"{dash}'

    def polyline(kind: str, values: np.ndarray) -> str:
        points = " ".join(f"{_x(a, x_range):.1f},{_y(b, y_range):.1f}" for a, b in zip(line.x, values, strict=True))
        return f'<polyline class="{kind}" {style} points="{points}"/>'

    if line.smooth is not None:
        return [polyline("raw", line.y), polyline("smooth", line.smooth)]
    elements = [polyline("line", line.y)]
    if line.side == "eval" or len(line.x) < FEW:
        elements += [
            f'<circle cx="{_x(a, x_range):.1f}" cy="{_y(b, y_range):.1f}" r="2.6" fill="{line.color}"/>'
            for a, b in zip(line.x, line.y, strict=True)
        ]
    return elements


def _axes(
    x_range: Sequence[float], y_range: Sequence[float], x_name: str, format_y: Callable[[float], str]
) -> list[str]:
    elements = []
    for value in _ticks(y_range, 5):
        y = _y(value, y_range)
        elements.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        elements.append(_tick_text(_LEFT - 7, y + 3.5, "end", format_y(value)))
    for value in _ticks(x_range, 7):
        elements.append(_tick_text(_x(value, x_range), HEIGHT - _BOTTOM + 15, "middle", _short_number(value)))
    return [*elements, _tick_text(_LEFT + _PLOT_WIDTH / 2, HEIGHT - 4, "middle", x_name)]


def _tick_text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _ticks(span: Sequence[float], max_ticks: int) -> list[float]:
    return [float(v) for v in MaxNLocator(nbins=max_ticks).tick_values(*span) if span[0] <= v <= span[1]]


def _short_number(value: float) -> str:
    for threshold, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= threshold:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _y_range(values: np.ndarray) -> list[float]:
    """Return the range of the values; a few that are far above the rest leave the panel through the top."""
    top = limit_without_spikes(values)
    return _padded(float(values.min()), float(values.max()) if top is None else top, 0.05)


def _padded(low: float, high: float, share: float = 0.015) -> list[float]:
    margin = share * (high - low) or 0.5 * abs(high) or 1.0
    return [low - margin, high + margin]


def _x(value: float, span: Sequence[float]) -> float:
    return _LEFT + (value - span[0]) / (span[1] - span[0]) * _PLOT_WIDTH


def _y(value: float, span: Sequence[float]) -> float:
    """Return pixels from the top, clipped to about the panel: browsers cannot draw a loss of 1e30 to scale."""
    share = min(max((value - span[0]) / (span[1] - span[0]), -1.0), 2.0)
    return HEIGHT - _BOTTOM - share * _PLOT_HEIGHT


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]

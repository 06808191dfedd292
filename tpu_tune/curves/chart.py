"""One quantity as an inline SVG for the HTML report, and the numbers under it for whoever hovers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from tpu_tune.curves.overlay import colors
from tpu_tune.curves.plot import short
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import AXES, FEW, Quantity, ema, panel

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 36
_MOST = 1200  # points of a line; of more, the lowest and highest of neighbours are kept


@dataclass(frozen=True)
class Chart:
    """A drawn panel.

    Attributes:
      svg: the picture, complete without any script.
      data: for the script: the ranges of both axes and each line's points.
    """

    svg: str
    data: dict[str, Any]


def draw(runs: Sequence[CurveRun], quantity: Quantity, x: str, beta: float, number: int) -> Chart | None:
    """Draw a quantity of runs; None where no run has it.

    Args:
      runs: from `read_runs`.
      quantity: which.
      x: steps, tokens or epochs.
      beta: of the moving average over training curves with many points.
      number: of the chart on its page.
    """
    lines = []
    for place, run in enumerate(runs):
        for side, color in zip(("train", "eval"), colors(place, len(runs)), strict=True):
            at, values = panel(run.metrics, quantity, side, x)
            if len(at):
                smooths = side == "train" and quantity.noisy and beta > 0 and len(at) >= FEW
                smoothed = ema(values, beta) if smooths else None
                kept = thin(values)
                name = side if quantity.eval else quantity.name
                lines.append(
                    {
                        "dashed": side == "eval" and len(runs) > 1,
                        "name": name if len(runs) == 1 else f"{run.name}, {name}",
                        "color": color,
                        "side": side,
                        "x": at[kept],
                        "y": values[kept],
                        "smooth": None if smoothed is None else smoothed[kept],
                    }
                )
    if not lines:
        return None
    every = np.concatenate([line["x"] for line in lines])
    x_range = _padded(float(every.min()), float(every.max()))
    y_range = _y_range(np.concatenate([line["y"] for line in lines]))
    words = short if quantity.name == "learning rate" else _words
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" data-chart="{number}" '
        f'aria-label="{html.escape(quantity.name)} over {AXES[x]}">',
        f'<clipPath id="clip{number}"><rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" '
        f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
        *_axes(x_range, y_range, AXES[x], words),
        f'<g clip-path="url(#clip{number})">',
        *[part for line in lines for part in _line(line, x_range, y_range)],
        "</g>",
        '<g class="hover"></g></svg>',
    ]
    data = {
        "name": quantity.name,
        "axis": AXES[x],
        "xRange": x_range,
        "yRange": y_range,
        "box": [_LEFT, _TOP, WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM],
        "lines": [
            {
                "name": line["name"],
                "color": line["color"],
                "x": _numbers(line["x"]),
                "y": _numbers(line["y"]),
                "smooth": None if line["smooth"] is None else _numbers(line["smooth"]),
            }
            for line in lines
        ],
    }
    return Chart("".join(parts), data)


def thin(values: np.ndarray, most: int = _MOST) -> np.ndarray:
    """Return the places of at most about `most` values, with the lowest and the highest of each run of neighbours."""
    if len(values) <= most:
        return np.arange(len(values))
    parts = np.array_split(np.arange(len(values)), most // 2)
    return np.unique([part[choose(values[part])] for part in parts for choose in (np.argmin, np.argmax)])


def _line(line: dict[str, Any], x_range: Sequence[float], y_range: Sequence[float]) -> list[str]:
    color, dash = line["color"], ' stroke-dasharray="5 3"' if line["dashed"] else ""

    def points(values: np.ndarray) -> str:
        return " ".join(f"{_x(a, x_range):.1f},{_y(b, y_range):.1f}" for a, b in zip(line["x"], values, strict=True))

    style = f'fill="none" stroke="{color}" stroke-linejoin="round"{dash}'
    if line["smooth"] is not None:
        return [
            f'<polyline class="raw" {style} points="{points(line["y"])}"/>',
            f'<polyline class="smooth" {style} points="{points(line["smooth"])}"/>',
        ]
    parts = [f'<polyline class="line" {style} points="{points(line["y"])}"/>']
    if line["side"] == "eval" or len(line["x"]) < FEW:
        parts += [
            f'<circle cx="{_x(a, x_range):.1f}" cy="{_y(b, y_range):.1f}" r="2.6" fill="{color}"/>'
            for a, b in zip(line["x"], line["y"], strict=True)
        ]
    return parts


def _axes(x_range: Sequence[float], y_range: Sequence[float], name: str, words: Any) -> list[str]:
    parts = []
    for value in _ticks(y_range, 5):
        at = _y(value, y_range)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{words(value)}</text>')
    for value in _ticks(x_range, 7):
        at = _x(value, x_range)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_words(value)}</text>'
        )
    middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{name}</text>')
    return parts


def _ticks(span: Sequence[float], most: int) -> list[float]:
    return [float(v) for v in MaxNLocator(nbins=most).tick_values(*span) if span[0] <= v <= span[1]]


def _words(value: float) -> str:
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}"


def _y_range(values: np.ndarray) -> list[float]:
    """The values' range; where a few stand far above the rest they leave through the top."""
    low, high = float(values.min()), float(values.max())
    usual = float(np.percentile(values, 98))
    if len(values) >= 20 and high - low > 3 * (usual - low) > 0:
        high = usual + 0.5 * (usual - low)
    return _padded(low, high, 0.05)


def _padded(low: float, high: float, share: float = 0.015) -> list[float]:
    margin = share * (high - low) or 0.5 * abs(high) or 1.0
    return [low - margin, high + margin]


def _x(value: float, span: Sequence[float]) -> float:
    return _LEFT + (value - span[0]) / (span[1] - span[0]) * (WIDTH - _LEFT - _RIGHT)


def _y(value: float, span: Sequence[float]) -> float:
    """Pixels from the top, kept near the panel: a loss of 1e30 is no coordinate."""
    share = min(max((value - span[0]) / (span[1] - span[0]), -1.0), 2.0)
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]

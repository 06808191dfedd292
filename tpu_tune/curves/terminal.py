"""A run's curves and diagnosis as text for a terminal: what `tpu-tune curves` prints."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tpu_tune.curves.diagnosis import Diagnosis
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import FEW, QUANTITIES, Quantity, panel, smoothed_over, smoothing_window
from tpu_tune.curves.statistics import smooth

_BARS = "▁▂▃▄▅▆▇█"


def figures(run: CurveRun) -> dict[str, dict[str, float]]:
    """Return first, last, median and best value and the best one's step, by curve: "train loss", "eval loss", ..."""
    return {
        name: {
            "first": float(values[0]),
            "last": float(values[-1]),
            "median": float(np.median(values)),
            "best": float(values[_best(quantity, values)]),
            "best_step": int(steps[_best(quantity, values)]),
        }
        for name, quantity, _, steps, values in _curves(run)
    }


def lines(run: CurveRun, diagnosis: Diagnosis, beta: float = 0.9) -> list[str]:
    """Return what `tpu-tune curves` prints of a run.

    Args:
      run: from `read_run`.
      diagnosis: the run's diagnosis.
      beta: how much training curves are smoothed for their sparklines: see `smoothing_window`.
    """
    last = max((row["step"] for row in run.metrics if isinstance(row.get("step"), (int, float))), default=0)
    total = run.summary.get("total_steps")
    head = f"{run.path}: step {last:,.0f}" + (f" of {total:,}" if total else "")
    printed = [head, *[f"  note: {note}" for note in run.notes]]
    wide = max([20, *(len(name) for name, *_ in _curves(run))])
    for name, quantity, side, steps, values in _curves(run):
        if quantity.exponential and side == "train":
            continue
        window = smoothing_window(len(values), beta) if side == "train" and quantity.noisy and len(values) >= FEW else 1
        shown = smooth(values, window)
        text = f"{shown[0]:.4g} -> {shown[-1]:.4g}" + (f", {smoothed_over(window)}" if window > 1 else "")
        if side == "eval" and len(values) > 1:
            best = _best(quantity, values)
            text += f", best {values[best]:.4g} at step {steps[best]:.0f}"
        elif quantity.name == "tokens a second":
            text = f"median {np.median(values):,.0f}"
        printed.append(f"  {name:<{wide}} {sparkline(shown)}  {text}")
    return [*printed, *[f"  {line}" for line in verdict_lines(diagnosis)]]


def verdict_lines(diagnosis: Diagnosis) -> list[str]:
    """Return the verdict, its evidence and its advice, a line each."""
    head = f"diagnosis: {diagnosis.title}" + ("" if diagnosis.done else ", so far")
    return [head, *[f"  - {text}" for text in diagnosis.evidence], *[f"  try: {text}" for text in diagnosis.advice]]


def sparkline(values: np.ndarray, width: int = 24) -> str:
    """Return a curve as a line of text: the medians of `width` blocks, from ▁ for the lowest to █ for the highest."""
    if not len(values):
        return ""
    points = np.array([np.median(block) for block in np.array_split(values, min(width, len(values)))])
    low, high = points.min(), points.max()
    if high <= low:
        return (_BARS[0] * len(points)).ljust(width)
    return "".join(_BARS[int(round(7 * (value - low) / (high - low)))] for value in points).ljust(width)


def _curves(run: CurveRun) -> Iterator[tuple[str, Quantity, str, np.ndarray, np.ndarray]]:
    """Yield name, quantity, side (train | eval), steps and values of each curve that the run has."""
    for quantity in QUANTITIES:
        for side in ("train", "eval"):
            steps, values = panel(run.metrics, quantity, side)
            if len(values):
                yield f"{side} {quantity.name}" if quantity.eval else quantity.name, quantity, side, steps, values


def _best(quantity: Quantity, values: np.ndarray) -> int:
    is_high = any(word in quantity.name for word in ("accuracy", "margin", "chosen"))
    return int(np.argmax(values) if is_high else np.argmin(values))

"""A run's curves and diagnosis as lines for a terminal."""

from __future__ import annotations

import numpy as np

from tpu_tune.curves.diagnosis import Diagnosis
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import FEW, QUANTITIES, ema, panel

_BARS = "▁▂▃▄▅▆▇█"


def figures(run: CurveRun) -> dict[str, dict[str, float]]:
    """Return first, last, lowest and highest value and the step of the best one, by "train loss", "eval loss", ..."""
    found = {}
    for quantity in QUANTITIES:
        for side in ("train", "eval"):
            steps, values = panel(run.metrics, quantity, side)
            if len(values):
                best = int(np.argmax(values) if "accuracy" in quantity.name else np.argmin(values))
                found[f"{side} {quantity.name}" if quantity.eval else quantity.name] = {
                    "first": float(values[0]),
                    "last": float(values[-1]),
                    "median": float(np.median(values)),
                    "best": float(values[best]),
                    "best_step": int(steps[best]),
                }
    return found


def lines(run: CurveRun, diagnosis: Diagnosis, beta: float = 0.9) -> list[str]:
    """Return what `tpu-tune curves` prints of a run.

    Args:
      run: from `read_run`.
      diagnosis: of it.
      beta: smoothing of the little pictures of training curves.
    """
    last = max((row["step"] for row in run.metrics if isinstance(row.get("step"), (int, float))), default=0)
    found = [f"{run.path}: step {last:,.0f}" + _of_total(run), *[f"  note: {note}" for note in run.notes]]
    for quantity in QUANTITIES:
        for side in ("train", "eval"):
            steps, values = panel(run.metrics, quantity, side)
            if not len(values) or (quantity.exponential and side == "train"):
                continue
            name = f"{side} {quantity.name}" if quantity.eval else quantity.name
            shown = ema(values, beta) if side == "train" and quantity.noisy and len(values) >= FEW else values
            words = f"{shown[0]:.4g} -> {shown[-1]:.4g}"
            if side == "eval" and len(values) > 1:
                best = int(np.argmax(values) if "accuracy" in quantity.name else np.argmin(values))
                words += f", best {values[best]:.4g} at step {steps[best]:.0f}"
            elif quantity.name == "tokens a second":
                words = f"median {np.median(values):,.0f}"
            found.append(f"  {name:<20} {sparkline(shown)}  {words}")
    return [*found, *[f"  {line}" for line in verdict_lines(diagnosis)]]


def verdict_lines(diagnosis: Diagnosis) -> list[str]:
    """Return the verdict, what was seen, and what to try, a line each."""
    head = f"diagnosis: {diagnosis.title}" + ("" if diagnosis.done else ", so far")
    return [head, *[f"  - {text}" for text in diagnosis.evidence], *[f"  try: {text}" for text in diagnosis.advice]]


def sparkline(values: np.ndarray, width: int = 24) -> str:
    """Return a curve in one line of text: medians of `width` runs of neighbours, the lowest as ▁ and the highest as █."""
    if not len(values):
        return ""
    points = np.array([np.median(part) for part in np.array_split(values, min(width, len(values)))])
    low, high = points.min(), points.max()
    if high <= low:
        return (_BARS[0] * len(points)).ljust(width)
    return "".join(_BARS[int(round(7 * (value - low) / (high - low)))] for value in points).ljust(width)


def _of_total(run: CurveRun) -> str:
    total = run.summary.get("total_steps")
    return f" of {total:,}" if total else ""

"""The losses of a run as the diagnosis needs them: over the progress of learning, with noise level, start and end.

Progress is the integral of the learning rate, scaled to reach 1 at the end of the run; if the metrics have no learning
rate, it is the share of the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpu_tune.curves.series import series
from tpu_tune.curves.statistics import noise_level

MIN_TRAIN = 6  # with fewer training losses there is no verdict on them


class Finding(NamedTuple):
    """What one rule of the diagnosis found; evidence and advice have a sentence per entry."""

    verdict: str
    reason: str
    evidence: list[str]
    advice: list[str]


@dataclasses.dataclass
class Curve:
    """One loss over the steps of a run.

    Attributes:
      steps: step of each point, ascending.
      values: loss of each point (nats per token).
      progress: progress of learning at each point, from 0 to 1 at the end of the run.
    """

    steps: np.ndarray
    values: np.ndarray
    progress: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def end(self) -> float:
        """Return the median of the last points: see `tail`."""
        return float(np.median(self.values[-tail(len(self)) :]))

    def after(self, progress: float) -> Curve:
        """Return the part of the curve from this progress on."""
        kept = self.progress >= progress
        return Curve(self.steps[kept], self.values[kept], self.progress[kept])


@dataclasses.dataclass
class Losses:
    """Both losses of a run.

    Attributes:
      train: the finite training losses.
      eval: the finite evaluation losses.
      noise: standard deviation of one training loss.
      eval_noise: standard deviation of one evaluation loss.
      start: the training loss at the start of the run.
      not_finite: steps whose training loss is not finite.
      eval_not_finite: steps whose evaluation loss is not finite.
      last_step: the largest step of any row.
      skipped: updates skipped because of gradients that were not finite (normal for the first ones in float16).
      numbers: figures to report; the rules of the diagnosis add theirs.
      remarks: observations that change no verdict; the rules add theirs.
    """

    train: Curve
    eval: Curve
    noise: float
    eval_noise: float
    start: float
    not_finite: list[int]
    eval_not_finite: list[int]
    last_step: int
    skipped: int
    numbers: dict[str, Any]
    remarks: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def from_metrics(cls, metrics: Sequence[Mapping[str, Any]]) -> Losses:
        """Read the losses from rows of metrics.jsonl, in any order."""
        all_steps = [row["step"] for row in metrics if isinstance(row.get("step"), (int, float))]
        last_step = int(max(all_steps, default=0))
        progress_steps, progress = _learning_progress(metrics, last_step)
        train, held_out = (
            Curve(steps, values, np.interp(steps, progress_steps, progress))
            for steps, values in (series(metrics, "loss"), series(metrics, "eval_loss"))
        )
        first = train.values[: max(1, len(train) // 50)]
        start = float(np.median(first)) if len(first) else math.nan
        noise, eval_noise = noise_level(train.values), _eval_noise(held_out.values)
        return cls(
            train=train,
            eval=held_out,
            noise=noise,
            eval_noise=eval_noise,
            start=start,
            not_finite=_not_finite(metrics, "loss"),
            eval_not_finite=_not_finite(metrics, "eval_loss"),
            last_step=last_step,
            skipped=_skipped(metrics),
            numbers={"last_step": last_step, **_figures(train, held_out, start, noise, eval_noise)},
        )


def level_at(curve: Curve, progress: float) -> float:
    """Return the median of the points around a progress: a twelfth of all points, at least three."""
    index = int(np.searchsorted(curve.progress, progress))
    half = max(1, len(curve) // 24)
    low = min(max(0, index - half), max(0, len(curve) - 2 * half))
    return float(np.median(curve.values[low : index + half + 1]))


def tail(count: int) -> int:
    """Return how many of `count` points are a curve's end: a tenth, at least 3 (2 below 20 points, 1 below 6)."""
    return max(3 if count >= 20 else 2 if count >= 6 else 1, count // 10)


def rate_decays(train: Curve) -> bool:
    """Return whether the learning rate at the end is well below its mean."""
    end = train.after(0.9)
    return len(end) > 1 and (end.steps[-1] - end.steps[0]) > 0.2 * train.steps[-1]


def _eval_noise(values: np.ndarray) -> float:
    if not len(values):
        return noise_level(values)
    level = float(np.median(values))
    # Few evaluations do not show their noise; each reads the same rows, so it is small.
    return max(0.005 * level if len(values) < 5 else noise_level(values), 0.001 * level)


def _figures(train: Curve, held_out: Curve, start: float, noise: float, eval_noise: float) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "train_points": len(train),
        "eval_points": len(held_out),
        "train_noise": noise,
        "eval_noise": eval_noise if len(held_out) else None,
    }
    if len(train):
        numbers |= {"train_start": start, "train_end": train.end()}
    if len(held_out):
        best = int(np.argmin(held_out.values))
        numbers |= {
            "eval_start": held_out.values[0],
            "eval_end": held_out.end(),
            "best_eval_loss": held_out.values[best],
            "best_eval_step": int(held_out.steps[best]),
        }
    if len(train) and len(held_out):
        numbers["gap"] = held_out.end() - train.end()
    return numbers


def _learning_progress(metrics: Sequence[Mapping[str, Any]], last_step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, and the progress of learning at each: the integral of the learning rate as a share of the whole."""
    steps, rates = series(metrics, "learning_rate")
    if len(steps) < 2 or not (rates > 0).any():
        return np.array([0.0, max(last_step, 1)]), np.array([0.0, 1.0])
    steps, rates = np.concatenate([[0.0], steps]), np.concatenate([rates[:1], rates])
    integral = np.concatenate([[0.0], np.cumsum(np.diff(steps) * (rates[1:] + rates[:-1]) / 2)])
    return steps, integral / integral[-1]


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> int:
    counts = [row["skipped_steps"] for row in metrics if isinstance(row.get("skipped_steps"), int)]
    return max(counts, default=0)


def _not_finite(metrics: Sequence[Mapping[str, Any]], key: str) -> list[int]:
    def is_bad(value: Any) -> bool:
        return value is None or (isinstance(value, float) and not math.isfinite(value))

    last = {
        row["step"]: is_bad(row[key]) for row in metrics if key in row and isinstance(row.get("step"), (int, float))
    }
    return sorted(int(step) for step, bad in last.items() if bad)

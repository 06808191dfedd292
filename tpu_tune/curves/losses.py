"""The losses of a run as the diagnosis sees them: over the learning done, with their noise and their ends.

"Learning done" is the integral of the learning rate, from 0 to 1 at the end of the run; where the rows have no learning
rate, it is the share of the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune.curves.series import series
from tpu_tune.curves.statistics import noise_level

MIN_TRAIN = 6  # training losses, below which nothing is said of them
Found = tuple[str, str, list[str], list[str]] | None  # verdict, reason, evidence, advice


@dataclasses.dataclass
class Curve:
    """A loss over steps; `spent` is the learning done until each, from 0 to 1 at the end of the run."""

    steps: np.ndarray
    values: np.ndarray
    spent: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def end(self) -> float:
        """Median of the last tenth, at least three points (two of fewer than twenty, one of fewer than six)."""
        return float(np.median(self.values[-tail(len(self)) :]))

    def after(self, share: float) -> Curve:
        """The points after a share of the learning."""
        kept = self.spent >= share
        return Curve(self.steps[kept], self.values[kept], self.spent[kept])


@dataclasses.dataclass
class Losses:
    """Both losses of a run, as every part of the diagnosis looks at them.

    Attributes:
      train, eval: their finite values.
      noise, eval_noise: standard deviation of one point.
      start: where the training loss began.
      not_finite, eval_not_finite: steps whose losses were no numbers.
      last_step: of any row.
      skipped: updates that were not made, for their gradients were not finite (float16's first ones are usual).
      numbers: figures for the reader, to which the diagnosis adds.
      remarks: what was seen besides.
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
    remarks: list[str]

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, Any]]) -> Losses:
        """Read them from metrics rows, in any order."""
        steps, losses = series(metrics, "loss")
        eval_steps, eval_losses = series(metrics, "eval_loss")
        all_steps = [row["step"] for row in metrics if isinstance(row.get("step"), (int, float))]
        last = int(max(all_steps, default=0))
        at, spent = _learning(metrics, last)
        train, held_out = (
            Curve(s, v, np.interp(s, at, spent)) for s, v in ((steps, losses), (eval_steps, eval_losses))
        )
        noise, eval_noise = noise_level(losses), noise_level(eval_losses)
        if len(eval_losses):
            level = float(np.median(eval_losses))
            # Of few evaluations the noise cannot be read off; their rows are the same each time, so it is small.
            eval_noise = max(0.005 * level if len(eval_losses) < 5 else eval_noise, 0.001 * level)
        first = losses[: max(1, len(losses) // 50)]
        numbers: dict[str, Any] = {
            "train_points": len(train),
            "eval_points": len(held_out),
            "last_step": last,
            "train_noise": noise,
            "eval_noise": eval_noise if len(eval_losses) else None,
        }
        start = float(np.median(first)) if len(first) else math.nan
        if len(train):
            numbers |= {"train_start": start, "train_end": train.end()}
        if len(held_out):
            best = int(np.argmin(eval_losses))
            numbers |= {
                "eval_start": eval_losses[0],
                "eval_end": held_out.end(),
                "best_eval_loss": eval_losses[best],
                "best_eval_step": int(eval_steps[best]),
            }
        if len(train) and len(held_out):
            numbers["gap"] = held_out.end() - train.end()
        return cls(
            train,
            held_out,
            noise,
            eval_noise,
            start,
            _not_finite(metrics, "loss"),
            _not_finite(metrics, "eval_loss"),
            last,
            _skipped(metrics),
            numbers,
            [],
        )


def level_at(curve: Curve, spent: float) -> float:
    """Median of the points around a place, a twelfth of them and at least three."""
    place = int(np.searchsorted(curve.spent, spent))
    half = max(1, len(curve) // 24)
    low = min(max(0, place - half), max(0, len(curve) - 2 * half))
    return float(np.median(curve.values[low : place + half + 1]))


def tail(count: int) -> int:
    """How many of `count` points are the end of a curve."""
    return max(3 if count >= 20 else 2 if count >= 6 else 1, count // 10)


def _learning(metrics: Sequence[Mapping[str, Any]], last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the share of the run's learning done until each: the integral of the learning rate."""
    steps, rates = series(metrics, "learning_rate")
    if len(steps) < 2 or not (rates > 0).any():
        return np.array([0.0, max(last, 1)]), np.array([0.0, 1.0])
    steps, rates = np.concatenate([[0.0], steps]), np.concatenate([rates[:1], rates])
    spent = np.concatenate([[0.0], np.cumsum(np.diff(steps) * (rates[1:] + rates[:-1]) / 2)])
    return steps, spent / spent[-1]


def rate_decays(train: Curve) -> bool:
    """Whether the learning rate at the end is well below its mean."""
    end = train.after(0.9)
    return len(end) > 1 and (end.steps[-1] - end.steps[0]) > 0.2 * train.steps[-1]


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> int:
    counts = [row["skipped_steps"] for row in metrics if isinstance(row.get("skipped_steps"), int)]
    return max(counts, default=0)


def _not_finite(metrics: Sequence[Mapping[str, Any]], key: str) -> list[int]:
    def bad(value: Any) -> bool:
        return value is None or (isinstance(value, float) and not math.isfinite(value))

    last = {row["step"]: bad(row[key]) for row in metrics if key in row and isinstance(row.get("step"), (int, float))}
    return sorted(int(step) for step, is_bad in last.items() if is_bad)

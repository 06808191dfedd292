"""Hints of `tpu-tune train` that the learning rate is too high or too low, from the run's own losses.

Losses are noisy because batches differ (on the quickstart's chats by 40% of the loss). So everything is compared with
that noise, and if it hides the answer there is no hint. Losses are taken as logarithms: differences are shares of the
loss.

Too high (any of):
- two or more of the last ten losses are not finite;
- the loss is well above its start: the median of the last third exceeds that of the first points by a quarter, and by
  more than three times the noise;
- it has risen from the minimum of its running median by a tenth and by more than five times the noise;
- it swings: the median difference between neighbouring losses, in nats, is three times that of the first third and a
  fifth of the loss, a rank test (Mann and Whitney 1947) finds the differences larger too (z above 3), and nothing has
  been learned: the evaluation loss is not below the first one, or without evaluations the mean of the last third is not
  a tenth below that of the first. Rows of a few texts differ that much by themselves.

Too low: the loss barely moves. With evaluations, which read the same rows each time: the evaluation loss has changed
by less than half a percent over a third or more of the learning progress (the sum of the rates), and the training
losses show no fall beyond their noise. Without: a line through the training losses over the progress falls by less than
three percent, even if its slope is taken two standard errors steeper.

There is no hint before there are enough points, nor while the rate still rises.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

_MIN_LOSSES = 10
_START = 0.05  # progress up to which the loss is still that of the start


@dataclasses.dataclass(frozen=True)
class Hint:
    """A hint about the learning rate.

    Attributes:
      verdict: "too high" or "too low".
      evidence: the observation behind it, with numbers.
      advice: what to try.
    """

    verdict: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"hint: the learning rate looks {self.verdict}: {self.evidence}. {self.advice}"


def hint_of(metrics: Sequence[Mapping[str, Any]]) -> Hint | None:
    """Return `rate_hint` for rows of metrics.jsonl, in which a loss that is not finite is null."""
    train = [row for row in metrics if "loss" in row and "learning_rate" in row]
    evals = [row for row in metrics if isinstance(row.get("eval_loss"), (int, float))]
    return rate_hint(
        [row["step"] for row in train],
        [math.nan if row["loss"] is None else row["loss"] for row in train],
        [row["learning_rate"] or 0.0 for row in train],
        [row["step"] for row in evals],
        [row["eval_loss"] for row in evals],
    )


class NewHints:
    """The hints of a run in progress, each verdict only once until another comes."""

    def __init__(self) -> None:
        """Start without a verdict."""
        self._last_verdict = ""

    def __call__(self, metrics: Sequence[Mapping[str, Any]]) -> str:
        """Return the hint for all metrics rows so far, or "" if there is none or its verdict is the last one."""
        hint = hint_of(metrics)
        if hint is None or hint.verdict == self._last_verdict:
            return ""
        self._last_verdict = hint.verdict
        return str(hint)


def rate_hint(
    steps: Sequence[int],
    losses: Sequence[float],
    learning_rates: Sequence[float],
    eval_steps: Sequence[int] = (),
    eval_losses: Sequence[float] = (),
) -> Hint | None:
    """Return a hint if the losses are clear, else None.

    Args:
      steps: steps of the training losses, ascending.
      losses: training losses (nats per token), of single steps or means since the row before; may be not finite.
      learning_rates: learning rates at these steps.
      eval_steps: steps of the evaluations, ascending; step 0 is before training.
      eval_losses: evaluation losses, on the same rows every time.
    """
    steps, losses, rates = (np.asarray(values, float) for values in (steps, losses, learning_rates))
    lower = "Try a third of the rate, or let tpu-tune lr-find look for one"
    finite = np.isfinite(losses)
    bad = int(np.sum(~finite[-10:]))
    if bad >= 2:
        return Hint("too high", f"{bad} of the last {len(finite[-10:])} losses are not finite", lower)
    steps, losses, rates = steps[finite], losses[finite], rates[finite]
    if len(losses) < _MIN_LOSSES or losses.min() <= 0 or rates.max() <= 0 or rates[-1] > rates[-2]:
        return None
    # Progress before each loss: the integral of the rates, which are linear between rows.
    integral = np.concatenate([[0.0], np.cumsum(np.diff(steps) * (rates[1:] + rates[:-1]) / 2)])
    progress = integral / integral[-1] if integral[-1] > 0 else np.linspace(0, 1, len(steps))
    eval_steps, eval_losses = np.asarray(eval_steps, float), np.asarray(eval_losses, float)
    evidence = _too_high(losses, progress, eval_losses[np.isfinite(eval_losses)])
    if evidence:
        return Hint("too high", evidence, lower)
    evidence = _too_low(steps, losses, progress, eval_steps, eval_losses)
    if evidence:
        higher = "Try three to ten times the rate, or let tpu-tune lr-find look for one"
        return Hint("too low", evidence, f"{higher}, unless the model knows this data already")
    return None


def _noise(logs: np.ndarray) -> float:
    """Return the standard deviation of one log loss: 1.4826 MAD / sqrt 2 of neighbours' differences, free of trends."""
    return float(1.4826 * np.median(np.abs(np.diff(logs))) / math.sqrt(2))


def _too_high(losses: np.ndarray, progress: np.ndarray, eval_losses: np.ndarray) -> str:
    """Return the evidence that the rate is too high, or ""."""
    logs, count = np.log(losses), len(losses)
    noise = _noise(logs)
    first = max(1, int(np.sum(progress <= _START)))
    late = logs[-(count // 3) :]
    # A run that explodes does so at its second loss: the first loss may be the only one of the start.
    start = min(logs[0], float(np.median(logs[:first])))
    rise = float(np.median(late)) - start
    if rise > max(math.log(1.25), 3 * noise):
        return f"the loss went from {math.exp(start):.3g} at the start to {math.exp(np.median(late)):.3g} now"
    width = max(5, count // 6)
    levels = np.array([np.median(logs[i : i + width]) for i in range(count - width + 1)])
    error = 1.25 * noise * math.sqrt(2 / width)  # the standard error of a median is 1.25 sd / sqrt n
    if levels[-1] - levels.min() > math.log(1.1) + 5 * error:
        return f"the loss has risen from {math.exp(levels.min()):.3g}, its lowest level, to {math.exp(levels[-1]):.3g}"
    differences, third = np.abs(np.diff(losses)), count // 3
    early, now = differences[:third], differences[-third:]
    learned = (
        eval_losses[-1] < eval_losses[0]
        if len(eval_losses) > 1
        else np.mean(losses[-third:]) < 0.9 * np.mean(losses[:third])
    )
    larger = np.median(now) > max(3 * np.median(early), 0.2 * np.median(losses[-third:]))
    if count >= 30 and larger and not learned and _rank_z(now, early) > 3:
        return f"the loss swings by {np.median(now):.2g} from one row to the next, {np.median(early):.2g} at the start"
    return ""


def _rank_z(values: np.ndarray, others: np.ndarray) -> float:
    """Return Mann and Whitney's U, standardized: above 0 if values tend to be larger than the others."""
    n, m = len(values), len(others)
    u = stats.mannwhitneyu(values, others).statistic
    return float((u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12))


def _too_low(
    steps: np.ndarray, losses: np.ndarray, progress: np.ndarray, eval_steps: np.ndarray, eval_losses: np.ndarray
) -> str:
    """Return the evidence that the rate is too low, or ""."""
    logs, count = np.log(losses), len(losses)
    noise = _noise(logs)
    # Fall of a line through the losses over the progress from 0 to 1, and its standard error.
    centred = progress - progress.mean()
    spread = float(np.sum(centred**2))
    fall, error = -float(np.sum(centred * logs)) / spread, noise / math.sqrt(spread)
    # The line misses a fast fall at the start before a flat run; the difference of means does not.
    first = max(3, int(np.sum(progress <= _START)))
    drop = float(np.mean(logs[:first]) - np.mean(logs[first:]))
    drop_error = noise * math.sqrt(1 / first + 1 / (count - first))
    flat = abs(fall) < 2 * error + 0.01 and abs(drop) < 2 * drop_error + 0.01
    from_start = bool(len(eval_steps)) and eval_steps[0] == 0
    if len(eval_losses) >= 2 and eval_losses.min() > 0 and (flat or from_start):
        first_progress, last_progress = np.interp(eval_steps[[0, -1]], steps, progress)
        change = math.log(eval_losses[-1] / eval_losses[0])
        if last_progress - first_progress > 1 / 3 and abs(change) < 0.005:
            first_loss, last_loss = f"{eval_losses[0]:.4f} at step {eval_steps[0]:.0f}", f"{eval_losses[-1]:.4f}"
            also = "" if from_start else "; and the training loss shows no fall"
            return f"the evaluation loss barely moved: {first_loss}, {last_loss} at step {eval_steps[-1]:.0f}{also}"
        return ""
    if flat and abs(fall) + 2 * error < 0.03:
        return (
            f"the training loss barely moved: it fell by {100 * fall:.1f}% (+-{200 * error:.1f}%) over {count} losses"
        )
    return ""

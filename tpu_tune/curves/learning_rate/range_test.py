"""The learning-rate range test: one run whose rate climbs by the same factor every step, and what its losses say.

The test is that of Smith (2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3), with an
exponential ramp, a smoothed loss with bias correction and an end at divergence as fastai does it. Two things differ.

Batches differ more from each other than any rate changes them (on the quickstart's chats by 40% of the loss), so every
loss is set against what the untouched model has on the same batch, and the ratio of the two smoothed series is looked at.

The suggestion is a tenth of the *edge*, the rate from which on the smoothed loss has lost half of what it had gained.
The steepest point comes too early (there the model has only begun to learn) and a tenth of the minimum depends on how
long the flat bottom is; the edge is sharp, because a loss that runs away does so within a few steps, and training at
one rate all along, which adds up what the ramp passes through, goes wrong from about a third of it. A small model may
only fall back to guessing and show no edge: then it is the rate at which half of the fall was made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from tpu_tune.errors import UserError

FEWEST_STEPS = 10
DIVERGED = 4.0  # times the best smoothed loss
MEMORY = 0.8  # of the running mean, a step, in a test of 60 steps: it reaches over half a power of ten of seven
_BELOW_EDGE = 10.0  # the suggestion
_HIGHEST = 3.0  # below the edge: where runs begin to go wrong
_NOTHING = 0.01  # of the loss: a smaller fall is none


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """A finished test; the arrays are float64, one number a step.

    Attributes:
      rates: learning rate of each step's update.
      losses: of each step's batch, before its update (nats a token); the last may be not finite.
      untrained: the untouched model's losses on the same batches.
      smoothed: the loss of an average batch: ratio of the two running means times the mean of `untrained`.
      end: "highest rate", "diverged" or "not finite".
    """

    rates: np.ndarray
    losses: np.ndarray
    untrained: np.ndarray
    smoothed: np.ndarray
    end: str


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A learning rate, the range that looks good, and why.

    Attributes:
      rate: to train with.
      low: below it, runs look too slow.
      high: above it, too fast.
      reason: in plain words, with the numbers.
    """

    rate: float
    low: float
    high: float
    reason: str


def ramp(low: float, high: float, steps: int) -> np.ndarray:
    """Return `steps` rates from `low` to `high` in equal factors.

    Raises:
      UserError: not 0 < low < high, or too few steps.
    """
    check_range(low, high, "--min", "--max")
    if steps < FEWEST_STEPS:
        raise UserError(f"--steps {steps}: a range test needs {FEWEST_STEPS} steps at least, and 60 are better")
    return np.geomspace(low, high, steps)


def check_range(low: float, high: float, low_name: str, high_name: str) -> None:
    """Raise a UserError unless 0 < low < high, both finite."""
    if not (math.isfinite(low) and low > 0):
        raise UserError(f"{low_name} {low:g}: a learning rate must be above zero")
    if not (math.isfinite(high) and high > low):
        raise UserError(f"{low_name} {low:g}, {high_name} {high:g}: the second must be the larger one")


def smooth(series: Sequence[float], memory: float) -> np.ndarray:
    """Return the running mean that keeps `memory` of itself at every step, its bias towards zero taken out.

    The correction is Adam's (Kingma and Ba 2015, section 3): after t steps divide by 1 - memory^t.
    """
    mean, means = 0.0, []
    for step, value in enumerate(series, start=1):
        mean = memory * mean + (1 - memory) * value
        means.append(mean / (1 - memory**step))
    return np.array(means, float)


def ran_away(losses: Sequence[float], untrained: Sequence[float], memory: float) -> str:
    """Return "not finite" or "diverged" where the last loss is, or the smoothed one is `DIVERGED` times its best; else ""."""
    if not math.isfinite(losses[-1]):
        return "not finite"
    curve = relative(losses, untrained, memory)
    return "diverged" if curve[-1] > DIVERGED * curve.min() else ""


def relative(losses: Sequence[float], untrained: Sequence[float], memory: float) -> np.ndarray:
    """Return the smoothed losses as a share of what the untouched model's, smoothed alike, are on the same batches."""
    return smooth(losses, memory) / smooth(untrained[: len(losses)], memory)


def range_test(losses: Iterable[float], rates: Sequence[float], untrained: Sequence[float]) -> RangeTest:
    """Take losses until they end or run away.

    Args:
      losses: of a run from the start with a step for each rate; nothing is taken from it past the end of the test.
      rates: from `ramp`.
      untrained: the untouched model's loss on each step's batch (all the same where batches are).
    """
    memory, taken, end = MEMORY ** (60 / len(rates)), [], ""
    for loss in losses:
        taken.append(loss)
        end = ran_away(taken, untrained, memory)
        if end:
            break
    count, untrained = len(taken), np.asarray(untrained, float)
    smoothed = relative(taken, untrained, memory) * untrained.mean()
    return RangeTest(
        np.asarray(rates, float)[:count], np.array(taken, float), untrained[:count], smoothed, end or "highest rate"
    )


def suggest(test: RangeTest) -> Suggestion:
    """Return the learning rate that a test speaks for.

    Raises:
      UserError: it diverged before it had begun, or the loss did not move.
    """
    rates, curve = test.rates, np.where(np.isfinite(test.smoothed), test.smoothed, np.inf)
    if len(rates) < 4:
        raise UserError(f"the loss ran away at once, at {rates[-1]:.1e}: choose a lower --min than {rates[0]:g}")
    start, lowest = curve[0], int(np.argmin(curve))
    fall = start - curve[lowest]
    if fall < _NOTHING * abs(start):
        how = (
            f"the loss did not move up to a rate of {rates[-1]:.1e}"
            if test.end == "highest rate"
            else (f"the loss ran away at {rates[-1]:.1e} without having fallen before")
        )
        raise UserError(f"{how}: choose a higher --max, a lower --min or more --steps")
    half = float(rates[np.argmax(curve < start - fall / 2)])
    words = f"the smoothed loss fell from {start:.3g} to {curve[lowest]:.3g} at {rates[lowest]:.1e}"
    edge = int(np.flatnonzero(curve <= curve[lowest] + fall / 2)[-1]) + 1
    if edge == len(rates):
        reason = (
            f"{words} and did not run away up to the highest rate tried, {rates[-1]:.1e}; {half:.1e} is where half of the fall "
            "was made"
        )
        return Suggestion(half, half / _HIGHEST, max(float(rates[lowest]), half * _HIGHEST), reason)
    last = float(rates[edge])
    rate = max(last / _BELOW_EDGE, min(half, last / _HIGHEST))
    share = "a tenth" if rate == last / _BELOW_EDGE else f"1/{last / rate:.1f}"
    reason = f"{words} and had lost half of that again at {last:.1e}; {share} of this edge keeps clear of it"
    if half <= rate:
        reason += f" and is past {half:.1e}, where half of the fall was made"
    return Suggestion(rate, min(half, rate / 2), max(last / _HIGHEST, rate * 1.5), reason)

"""The learning-rate range test: one run whose rate grows by the same factor every step, and what it suggests.

The test is that of Smith (2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3), with an
exponential ramp, a smoothed loss with bias correction and an end at divergence, as in fastai. Two things differ.

The losses of batches differ more from each other than any rate changes them (on the quickstart's chats by 40% of the
loss). So each loss is compared with the untrained model's loss on the same batch: the curve is the ratio of the two
smoothed series.

The suggestion is a tenth of the *edge*, the rate at which the smoothed loss has risen again by half of its fall. The
steepest point would be too early (there the model has only begun to learn), and a tenth of the minimum would depend on
the length of the flat bottom. The edge is sharp, because a loss diverges within a few steps; and training at a constant
rate, which adds up what the ramp only passes through, fails from about a third of the edge on. A small model may only
fall back to guessing and show no edge: then the suggestion is the rate at which half of the fall was reached.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from tpu_tune.curves.series import ema
from tpu_tune.errors import UserError

MIN_STEPS = 10
DIVERGED = 4.0  # times the best smoothed loss
BETA = 0.8  # of the running mean in a test of 60 steps: it averages over about half a decade of the seven decades
_BELOW_EDGE = 10.0  # the suggestion is the edge divided by this
_FAILS_BELOW_EDGE = 3.0  # runs begin to fail at the edge divided by this
_MIN_FALL = 0.01  # share of the loss: a smaller fall does not count


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """A finished test; the arrays are float64, one number a step.

    Attributes:
      rates: learning rate of each step's update.
      losses: of each step's batch, before its update (nats a token); the last may be not finite.
      untrained: the untrained model's losses on the same batches.
      smoothed: the loss of an average batch: ratio of the two running means times the mean of `untrained`.
      end: why the test ended: "highest rate", "diverged" or "not finite".
    """

    rates: np.ndarray
    losses: np.ndarray
    untrained: np.ndarray
    smoothed: np.ndarray
    end: str


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A learning rate to train with, and the range that looks good.

    Attributes:
      rate: the suggested learning rate.
      low: rates below it look too low.
      high: rates above it look too high.
      reason: why, in a sentence with the numbers.
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
    if steps < MIN_STEPS:
        raise UserError(f"--steps {steps}: a range test needs {MIN_STEPS} steps at least; 60 are better")
    return np.geomspace(low, high, steps)


def check_range(low: float, high: float, low_name: str, high_name: str) -> None:
    """Raise a UserError unless 0 < low < high, both finite."""
    if not (math.isfinite(low) and low > 0):
        raise UserError(f"{low_name} {low:g}: a learning rate must be above zero")
    if not (math.isfinite(high) and high > low):
        raise UserError(f"{low_name} {low:g}, {high_name} {high:g}: the second must be the larger one")


def divergence(losses: Sequence[float], untrained: Sequence[float], beta: float) -> str:
    """Return why a run should stop, or "".

    "not finite" if the last loss is not; "diverged" if the smoothed loss is `DIVERGED` times its minimum.
    """
    if not math.isfinite(losses[-1]):
        return "not finite"
    curve = relative(losses, untrained, beta)
    return "diverged" if curve[-1] > DIVERGED * curve.min() else ""


def relative(losses: Sequence[float], untrained: Sequence[float], beta: float) -> np.ndarray:
    """Return the smoothed losses as a share of the untrained model's smoothed losses on the same batches."""
    return ema(losses, beta) / ema(untrained[: len(losses)], beta)


def range_test(losses: Iterable[float], rates: Sequence[float], untrained: Sequence[float]) -> RangeTest:
    """Read losses until they end or diverge.

    Args:
      losses: training losses of a run from the start, a step for each rate; none is read after the end of the test.
      rates: from `ramp`.
      untrained: the untrained model's loss on each step's batch.
    """
    beta, read, end = BETA ** (60 / len(rates)), [], ""
    for loss in losses:
        read.append(loss)
        end = divergence(read, untrained, beta)
        if end:
            break
    count, untrained = len(read), np.asarray(untrained, float)
    smoothed = relative(read, untrained, beta) * untrained.mean()
    return RangeTest(
        np.asarray(rates, float)[:count], np.array(read, float), untrained[:count], smoothed, end or "highest rate"
    )


def suggest(test: RangeTest) -> Suggestion:
    """Return the learning rate that a test suggests.

    Raises:
      UserError: the loss diverged at once, or did not fall.
    """
    rates, curve = test.rates, np.where(np.isfinite(test.smoothed), test.smoothed, np.inf)
    if len(rates) < 4:
        raise UserError(f"the loss diverged at once, at a rate of {rates[-1]:.1e}: set --min below {rates[0]:g}")
    start, lowest = curve[0], int(np.argmin(curve))
    fall = start - curve[lowest]
    if fall < _MIN_FALL * abs(start):
        problem = f"did not fall up to a rate of {rates[-1]:.1e}"
        if test.end != "highest rate":
            problem = f"diverged at a rate of {rates[-1]:.1e} and had not fallen before"
        raise UserError(f"the loss {problem}: set a higher --max, a lower --min or more --steps")
    half = float(rates[np.argmax(curve < start - fall / 2)])
    fell = f"as the rate grew, the loss fell from {start:.3g} to {curve[lowest]:.3g} (at {rates[lowest]:.1e})"
    edge = int(np.flatnonzero(curve <= curve[lowest] + fall / 2)[-1]) + 1
    if edge == len(rates):
        reason = (
            f"{fell} and did not diverge up to the highest rate tried, {rates[-1]:.1e}; half of the fall was made "
            f"at {half:.1e}, which the range test takes"
        )
        good = half / _FAILS_BELOW_EDGE, max(float(rates[lowest]), half * _FAILS_BELOW_EDGE)
        return Suggestion(half, *good, reason)
    last = float(rates[edge])
    rate = max(last / _BELOW_EDGE, min(half, last / _FAILS_BELOW_EDGE))
    taken = f"a tenth of that is {rate:.1e}"
    if rate > last / _BELOW_EDGE:  # where a tenth would be too low to have learned much
        taken = f"a third of that is {rate:.1e}"
        taken = f"half of the fall was made at {rate:.1e}" if rate == half else taken
    reason = f"{fell} and was halfway up again at {last:.1e}; {taken}, which the range test takes"
    return Suggestion(rate, min(half, rate / 2), max(last / _FAILS_BELOW_EDGE, rate * 1.5), reason)

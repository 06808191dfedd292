"""A task's figures with their 95% confidence intervals, for one model and for the difference of two.

The interval of a share is Wilson's score interval (Wilson 1927, JASA 22:209; Brown, Cai and DasGupta 2001 recommend it
for few questions). Everything else is a percentile bootstrap over questions (Efron and Tibshirani 1993, chapter 13).
Two models that answered the same questions are compared by the paired bootstrap (Koehn 2004, W04-3250): each resample
takes the same questions of both, so that what makes a question hard for both does not widen the interval. A mean over
subjects is resampled within each subject. The draws are seeded: the same results give the same intervals.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tpu_tune.errors import UserError

RESAMPLES = 2000
_Z = 1.959963984540054  # the normal distribution's 97.5th percentile


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure as a sum over units (questions, or rows of text): mean over groups of sum(terms) / sum(weights).

    Attributes:
      name: the figure's name.
      terms: (units,) what each unit adds: 1 where an answer is right, or a loss.
      weights: (units,) what each unit counts: 1, or its number of tokens or bytes.
      groups: (units,) number of each unit's subject, from 0; all 0 where there are none.
      is_share: terms are 0 or 1 and weights 1.
    """

    name: str
    terms: np.ndarray
    weights: np.ndarray
    groups: np.ndarray
    is_share: bool = False

    @classmethod
    def share(cls, name: str, right: Any, groups: Any = None) -> Measure:
        """Return the share of right answers, or its mean over `groups`."""
        right = np.asarray(right, float)
        groups = np.zeros(len(right), np.int64) if groups is None else np.asarray(groups, np.int64)
        return cls(name, right, np.ones(len(right)), groups, True)

    @classmethod
    def ratio(cls, name: str, terms: Any, weights: Any) -> Measure:
        """Return sum(terms) / sum(weights)."""
        return cls(name, np.asarray(terms, float), np.asarray(weights, float), np.zeros(len(terms), np.int64))

    @property
    def value(self) -> float:
        """The figure itself."""
        size = int(self.groups.max()) + 1
        sums = [np.bincount(self.groups, array, size) for array in (self.terms, self.weights)]
        return float(np.mean(sums[0] / sums[1]))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A task's result for one model.

    Attributes:
      figures: name -> number, as `--json` prints them.
      measures: the figures that have an interval.
      predictions: one dict for each row: the file's own keys and the model's answer.
    """

    figures: dict[str, Any]
    measures: tuple[Measure, ...]
    predictions: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with its 95% confidence interval."""

    value: float
    low: float
    high: float


def interval(measure: Measure, seed: int = 0) -> Interval:
    """Return a measure with its interval: Wilson's of a plain share, else the bootstrap's."""
    if measure.is_share and not measure.groups.any():
        return Interval(measure.value, *wilson(int(measure.terms.sum()), len(measure.terms)))
    return Interval(measure.value, *_percentiles(_resampled([measure], seed)[0]))


def compare(measure: Measure, against: Measure, seed: int = 0) -> Interval:
    """Return measure - against over the same units, with the paired bootstrap's interval.

    Raises:
      UserError: the two have different units.
    """
    if len(measure.terms) != len(against.terms) or not np.array_equal(measure.groups, against.groups):
        raise UserError(
            f"{measure.name}: {len(measure.terms)} rows of one model against {len(against.terms)} of the other; "
            "only the same rows can be compared"
        )
    ours, theirs = _resampled([measure, against], seed)
    return Interval(measure.value - against.value, *_percentiles(ours - theirs))


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the bounds of Wilson's 95% score interval of `right` out of `count`."""
    share, square = right / count, _Z**2
    middle = share + square / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    low, high = ((middle + sign * half) / (1 + square / count) for sign in (-1, 1))
    return (0.0 if right == 0 else low), (1.0 if right == count else high)


def _resampled(measures: list[Measure], seed: int) -> list[np.ndarray]:
    """Return each measure's value in every resample, (RESAMPLES,); all measures see the same draws."""
    random = np.random.default_rng(seed)
    groups = measures[0].groups
    members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
    totals = [np.zeros(RESAMPLES) for _ in measures]
    for units in members:
        block = max(1, 4_000_000 // len(units))
        for start in range(0, RESAMPLES, block):
            stop = min(RESAMPLES, start + block)
            drawn = units[random.integers(0, len(units), (stop - start, len(units)))]
            for total, measure in zip(totals, measures, strict=True):
                total[start:stop] += measure.terms[drawn].sum(1) / measure.weights[drawn].sum(1)
    return [total / len(members) for total in totals]


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

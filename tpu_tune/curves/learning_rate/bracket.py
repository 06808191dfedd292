"""The guide's own procedure: short runs at several rates, repeated closer and closer around the best one.

Every run begins with the same weights and sees the same data. Each round has about half as many rates as the one before
and trains twice as long (successive halving, Jamieson and Talwalkar 2016). Because rates are ordered, a round does not
keep the best rates themselves but the best one's neighbourhood, with rates half as far apart: 5 rates, then 3, then the
better 2. If the best rate of the first round is its lowest or highest, the round is extended in that direction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tpu_tune.curves.learning_rate.range_test import check_range
from tpu_tune.errors import UserError

TIE = 0.01  # share of a score: within it the lowest rate counts as best, because short runs favour high rates a little
MAX_EXTENSIONS = 3  # rates by which the first round may be extended
MIN_STEPS = 4  # of a run


@dataclasses.dataclass(frozen=True)
class Score:
    """How one short run ended.

    Attributes:
      round: number of the round, from 1.
      learning_rate: peak of the run's schedule.
      steps: length of the run.
      score: the loss by which runs are compared, lower is better; infinite if the run diverged.
      figures: further figures of the run, for tables.
    """

    round: int
    learning_rate: float
    steps: int
    score: float
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


Run = Callable[[float, int], tuple[float, dict[str, float]]]  # (learning rate, steps) -> (score, figures)


def bracket(
    run: Run,
    low: float,
    high: float,
    steps: int,
    sizes: tuple[int, ...] = (5, 3, 2),
    say: Callable[[Score], None] = lambda score: None,
) -> tuple[float, list[Score]]:
    """Return the best rate, and all runs in the order in which they were made.

    Args:
      run: trains from the start at a rate for a number of steps.
      low: lowest rate of the first round.
      high: highest rate of the first round.
      steps: length of a run in the last round; each round before has half of that.
      sizes: number of rates in each round.
      say: called with each finished run.

    Raises:
      UserError: not 0 < low < high, too few steps, or every run diverged.
    """
    lengths = check_bracket(low, high, steps, sizes)
    scores: list[Score] = []

    def train_at(rate: float, round: int) -> Score:
        score, figures = run(rate, lengths[round - 1])
        scores.append(Score(round, rate, lengths[round - 1], score if math.isfinite(score) else math.inf, figures))
        say(scores[-1])
        return scores[-1]

    factor = (high / low) ** (1 / (sizes[0] - 1))
    latest = [train_at(float(rate), 1) for rate in np.geomspace(low, high, sizes[0])]
    for _ in range(MAX_EXTENSIONS):
        best = best_of(latest)
        if best is latest[0]:
            latest.insert(0, train_at(best.learning_rate / factor, 1))
        elif best is latest[-1]:
            latest.append(train_at(best.learning_rate * factor, 1))
        else:
            break
    for round, size in enumerate(sizes[1:], start=2):
        best = best_of(latest)
        if not math.isfinite(best.score):
            break
        if size == 2:
            index = latest.index(best)
            neighbours = [score for score in latest[max(0, index - 1) : index + 2] if score is not best]
            rates = sorted([best.learning_rate, best_of(neighbours).learning_rate])
        else:
            factor **= 0.5
            rates = [best.learning_rate * factor**offset for offset in np.arange(size) - (size - 1) / 2]
        latest = [train_at(float(rate), round) for rate in rates]
    best = best_of(latest)
    if not math.isfinite(best.score):
        raise UserError(f"the loss diverged at every rate from {low:.1e} to {high:.1e}: give a lower bracket")
    return best.learning_rate, scores


def check_bracket(low: float, high: float, steps: int, sizes: tuple[int, ...]) -> list[int]:
    """Return the steps of each round's runs.

    Raises:
      UserError: not 0 < low < high, or too few steps.
    """
    check_range(low, high, "--bracket LOW", "HIGH")
    lengths = [steps >> rounds for rounds in reversed(range(len(sizes)))]
    if lengths[0] < MIN_STEPS:
        raise UserError(
            f"--steps {steps}: each of {len(sizes)} rounds has half the steps of the next, so the first would have "
            f"{lengths[0]}; give at least {MIN_STEPS << len(sizes) - 1}"
        )
    return lengths


def best_of(scores: list[Score]) -> Score:
    """Return the lowest rate among those whose score is within `TIE` of the best."""
    best = min(score.score for score in scores)
    return min(
        (score for score in scores if score.score <= best + TIE * abs(best)), key=lambda score: score.learning_rate
    )

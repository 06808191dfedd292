"""The guide's own procedure: short runs at several rates, and the best neighbourhood narrowed down.

Every run begins with the same weights and sees the same data. A round keeps about half as many rates as the one before
and trains twice as long (successive halving, Jamieson and Talwalkar 2016), and because rates are ordered, what it keeps
is the best one's neighbourhood, drawn half as far apart: 5 rates, then 3, then the better 2. While the best of the
first round is its lowest or highest rate, the round goes on in that direction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tpu_tune.curves.learning_rate.range_test import check_range
from tpu_tune.errors import UserError

TIE = 0.01  # of a score: of rates closer than that the lowest is best, for short runs flatter high rates a little
_FURTHER = 3  # rates that the first round may go on by
_FEWEST = 4  # steps of a run


@dataclasses.dataclass(frozen=True)
class Score:
    """How one short run ended.

    Attributes:
      round: 1, 2, ...
      learning_rate: the run's (its schedule's peak).
      steps: how long it was.
      score: what is compared, lower is better; infinite where the run ran away.
      figures: what else is known of the run, for tables.
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
      run: trains from the start with a rate for some steps.
      low: lowest rate of the first round.
      high: highest rate of the first round.
      steps: of a run in the last round; a round before has half of it.
      sizes: rates of each round.
      say: told of each run.

    Raises:
      UserError: not 0 < low < high, too few steps, or every run ran away.
    """
    lengths = check_bracket(low, high, steps, sizes)
    scores: list[Score] = []

    def take(number: int, rate: float) -> Score:
        score, figures = run(rate, lengths[number - 1])
        scores.append(Score(number, rate, lengths[number - 1], score if math.isfinite(score) else math.inf, figures))
        say(scores[-1])
        return scores[-1]

    factor = (high / low) ** (1 / (sizes[0] - 1))
    found = [take(1, float(rate)) for rate in np.geomspace(low, high, sizes[0])]
    for _ in range(_FURTHER):
        best = best_of(found)
        if best is found[0]:
            found.insert(0, take(1, best.learning_rate / factor))
        elif best is found[-1]:
            found.append(take(1, best.learning_rate * factor))
        else:
            break
    for number, size in enumerate(sizes[1:], start=2):
        if not math.isfinite(best_of(found).score):
            break
        if size == 2:
            middle = found.index(best_of(found))
            beside = [score for score in found[max(0, middle - 1) : middle + 2] if score is not found[middle]]
            rates = sorted([found[middle].learning_rate, best_of(beside).learning_rate])
        else:
            factor **= 0.5
            centre = best_of(found).learning_rate
            rates = [centre * factor**place for place in np.arange(size) - (size - 1) / 2]
        found = [take(number, float(rate)) for rate in rates]
    best = best_of(found)
    if not math.isfinite(best.score):
        raise UserError(f"the loss ran away at every rate from {low:.1e} to {high:.1e}: give a lower bracket")
    return best.learning_rate, scores


def check_bracket(low: float, high: float, steps: int, sizes: tuple[int, ...]) -> list[int]:
    """Return the steps of each round's runs.

    Raises:
      UserError: not 0 < low < high, or too few steps.
    """
    check_range(low, high, "--bracket LOW", "HIGH")
    lengths = [steps >> rounds for rounds in reversed(range(len(sizes)))]
    if lengths[0] < _FEWEST:
        raise UserError(
            f"--steps {steps}: runs of the first of {len(sizes)} rounds would have {lengths[0]}; "
            f"{_FEWEST << len(sizes) - 1} are needed"
        )
    return lengths


def best_of(scores: list[Score]) -> Score:
    """Return the lowest rate among those whose score is within `TIE` of the best."""
    best = min(score.score for score in scores)
    return min(
        (score for score in scores if score.score <= best + TIE * abs(best)), key=lambda score: score.learning_rate
    )

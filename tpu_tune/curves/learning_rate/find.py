"""`tpu-tune lr-find`: a range test on a run's own model and data, then short runs that choose; or a bracket.

The range test says where rates begin to work and where the loss runs away. A ramp spends a step or two at each rate,
though, so a few short runs under the run's own schedule, at rates around the test's suggestion, decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tpu_tune.curves.learning_rate import trials as tr
from tpu_tune.curves.learning_rate.bracket import Score, best_of, bracket, check_bracket
from tpu_tune.curves.learning_rate.range_test import MEMORY, RangeTest, Suggestion, ramp, ran_away, range_test, suggest

PROBE_STEPS = 15
APART = 3.0  # factor between the short runs after a range test
WORSE = 1.02  # times the best score of its round: a run that ends higher is not good
_ROUNDS = (5, 3, 2)  # rates of a bracket's rounds


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
      suggestion: the rate, the good range, and the reason.
      test: the range test; None where a bracket was given.
      runs: the short runs, in the order in which they were made.
      scored_by: "eval_loss" or "train_loss".
    """

    suggestion: Suggestion
    test: RangeTest | None
    runs: list[Score]
    scored_by: str


def find(
    config: ConfigDict,
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 60,
    around: tuple[float, float] | None = None,
    narrow: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Find a learning rate for a configuration; nothing is written.

    Args:
      config: the run's.
      low: the range test's lowest rate.
      high: the range test's highest rate.
      steps: of the range test, and of the bracket's longest runs.
      around: a bracket to narrow down, without a range test.
      narrow: narrow a bracket around the range test's suggestion down, instead of three short runs.
      say: told what happens.

    Raises:
      UserError: impossible ranges, whatever `train` refuses, or a loss that speaks for no rate.
    """
    ramp(low, high, steps)  # impossible numbers before anything is loaded
    if around or narrow:
        check_bracket(*(around or (low, high)), steps, _ROUNDS)
    return find_with(tr.open_trials(config), low, high, steps, around, narrow, say)


def find_with(
    trials: tr.Trials,
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 60,
    around: tuple[float, float] | None = None,
    narrow: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """As `find`, on what `trials.open_trials` gave."""
    say(f"the untouched model's losses on the data of {steps} steps")
    untrained = tr.untrained_losses(trials, steps)
    test = None
    if around is None:
        rates = ramp(low, high, steps)
        say(f"range test: from {low:.1e} up to {high:.1e} in {steps} steps")
        test = range_test((loss for loss, _ in tr.train(trials, rates)), rates, untrained)
        suggestion = suggest(test)
        say(f"range test: {test.end} at {test.rates[-1]:.1e} (step {len(test.rates)}); {suggestion.reason}")
    scored_by = "train_loss" if trials.session.data.eval is None else "eval_loss"

    def run(rate: float, length: int) -> tuple[float, dict[str, float]]:
        return short_run(trials, rate, length, untrained)

    def tell(score: Score) -> None:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in score.figures.items())
        say(f"{score.steps} steps at {score.learning_rate:.1e}: {figures}")

    if test is not None and not narrow:
        rate, runs = bracket(run, suggestion.rate / APART, suggestion.rate * APART, min(PROBE_STEPS, steps), (3,), tell)
    else:
        ends = around or (suggestion.rate / 10, suggestion.high)
        rate, runs = bracket(run, *ends, steps, _ROUNDS, tell)
    return Found(_chosen(rate, runs, suggestion if test is not None else None, scored_by), test, runs, scored_by)


def short_run(trials: tr.Trials, rate: float, steps: int, untrained: list[float]) -> tuple[float, dict[str, float]]:
    """Train for some steps under the whole schedule with its peak at `rate`.

    Returns:
      The score, infinite where the run ran away, and the figures: `train_loss` of the run's second half, as an average
      batch would have it, and `eval_loss` at its end where the run evaluates; the latter is the score if it is there.
    """
    losses, away, state = [], "", None
    for loss, state in tr.train(trials, tr.scheduled(trials, rate, steps)):  # noqa: B007
        losses.append(loss)
        away = ran_away(losses, untrained, MEMORY)
        if away:
            break
    late = len(losses) // 2
    share = sum(losses[late:]) / sum(untrained[late : len(losses)])
    figures = {"train_loss": share * float(np.mean(untrained))}
    if trials.session.data.eval is not None and not away:
        figures["eval_loss"] = tr.held_out_loss(trials, state)
    score = figures.get("eval_loss", math.inf if trials.session.data.eval is not None else figures["train_loss"])
    return math.inf if away or not math.isfinite(score) else score, figures


def _chosen(rate: float, runs: list[Score], tested: Suggestion | None, scored_by: str) -> Suggestion:
    """Return what the short runs say; runs that ended clearly higher than the best narrow the good range."""
    last = sorted((run for run in runs if run.round == runs[-1].round), key=lambda run: run.learning_rate)
    best = best_of(last)
    others = ", ".join(
        f"{run.learning_rate:.1e}: " + (f"{run.score:.4g}" if math.isfinite(run.score) else "ran away")
        for run in last
        if run is not best
    )
    reason = (
        f"{best.steps} steps from the same start on the same data end at {scored_by.replace('_', ' ')} {best.score:.4g} "
        f"with {rate:.1e} ({others})"
    )
    if tested is None:
        low, high = min(run.learning_rate for run in runs), max(run.learning_rate for run in runs)
    else:
        low, high, reason = min(tested.low, rate / 2), max(tested.high, rate * 2), f"{tested.reason}. {reason}"
    for number in {run.round for run in runs}:
        part = [run for run in runs if run.round == number]
        least = min(run.score for run in part)
        bad = [run.learning_rate for run in part if not run.score <= WORSE * least]
        low = max([low, *[one for one in bad if one < rate]])
        high = min([high, *[one for one in bad if one > rate]])
    return Suggestion(rate, low, high, reason)


def figures(found: Found, config: ConfigDict) -> dict[str, Any]:
    """Return what was found as plain values, for JSON; what is not finite is None."""
    rate, (low, high) = config.train.learning_rate, (found.suggestion.low, found.suggestion.high)
    verdict = "too slow" if rate < low else "too fast" if rate > high else "good"
    told = {
        "learning_rate": float(f"{found.suggestion.rate:.1e}"),
        "good": [low, high],
        "reason": found.suggestion.reason,
        "configured": f"the config's {rate:.1e} looks {verdict}",
        "scored_by": found.scored_by,
        "runs": [
            {
                "round": run.round,
                "learning_rate": run.learning_rate,
                "steps": run.steps,
                "score": _finite(run.score),
                **{name: _finite(value) for name, value in run.figures.items()},
            }
            for run in found.runs
        ],
    }
    if found.test is not None:
        arrays = {name: getattr(found.test, name) for name in ("rates", "losses", "untrained", "smoothed")}
        told["range_test"] = {name: [_finite(float(value)) for value in array] for name, array in arrays.items()}
        told["range_test"]["end"] = found.test.end
    return told


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

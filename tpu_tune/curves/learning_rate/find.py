"""Find a learning rate: a range test on a run's own model and data, then short runs that decide; or a bracket.

The range test shows at which rates learning begins and at which the loss diverges. But it spends only a step or two at
each rate, so a few short runs decide, under the run's own schedule and at rates around the test's suggestion.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tpu_tune.curves.learning_rate import trials as tr
from tpu_tune.curves.learning_rate.bracket import MAX_EXTENSIONS, TIE, Score, best_of, bracket
from tpu_tune.curves.learning_rate.finder_options import FinderOptions
from tpu_tune.curves.learning_rate.range_test import BETA, RangeTest, Suggestion, divergence, ramp, range_test, suggest
from tpu_tune.training.progress import duration

APART = 3.0  # factor between the rates of the short runs after a range test
WORSE = 1.02  # a run whose score is this many times the best of its round does not look good
_TIMED = 4  # forward passes from which the time of the whole is estimated

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FinderResult:
    """A learning rate and how it was found.

    Attributes:
      suggestion: the rate, the range that looks good, and the reason.
      test: the range test; None if a bracket was given.
      runs: the short runs, in the order in which they were made.
      scored_by: the loss that compares the runs, "eval_loss" or "train_loss".
    """

    suggestion: Suggestion
    test: RangeTest | None
    runs: list[Score]
    scored_by: str


def find(config: ConfigDict, options: FinderOptions, say: Say = lambda line: None) -> FinderResult:
    """Find a learning rate for a configuration; nothing is written.

    Args:
      config: the whole configuration.
      options: how to look for it.
      say: called with lines about the progress.

    Raises:
      UserError: ranges that make no sense, whatever `train` refuses, or losses that suggest no rate.
    """
    options.check()
    return find_with(tr.open_trials(config), options, say)


def find_with(trials: tr.Trials, options: FinderOptions, say: Say = lambda line: None) -> FinderResult:
    """Find a learning rate as `find` does, with trials that are open already."""
    steps = options.steps
    say(f"{_outline(options)}; first the untrained model's losses on the data of these {steps} updates")
    untrained = tr.untrained_losses(trials, steps, _estimate(trials, options, say))
    test = tested = None
    if options.bracket is None:
        rates = ramp(options.low, options.high, steps)
        say(f"range test: from {options.low:.1e} up to {options.high:.1e} in {steps} updates")
        test = range_test((loss for loss, _ in tr.train(trials, rates)), rates, untrained)
        tested = suggest(test)
        say(f"range test: {test.end} at {test.rates[-1]:.1e} (update {len(test.rates)}); {tested.reason}")
    scored_by = "train_loss" if trials.session.data.eval is None else "eval_loss"

    def run(rate: float, length: int) -> tuple[float, dict[str, float]]:
        return short_run(trials, rate, length, untrained)

    def say_score(score: Score) -> None:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in score.figures.items())
        say(f"{score.steps} updates at {score.learning_rate:.1e}: {figures}")

    if tested is not None and not options.narrow:
        ends = tested.rate / APART, tested.rate * APART
    else:
        ends = options.bracket or (tested.rate / 10, tested.high)
    length, rounds = options.short_runs
    rate, runs = bracket(run, *ends, length, rounds, say_score)
    return FinderResult(_suggestion(rate, runs, tested, scored_by), test, runs, scored_by)


def _rounds_of(options: FinderOptions) -> list[tuple[int, int]]:
    """Return (runs, updates of each) of every round of short runs."""
    length, rounds = options.short_runs
    return [(runs, length >> later) for runs, later in zip(rounds, reversed(range(len(rounds))), strict=True)]


def _outline(options: FinderOptions) -> str:
    """Return what will be done, in words."""
    rounds = " and ".join(f"{runs} runs of {updates} updates" for runs, updates in _rounds_of(options))
    test = "" if options.bracket else f"a range test of {options.steps} updates, then "
    more = f"up to {MAX_EXTENSIONS} more where the best rate is at an edge"
    return f"{test}{rounds} ({more}), each run from the same start on the same data"


def _estimate(trials: tr.Trials, options: FinderOptions, say: Say) -> Callable[[int], None]:
    """Return a function to call after each untrained batch; early on it says how long the whole will take."""
    rounds, times, config = _rounds_of(options), [time.monotonic()], trials.session.config
    updates = (0 if options.bracket else options.steps) + sum(runs * each for runs, each in rounds)
    further = MAX_EXTENSIONS * rounds[0][1]  # updates of the runs beyond the first round's edges
    held_out = trials.session.data.eval
    rows = 0 if held_out is None else min(tr.EVAL_BATCHES * trials.session.eval_batch_rows, len(held_out))
    # Forward and backward pass cost three forward ones, less where frozen weights need no gradient, more with remat.
    passes = 3 + (config.model.remat != "none") - (config.method == "lora")
    evaluation = rows / trials.session.length.batch
    evaluations = evaluation * sum(runs for runs, _ in rounds)

    def done(count: int) -> None:
        times.append(time.monotonic())
        if count != min(_TIMED, options.steps):
            return
        each = (times[-1] - times[1]) / (count - 1)  # the first one compiles
        seconds = each * (options.steps - count + passes * updates + evaluations)
        most = seconds + each * (passes * further + MAX_EXTENSIONS * evaluation)
        say(
            f"this takes about {duration(seconds)}, at most {duration(most)} with {MAX_EXTENSIONS} more runs "
            f"(estimated from {count} forward passes; compiling comes on top)"
        )

    return done


def short_run(trials: tr.Trials, rate: float, steps: int, untrained: list[float]) -> tuple[float, dict[str, float]]:
    """Train for some steps under the whole schedule, scaled to these steps, with its peak at `rate`.

    Returns:
      The score, infinite if the run diverged, and the figures: `train_loss` of the run's second half, scaled to an
      average batch, and `eval_loss` at its end if the run evaluates. The evaluation loss is the score if there is one.
    """
    losses, diverged, state = [], "", None
    for loss, state in tr.train(trials, tr.scheduled(trials, rate, steps)):  # noqa: B007
        losses.append(loss)
        diverged = divergence(losses, untrained, BETA)
        if diverged:
            break
    late = len(losses) // 2
    share = sum(losses[late:]) / sum(untrained[late : len(losses)])
    figures = {"train_loss": share * float(np.mean(untrained))}
    if trials.session.data.eval is not None and not diverged:
        figures["eval_loss"] = tr.held_out_loss(trials, state)
    score = figures.get("eval_loss", math.inf if trials.session.data.eval is not None else figures["train_loss"])
    return math.inf if diverged or not math.isfinite(score) else score, figures


def _suggestion(rate: float, runs: list[Score], tested: Suggestion | None, scored_by: str) -> Suggestion:
    """Return what the short runs suggest; rates whose runs ended clearly worse than the best are not good ones."""
    last = sorted((run for run in runs if run.round == runs[-1].round), key=lambda run: run.learning_rate)
    best = best_of(last)
    ends = ", ".join(
        f"{run.learning_rate:.1e}: " + (f"{run.score:.4g}" if math.isfinite(run.score) else "diverged") for run in last
    )
    is_lowest = best.score == min(run.score for run in last)
    loss = scored_by.replace("_", " ")
    end = f"with the lowest {loss}" if is_lowest else f"within {TIE:.0%} of the lowest {loss}, at the lowest such rate"
    reason = (
        f"of {len(last)} runs of {best.steps} updates from the same start, the one at {rate:.1e} ends {end} ({ends})"
    )
    if tested is None:
        low, high = min(run.learning_rate for run in runs), max(run.learning_rate for run in runs)
    else:
        low, high = min(tested.low, rate / 2), max(tested.high, rate * 2)
        reason = f"{tested.reason}. Around it, {reason}"
    for number in {run.round for run in runs}:
        in_round = [run for run in runs if run.round == number]
        lowest = min(run.score for run in in_round)
        worse = [run.learning_rate for run in in_round if not run.score <= WORSE * lowest]
        low = max([low, *[bad for bad in worse if bad < rate]])
        high = min([high, *[bad for bad in worse if bad > rate]])
    return Suggestion(rate, low, high, reason)


def figures(result: FinderResult, config: ConfigDict) -> dict[str, Any]:
    """Return a result as plain values, for JSON; what is not finite is None."""
    rate, (low, high) = config.train.learning_rate, (result.suggestion.low, result.suggestion.high)
    verdict = "too low" if rate < low else "too high" if rate > high else "good"
    plain = {
        "learning_rate": float(f"{result.suggestion.rate:.1e}"),
        "good": [low, high],
        "reason": result.suggestion.reason,
        "configured": f"the config's {rate:.1e} looks {verdict}",
        "scored_by": result.scored_by,
        "runs": [
            {
                "round": run.round,
                "learning_rate": run.learning_rate,
                "steps": run.steps,
                "score": _finite(run.score),
                **{name: _finite(value) for name, value in run.figures.items()},
            }
            for run in result.runs
        ],
    }
    if result.test is not None:
        arrays = {name: getattr(result.test, name) for name in ("rates", "losses", "untrained", "smoothed")}
        plain["range_test"] = {name: [_finite(float(value)) for value in array] for name, array in arrays.items()}
        plain["range_test"]["end"] = result.test.end
    return plain


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

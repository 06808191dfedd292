"""Whether a run's own losses say that its learning rate is too high or too low: what `tpu-tune train` hints at.

Losses are noisy, for batches differ (on the quickstart's chats by 40% of the loss), so everything is measured against
that noise, and where it hides the answer there is no hint. Losses are taken in logarithms: a share of the loss.

Too fast (any of):
- two or more of the last ten losses are not finite;
- the loss is well above where it began: the median of the last third above the first points' by a quarter, and by more
  than three times what noise does;
- it has climbed out of its lowest level, of a running median, by a tenth and more than five times what noise does;
- it swings: the median step from one loss to the next, in nats, is three times what it was in the first third and a
  fifth of the loss, a rank test (Mann and Whitney 1947) finds the steps larger too (z above 3), and nothing has been
  learned: the evaluation loss is not below the first one, or without evaluations the mean of the last third not a tenth
  below that of the first. Rows of a few texts differ that much by themselves.

Too slow: the loss barely moves. Where evaluations tell (they see the same rows each time): the evaluation loss has
changed by less than half a percent while a third of the learning (the sum of the rates) or more was done, and the
training losses show no fall beyond their noise. Without them: a line through the training losses over the learning
done falls by less than three percent even at its steep end of two standard errors.

Both wait until there are enough points and the rate no longer climbs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_FEWEST = 10  # finite losses
_BEGINNING = 0.05  # of the learning: the loss is still that of the start


@dataclasses.dataclass(frozen=True)
class Hint:
    """What the losses say of the learning rate.

    Attributes:
      verdict: "too fast" or "too slow".
      evidence: what was seen, in numbers.
      advice: what to try.
    """

    verdict: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"hint: the learning rate looks {self.verdict}: {self.evidence}. {self.advice}"


def hint_of(metrics: Sequence[Mapping[str, Any]]) -> Hint | None:
    """`rate_hint` of the rows of metrics.jsonl, in which a loss that is not finite is null."""
    train = [row for row in metrics if "loss" in row and "learning_rate" in row]
    held = [row for row in metrics if isinstance(row.get("eval_loss"), (int, float))]
    return rate_hint(
        [row["step"] for row in train],
        [math.nan if row["loss"] is None else row["loss"] for row in train],
        [row["learning_rate"] or 0.0 for row in train],
        [row["step"] for row in held],
        [row["eval_loss"] for row in held],
    )


def teller(say: Callable[[str], None]) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """Return a function of a run's metrics rows that says a hint when there is a new one."""
    said = ""

    def tell(metrics: Sequence[Mapping[str, Any]]) -> None:
        nonlocal said
        hint = hint_of(metrics)
        if hint is not None and hint.verdict != said:
            say(str(hint))
        said = hint.verdict if hint is not None else said

    return tell


def rate_hint(
    steps: Sequence[int],
    losses: Sequence[float],
    learning_rates: Sequence[float],
    eval_steps: Sequence[int] = (),
    eval_losses: Sequence[float] = (),
) -> Hint | None:
    """Return a hint where the losses speak clearly, else None.

    Args:
      steps: of the training losses, rising.
      losses: training losses (nats a token), of single steps or means since the row before; may be not finite.
      learning_rates: at these steps.
      eval_steps: steps of the evaluations, rising; 0 is one before training.
      eval_losses: on the same rows every time.
    """
    steps, losses, rates = (np.asarray(values, float) for values in (steps, losses, learning_rates))
    lower = "Try a third of the rate, or let tpu-tune lr-find look for one"
    finite = np.isfinite(losses)
    lost = int(np.sum(~finite[-10:]))
    if lost >= 2:
        return Hint("too fast", f"{lost} of the last {len(finite[-10:])} losses are not finite", lower)
    steps, losses, rates = steps[finite], losses[finite], rates[finite]
    if len(losses) < _FEWEST or losses.min() <= 0 or rates.max() <= 0 or rates[-1] > rates[-2]:
        return None
    # The learning before each loss: the area under the rates, which are straight between rows.
    area = np.concatenate([[0.0], np.cumsum(np.diff(steps) * (rates[1:] + rates[:-1]) / 2)])
    learning = area / area[-1] if area[-1] > 0 else np.linspace(0, 1, len(steps))
    held = np.asarray(eval_losses, float)
    seen = _too_fast(losses, learning, held[np.isfinite(held)])
    if seen:
        return Hint("too fast", seen, lower)
    seen = _too_slow(steps, losses, learning, np.asarray(eval_steps, float), np.asarray(eval_losses, float))
    if seen:
        advice = "Try three to ten times the rate, or let tpu-tune lr-find look for one, unless the model knows this data already"
        return Hint("too slow", seen, advice)
    return None


def _noise(logs: np.ndarray) -> float:
    """Standard deviation of one log loss from the steps between neighbours (1.4826 MAD / sqrt 2), which no trend reaches."""
    return float(1.4826 * np.median(np.abs(np.diff(logs))) / math.sqrt(2))


def _too_fast(losses: np.ndarray, learning: np.ndarray, eval_losses: np.ndarray) -> str:
    logs, count = np.log(losses), len(losses)
    noise = _noise(logs)
    first = max(1, int(np.sum(learning <= _BEGINNING)))
    late = logs[-(count // 3) :]
    # A run that explodes does so at its second loss, so the very first may be all there is of the start.
    start = min(logs[0], float(np.median(logs[:first])))
    rise = float(np.median(late)) - start
    if rise > max(math.log(1.25), 3 * noise):
        return f"the loss went from {math.exp(start):.3g} at the start to {math.exp(np.median(late)):.3g} now"
    width = max(5, count // 6)
    levels = np.array([np.median(logs[i : i + width]) for i in range(count - width + 1)])
    climb, error = (
        levels[-1] - levels.min(),
        1.25 * noise * math.sqrt(2 / width),
    )  # the median's standard error is 1.25 sd / sqrt n
    if climb > math.log(1.1) + 5 * error:
        return (
            f"the loss has climbed from {math.exp(levels.min()):.3g}, its lowest level, to {math.exp(levels[-1]):.3g}"
        )
    moves, third = np.abs(np.diff(losses)), count // 3
    early, now = moves[:third], moves[-third:]
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
    """How many standard deviations more often than by chance a value is above one of the others (Mann-Whitney's U)."""
    above = np.sum(values[:, None] > others) + 0.5 * np.sum(values[:, None] == others)
    n, m = len(values), len(others)
    return float((above - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12))


def _too_slow(
    steps: np.ndarray, losses: np.ndarray, learning: np.ndarray, eval_steps: np.ndarray, eval_losses: np.ndarray
) -> str:
    logs, count = np.log(losses), len(losses)
    noise = _noise(logs)
    # Fall of a line through the losses, over the learning from 0 to 1, and its standard error.
    centred = learning - learning.mean()
    spread = float(np.sum(centred**2))
    fall, error = -float(np.sum(centred * logs)) / spread, noise / math.sqrt(spread)
    # A fast fall at the beginning, then a flat run, is seen here instead.
    first = max(3, int(np.sum(learning <= _BEGINNING)))
    drop = float(np.mean(logs[:first]) - np.mean(logs[first:]))
    drop_error = noise * math.sqrt(1 / first + 1 / (count - first))
    flat = abs(fall) < 2 * error + 0.01 and abs(drop) < 2 * drop_error + 0.01
    before = bool(len(eval_steps)) and eval_steps[0] == 0
    if len(eval_losses) >= 2 and eval_losses.min() > 0 and (flat or before):
        done = np.interp(eval_steps[[0, -1]], steps, learning)
        change = math.log(eval_losses[-1] / eval_losses[0])
        if done[1] - done[0] > 1 / 3 and abs(change) < 0.005:
            seen = (
                f"{eval_losses[0]:.4f} at step {eval_steps[0]:.0f}, {eval_losses[-1]:.4f} at step {eval_steps[-1]:.0f}"
            )
            return f"the evaluation loss barely moved: {seen}" + (
                "" if before else "; and the training loss shows no fall"
            )
        return ""
    if flat and abs(fall) + 2 * error < 0.03:
        return f"the training loss barely moved: a fall of {100 * fall:.1f}% (give or take {200 * error:.1f}%) over {count} losses"
    return ""

"""From metrics rows to the numbers of one curve: a quantity over steps, tokens or epochs, smoothed or as logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.errors import UserError

AXES = {"steps": "step", "tokens": "tokens", "epochs": "epoch"}  # --x -> the axis' label
FEW = 30  # a curve with fewer points is drawn as it is, with markers


@dataclass(frozen=True)
class Quantity:
    """One panel of a plot.

    Attributes:
      name: title of the panel.
      train, eval: keys in the metrics rows; "" if there is none.
      exponential: whether the panel shows exp of the row's value (perplexity from the loss).
      noisy: whether its training curve needs smoothing.
    """

    name: str
    train: str
    eval: str = ""
    exponential: bool = False
    noisy: bool = True


QUANTITIES = (
    Quantity("loss", "loss", "eval_loss"),
    Quantity("perplexity", "loss", "eval_loss", exponential=True),
    Quantity("token accuracy", "token_accuracy", "eval_token_accuracy"),
    Quantity("reward margin", "rewards/margins", "eval_rewards/margins"),
    Quantity("reward accuracy", "rewards/accuracies", "eval_rewards/accuracies"),
    Quantity("reward of chosen answers", "rewards/chosen", "eval_rewards/chosen"),
    Quantity("reward of rejected answers", "rewards/rejected", "eval_rewards/rejected"),
    Quantity("log-probability of chosen answers", "logps/chosen", "eval_logps/chosen"),
    Quantity("log-probability of rejected answers", "logps/rejected", "eval_logps/rejected"),
    Quantity("learning rate", "learning_rate", noisy=False),
    Quantity("gradient norm", "grad_norm"),
    Quantity("tokens a second", "tokens_per_second"),
)


def series(metrics: Sequence[Mapping[str, Any]], key: str, x: str = "steps") -> tuple[np.ndarray, np.ndarray]:
    """Return x and values of the rows that have a finite `key`, in order of the steps (two float64 arrays).

    A step that occurs twice, because a run was restarted, has its last value.

    Args:
      metrics: rows of metrics.jsonl, in any order.
      key: the values' key in the rows.
      x: steps, tokens (trained on up to that step, interpolated for rows without a count) or epochs.

    Raises:
      UserError: the rows have no tokens or epochs.
    """
    pairs = {
        row["step"]: row[key]
        for row in metrics
        if _is_number(row.get(key)) and _is_number(row.get("step")) and math.isfinite(row[key])
    }
    steps = np.array(sorted(pairs), float)
    values = np.array([pairs[step] for step in sorted(pairs)], float)
    return (steps if x == "steps" else _positions(metrics, steps, x)), values


def panel(
    metrics: Sequence[Mapping[str, Any]], quantity: Quantity, side: str, x: str = "steps"
) -> tuple[np.ndarray, np.ndarray]:
    """Return x and values of one side (`train` or `eval`) of a quantity; empty where the rows have none."""
    key = getattr(quantity, side)
    if quantity.exponential and has_rewards(metrics):
        key = ""  # a preference loss has no perplexity
    positions, values = series(metrics, key, x) if key else (np.zeros(0), np.zeros(0))
    return positions, np.exp(np.minimum(values, 700.0)) if quantity.exponential else values


def has_rewards(metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows of metrics.jsonl are those of a preference run."""
    return any("rewards/margins" in row for row in metrics)


def smoothing_window(count: int, beta: float = 0.9) -> int:
    """Return over how many of `count` points a curve is smoothed (odd), for a `--smooth` of beta.

    A mean of (1 + beta) / (1 - beta) points leaves as much noise as an exponential average with the weight beta of the
    past. It is at most a fifth of the curve, so that the curve keeps its shape.
    """
    points = min(round((1 + beta) / (1 - beta), 6), count / 5)
    return 2 * int((points - 1) / 2) + 1 if points >= 3 else 1


def smoothed_over(window: int) -> str:
    """Return the words for it, as legends have them."""
    return f"smoothed over {window} points" if window > 1 else "as logged"


def ema(values: Sequence[float], beta: float) -> np.ndarray:
    """Return the exponential moving average with Adam's bias correction (Kingma and Ba 2015, section 3).

    Equal to pandas' `ewm(alpha=1 - beta, adjust=True).mean()`; the first value is the first point itself.

    Args:
      values: (n,)
      beta: weight of the past, in [0, 1); 0 leaves the values as they are.
    """
    smoothed, mean, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        mean = beta * mean + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        smoothed[index] = mean / weight
    return smoothed


def _positions(metrics: Sequence[Mapping[str, Any]], steps: np.ndarray, x: str) -> np.ndarray:
    key = {"tokens": "num_tokens", "epochs": "epoch"}[x]
    known = {row["step"]: row[key] for row in metrics if _is_number(row.get(key)) and _is_number(row.get("step"))}
    if not known and len(steps):
        raise UserError(f"the metrics have no '{key}', so nothing can be drawn over {x}; use --x steps")
    known.setdefault(0, 0.0)
    known_steps = sorted(known)
    return np.interp(steps, known_steps, [known[step] for step in known_steps])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

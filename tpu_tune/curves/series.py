"""From metrics rows to the numbers of one curve: which quantity, over steps, tokens or epochs, smoothed or as logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.errors import UserError

AXES = {"steps": "step", "tokens": "tokens", "epochs": "epoch"}  # --x -> what stands under the axis
FEW = 30  # points; fewer are shown as they are, with markers


@dataclass(frozen=True)
class Quantity:
    """One panel of a plot.

    Attributes:
      name: as a reader calls it.
      train, eval: keys of metrics rows, "" where there is none.
      exponential: the panel shows exp of the row's value (perplexity, of training rows).
      noisy: whether its training curve is worth smoothing.
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
    Quantity("learning rate", "learning_rate", noisy=False),
    Quantity("gradient norm", "grad_norm"),
    Quantity("tokens a second", "tokens_per_second"),
)


def series(metrics: Sequence[Mapping[str, Any]], key: str, x: str = "steps") -> tuple[np.ndarray, np.ndarray]:
    """Return x and values of the rows that have a finite `key`, in order of the steps (two float64 arrays).

    A step that is there twice, because a run was restarted, has its last value.

    Args:
      metrics: rows of metrics.jsonl, in any order.
      key: of the values.
      x: steps, tokens (read by training up to that step; rows without a count lie between those with one) or epochs.

    Raises:
      UserError: the rows say nothing of tokens or epochs.
    """
    pairs = {
        row["step"]: row[key]
        for row in metrics
        if _number(row.get(key)) and _number(row.get("step")) and math.isfinite(row[key])
    }
    steps = np.array(sorted(pairs), float)
    values = np.array([pairs[step] for step in sorted(pairs)], float)
    return (steps if x == "steps" else _positions(metrics, steps, x)), values


def panel(
    metrics: Sequence[Mapping[str, Any]], quantity: Quantity, side: str, x: str = "steps"
) -> tuple[np.ndarray, np.ndarray]:
    """Return x and values of one side (`train` or `eval`) of a quantity; empty where the rows have none."""
    key = getattr(quantity, side)
    at, values = series(metrics, key, x) if key else (np.zeros(0), np.zeros(0))
    return at, np.exp(np.minimum(values, 700.0)) if quantity.exponential else values


def ema(values: np.ndarray, beta: float) -> np.ndarray:
    """Exponential moving average with bias correction: the weights beta^age sum to one from the first point on.

    Equal to pandas' `ewm(alpha=1 - beta, adjust=True).mean()`; the first value is the first point itself.

    Args:
      values: (n,) finite.
      beta: in [0, 1); 0 leaves the values as they are.
    """
    smoothed, mean, weight = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        mean = beta * mean + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        smoothed[place] = mean / weight
    return smoothed


def _positions(metrics: Sequence[Mapping[str, Any]], steps: np.ndarray, x: str) -> np.ndarray:
    key = {"tokens": "num_tokens", "epochs": "epoch"}[x]
    known = {row["step"]: row[key] for row in metrics if _number(row.get(key)) and _number(row.get("step"))}
    if not known and len(steps):
        raise UserError(f"the metrics have no '{key}', so nothing can be drawn over {x}; use --x steps")
    known.setdefault(0, 0.0)
    at = np.array(sorted(known), float)
    return np.interp(steps, at, np.array([known[step] for step in sorted(known)], float))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Evaluation: the objective's mean loss and metrics over the held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune.training.late import read_late
from tpu_tune.training.objectives import mean
from tpu_tune.training.opening import Session
from tpu_tune.training.prepare_steps import Evaluation, Steps


def evaluate(steps: Steps | Evaluation, trainable: Mapping[str, Any], session: Session) -> dict[str, float]:
    """Return the metrics of one pass over a session's held-out rows.

    Returns:
      `eval_loss` (over all that the objective counts), `eval_perplexity` = exp(eval_loss) where the loss is a
      likelihood, the objective's own metrics (of cross-entropy `eval_token_accuracy`, the share of first guesses that
      are right), `eval_NAME_loss` of each source of several, `eval_num_tokens` (targets; of another objective, what it
      counts), `eval_runtime` (seconds).
    """
    start, objective = time.monotonic(), steps.objective
    frozen = session.model.frozen
    parts = {
        name: sum_batches(steps, trainable, frozen, session.eval_batches(name)) for name in session.data.eval_parts
    }
    sums = _total(list(parts.values())) if parts else sum_batches(steps, trainable, frozen, session.eval_batches())
    count = float(np.ravel(sums["loss"][1])[0])
    means = {f"eval_{name}": float(mean(*pair)) for name, pair in sums.items()}
    loss = means.pop("eval_loss")
    perplexity = {"eval_perplexity": math.exp(loss) if loss < 700 else math.inf} if objective.is_likelihood else {}
    return {
        "eval_loss": loss,
        **perplexity,
        **means,
        **{f"eval_{name}_loss": float(mean(*one["loss"])) for name, one in parts.items()},
        f"eval_num_{objective.unit}": int(count) if count.is_integer() else count,
        "eval_runtime": round(time.monotonic() - start, 3),
    }


def _total(parts: Sequence[Mapping[str, tuple[Any, Any]]]) -> dict[str, tuple[Any, Any]]:
    """Add up the sums and weights of several sources."""
    names = dict.fromkeys(name for one in parts for name in one)
    held = {name: [one[name] for one in parts if name in one] for name in names}
    return {name: (sum(total for total, _ in each), sum(weight for _, weight in each)) for name, each in held.items()}


def sum_batches(
    steps: Steps | Evaluation,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, tuple[Any, Any]]:
    """Return the (sum, weight) of `loss` and of each metric over batches of (rows, tokens), in float64."""
    totals: dict[str, tuple[Any, Any]] = {"loss": (0.0, 0.0)}
    for sums in read_late(steps.evaluate(trainable, frozen, steps.put_batch(batch, 0)) for batch in batches):
        for name, pair in sums.items():
            total, weight = (np.asarray(each, np.float64) for each in pair)
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total, before[1] + weight)
    return totals


_WORDS = {
    "eval_loss": "eval_loss {:.4f}",
    "eval_perplexity": "perplexity {:.2f}",
    "eval_token_accuracy": "accuracy {:.1%}",
    "eval_accuracy": "accuracy {:.1%}",
    "eval_f1": "F1 {:.4f}",
}


def describe(metrics: Mapping[str, float]) -> str:
    """Return an evaluation's loss and metrics in words."""
    shown = {name: value for name, value in metrics.items() if not name.startswith(("eval_num_", "eval_runtime"))}
    return ", ".join(
        _WORDS.get(name, name.removeprefix("eval_") + " {:.4g}").format(value) for name, value in shown.items()
    )

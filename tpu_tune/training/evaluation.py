"""Evaluation: token-weighted loss, perplexity and accuracy over the held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tpu_tune.training.opening import Session
from tpu_tune.training.prepare_steps import Evaluation, Steps


def evaluate(steps: Steps | Evaluation, trainable: Mapping[str, Any], session: Session) -> dict[str, float]:
    """Return the metrics of one pass over a session's held-out rows.

    Returns:
      `eval_loss` (nats, mean over all target tokens), `eval_perplexity` = exp(eval_loss), `eval_token_accuracy`
      (share of first guesses that are right), `eval_num_tokens` (targets), `eval_runtime` (seconds).
    """
    start = time.monotonic()
    sums = sum_batches(steps, trainable, session.model.frozen, session.eval_batches())
    count = int(sums["num_targets"])
    mean = sums["loss"] / max(count, 1)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(mean) if mean < 700 else math.inf,
        "eval_token_accuracy": sums["right"] / max(count, 1),
        "eval_num_tokens": count,
        "eval_runtime": round(time.monotonic() - start, 3),
    }


def sum_batches(
    steps: Steps | Evaluation,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, float]:
    """Return the sums of `step.make_eval_step` over batches of (rows, tokens)."""
    totals = {"loss": 0.0, "right": 0.0, "num_targets": 0.0}
    for batch in batches:
        sums = steps.evaluate(trainable, frozen, steps.put_batch(batch, 0))
        totals = {name: total + float(sums[name]) for name, total in totals.items()}
    return totals


def describe(metrics: Mapping[str, float]) -> str:
    """Return an evaluation's metrics in words."""
    return (
        f"eval_loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f}, "
        f"accuracy {metrics['eval_token_accuracy']:.1%}"
    )

"""Evaluation in the loop: token-weighted loss, perplexity and accuracy over the held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpu_tune.data import PackedRows, PairRows, eval_batches
from tpu_tune.training.setup import Evaluation, Steps


def evaluate(
    steps: Steps | Evaluation,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    rows: PackedRows | PairRows,
    batch_rows: int,
    mine: np.ndarray | None = None,
) -> dict[str, float]:
    """Return the metrics of one pass over `rows`; `mine` says which rows of a batch this process reads.

    Returns:
      `eval_loss` (nats, mean over all target tokens), `eval_perplexity` = exp(eval_loss), `eval_token_accuracy`
      (share of first guesses that are right), `eval_num_tokens` (targets), `eval_runtime` (seconds).
    """
    start = time.monotonic()
    loss, right, count = 0.0, 0, 0
    for batch in eval_batches(rows, batch_rows, mine):
        sums = steps.evaluate(trainable, frozen, steps.put_batch(batch, 0))
        loss += float(sums["loss"])
        right += int(sums["right"])
        count += int(sums["num_targets"])
    mean = loss / max(count, 1)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(mean) if mean < 700 else math.inf,
        "eval_token_accuracy": right / max(count, 1),
        "eval_num_tokens": count,
        "eval_runtime": round(time.monotonic() - start, 3),
    }

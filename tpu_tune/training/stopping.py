"""Which evaluation is the best so far, and when the lack of a better one ends a run: Hugging Face's rules.

From transformers' `EarlyStoppingCallback` and `Trainer._determine_best_metric`: any smaller eval_loss is the new best;
patience starts anew only where it is smaller by more than the threshold. (Hugging Face asks for
load_best_model_at_end with it; here either goes without the other.)
"""

from __future__ import annotations

import math


def judge(eval_loss: float, best_loss: float, threshold: float) -> tuple[bool, bool]:
    """Compare an evaluation with the best one before it.

    Args:
      eval_loss: this evaluation's loss; NaN is never an improvement.
      best_loss: the smallest loss before; infinite where there was none.
      threshold: `train.early_stopping_threshold`.

    Returns:
      (is it the new best, does patience start anew).
    """
    better = eval_loss < best_loss
    return better, better and (math.isinf(best_loss) or best_loss - eval_loss > threshold)

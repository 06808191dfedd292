"""What ends a run whose losses or gradients are not finite."""

from __future__ import annotations

from collections.abc import Mapping

from tpu_tune.errors import UserError
from tpu_tune.training.meter import LoopState


def check_finite(metrics: Mapping[str, float], step: int, most: int) -> None:
    """Hold against a run whose last `most` steps, up to `step`, made no update.

    Raises:
      UserError: it has as many.
    """
    if metrics["failures"] >= most:
        raise UserError(
            f"the loss or the gradient was not finite in {int(metrics['failures'])} steps in a row, up to step {step}; "
            f"no update was made from them (last loss {metrics['loss']:.4g}). Lower train.learning_rate, or set "
            "model.dtype=float32 to see whether it is the precision"
        )


def check_ended_finite(loop_state: LoopState, taken: int, total: int) -> None:
    """Hold against a run that would end as done although nothing came of it; a start after that says so again.

    Raises:
      UserError: its last loss is not finite, or no step was.
    """
    if not loop_state.loss_is_finite:
        what = "its last loss is not finite"
    elif taken and loop_state.skipped >= taken:
        what = "no update was made, because the loss or the gradient was not finite in any of them"
    else:
        return
    raise UserError(
        f"the run has made {taken} of {total} steps, and {what}; it has no result. In another output_dir, lower "
        "train.learning_rate, or set model.dtype=float32 to see whether it is the precision"
    )

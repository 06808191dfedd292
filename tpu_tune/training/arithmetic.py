"""The arithmetic of a run: rows, batch, steps, epochs, and the kind of gradient descent that they make.

`train` prints it before it starts, `plan` of a run that is only planned. The guide's example is 200 rows in batches of
five: 40 steps an epoch, 40,000 steps in 1,000 epochs.
"""

from __future__ import annotations

import dataclasses
import math

from tpu_tune.data.loading import steps_per_epoch
from tpu_tune.errors import UserError, counted

MAX_STEPS = 2**31 - 1
AT_THE_END = 10**9  # train.eval_steps of a run that is to be evaluated at its end only


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How long a run is.

    Attributes:
      rows: training rows; of packed data, packed ones.
      per_device: rows of a device in a micro-batch.
      devices: devices that take rows of their own.
      accumulation: micro-batches of a step.
      steps_per_epoch: steps that see every row once; the last one may have fewer rows.
      total_steps: steps of the whole run.
      epochs: passes over the rows in so many steps.
    """

    rows: int
    per_device: int
    devices: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    epochs: float

    @property
    def batch(self) -> int:
        """Rows that a step has room for."""
        return self.per_device * self.devices * self.accumulation

    @property
    def kind(self) -> str:
        """stochastic (one row a step), batch (all of them) or mini-batch."""
        return "stochastic" if self.batch == 1 else ("batch" if self.batch >= self.rows else "mini-batch")


def run_length(
    rows: int, per_device: int, devices: int = 1, accumulation: int = 1, epochs: float = 1.0, max_steps: int = -1
) -> RunLength:
    """Count a run's steps as Hugging Face's Trainer does: ceil(epochs * steps an epoch), or `max_steps` if positive.

    Raises:
      UserError: nothing to train on, a batch of no rows, no steps, or more than the int32 that counts them holds.
    """
    for name, value in (
        ("training rows", rows),
        ("per_device_train_batch_size", per_device),
        ("devices", devices),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; there must be at least one")
    if max_steps <= 0 and not epochs > 0:
        raise UserError(f"num_train_epochs is {epochs:g}; it must be positive")
    each = steps_per_epoch(rows, per_device * devices, accumulation)
    total = max_steps if max_steps > 0 else math.ceil(epochs * each)
    if total > MAX_STEPS:
        raise UserError(
            f"{epochs:g} epochs of {each:,} steps are more than {MAX_STEPS:,} steps; lower num_train_epochs"
        )
    return RunLength(
        rows, per_device, devices, accumulation, each, total, total / each if max_steps > 0 else float(epochs)
    )


def interval(steps: float, total_steps: int) -> int:
    """Return a number of steps that may be given as a share of the run, below 1; rounded up, as the Trainer does."""
    return math.ceil(total_steps * steps) if steps < 1 else int(steps)


def words(length: RunLength, packed: bool = False) -> str:
    """Return the arithmetic in one line; `packed`: several examples are packed into a row."""
    each = counted(length.per_device, "row")
    devices = counted(length.devices, "device")
    few = (
        f", and there {'is' if length.rows == 1 else 'are'} only {_rows(length.rows)}"
        if length.batch > length.rows
        else ""
    )
    return (
        f"{_rows(length.rows, 'packed ' if packed else '')}, batch {length.batch:,} ({each} x {devices} x "
        f"{length.accumulation:,} accumulation{few}): {counted(length.steps_per_epoch, 'step')} an epoch, "
        f"{counted(length.total_steps, 'step')} in {_epochs(length.epochs)}; {length.kind} gradient descent"
    )


def _rows(count: int, kind: str = "") -> str:
    return counted(count, f"{kind}row")


def trainable_words(trained: int, total: int) -> str:
    """Return PEFT's line on how many parameters are trained."""
    return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"


def _epochs(epochs: float) -> str:
    number = f"{epochs:,.0f}" if float(epochs).is_integer() else f"{epochs:,.2f}"
    return f"{number} epoch" + ("" if epochs == 1 else "s")

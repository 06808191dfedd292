"""What the loop counts between steps, and the rows of `metrics.jsonl` that it makes of it.

`LoopState` is saved with every checkpoint, so that a resumed run logs exactly what the uninterrupted one would have.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tpu_tune.training import stopping
from tpu_tune.training.plateau import PlateauCounts
from tpu_tune.training.step import STEP_METRICS


@dataclasses.dataclass
class LoopState:
    """What the loop remembers besides the `TrainState`.

    Attributes:
      num_tokens: tokens trained on so far, padding not counted.
      window: the losses since the last logged row.
      best_loss: the smallest eval_loss so far; infinite before the first evaluation.
      best_step: the step of that evaluation; 0 for none.
      evals_without_gain: evaluations since the last one that gained enough for the patience to start anew.
      skipped: steps without an update, because something was not finite.
      rows: rows of a step, over all devices and micro-batches.
      loss_is_finite: whether the last loss was, of a step or of an evaluation after it.
      plateau: the counts of reduce_lr_on_plateau.
    """

    num_tokens: int = 0
    window: list[float] = dataclasses.field(default_factory=list)
    best_loss: float = math.inf
    best_step: int = 0
    evals_without_gain: int = 0
    skipped: int = 0
    rows: int = 0
    loss_is_finite: bool = True
    plateau: PlateauCounts = dataclasses.field(default_factory=PlateauCounts)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> LoopState:
        """Return the state that a checkpoint holds; keys that it lacks, or that are not ours, are passed over."""
        names = [field.name for field in dataclasses.fields(cls)]
        kept = {name: saved[name] for name in names if name in saved}
        return cls(**kept | {"plateau": PlateauCounts(**saved.get("plateau", {}))})

    def judge(self, step: int, eval_loss: float, threshold: float) -> None:
        """Count an evaluation: is it the best so far, and does patience start anew?"""
        is_best, is_gain = stopping.judge(eval_loss, self.best_loss, threshold)
        if is_best:
            self.best_loss, self.best_step = eval_loss, step
        self.evals_without_gain = 0 if is_gain else self.evals_without_gain + 1
        self.loss_is_finite = math.isfinite(eval_loss)

    def out_of_patience(self, patience: int) -> bool:
        """Whether `train.early_stopping_patience` evaluations have gained nothing; never where it is 0."""
        return 0 < patience <= self.evals_without_gain


class Meter:
    """Adds up the metrics of steps, and turns them into rows.

    Args:
      loop_state: the counts, which this changes.
      first: steps made before this start.
      steps_per_epoch: steps that see every row once.
      clock: seconds; for tests.
    """

    def __init__(
        self,
        loop_state: LoopState,
        first: int,
        steps_per_epoch: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.loop_state = loop_state
        self._first, self._steps_per_epoch, self._clock = first, steps_per_epoch, clock
        self._last: dict[str, float] = {}
        self._since = (clock(), loop_state.num_tokens)

    def add(self, step: int, device_metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """Count a step; return its metrics as numbers."""
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        state, self._last = self.loop_state, metrics
        state.num_tokens += int(metrics["num_tokens"])
        state.skipped += metrics["finite"] == 0
        state.window.append(metrics["loss"])
        state.loss_is_finite = math.isfinite(metrics["loss"])
        if step == self._first + 1:
            self.restart_clock()  # the first step of a start compiles
        return metrics

    def restart_clock(self) -> None:
        """Measure tokens a second from here on."""
        self._since = (self._clock(), self.loop_state.num_tokens)

    def row(self, step: int) -> dict[str, Any]:
        """Return the row of a step: the loss is the mean since the last row, the rest the step's own."""
        state, metrics = self.loop_state, self._last
        then, tokens_then = self._since
        rate = (state.num_tokens - tokens_then) / max(self._clock() - then, 1e-9)
        row = {
            "step": step,
            "epoch": self.epoch(step),
            "loss": sum(state.window) / len(state.window),
            "learning_rate": metrics["learning_rate"],
            "grad_norm": metrics["grad_norm"],
            **{name: value for name, value in metrics.items() if name not in STEP_METRICS},
            "num_tokens": state.num_tokens,
            "tokens_per_second": rate if step > self._first + 1 else None,
        }
        if state.skipped:
            row["skipped_steps"] = state.skipped
        state.window = []
        self.restart_clock()
        return row

    def epoch(self, step: int) -> float:
        """Return the epochs done after a step."""
        return step / self._steps_per_epoch

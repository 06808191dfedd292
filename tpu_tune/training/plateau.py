"""`reduce_lr_on_plateau`: the learning rate is lowered when the evaluation loss no longer falls.

This is torch's `ReduceLROnPlateau`, which transformers' Trainer steps with the metric of every evaluation. The rate is
no function of the step, so it is a value in the optimizer's state (`optimizers.set_learning_rate`), and the counts are
saved with the loop's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError

NAME = "reduce_lr_on_plateau"


@dataclasses.dataclass
class PlateauCounts:
    """What is remembered between evaluations.

    Attributes:
      best: the smallest evaluation loss that counted as an improvement.
      without_gain: evaluations since then.
      cooldown: evaluations that still do not count, after a reduction.
    """

    best: float = math.inf
    without_gain: int = 0
    cooldown: int = 0


@dataclasses.dataclass(frozen=True)
class Plateau:
    """The settings, which `train.lr_scheduler_kwargs` gives by torch's names and with torch's defaults.

    Attributes:
      mode: min; the metric is the evaluation loss, which is better the smaller it is.
      factor: what the rate is multiplied by.
      patience: evaluations without improvement that are waited for; one more lowers the rate.
      threshold: smaller improvements do not count.
      threshold_mode: rel, a share of the best loss, or abs.
      cooldown: evaluations after a reduction that do not count.
      min_lr: the rate does not go below it.
      eps: smaller reductions are not made.
    """

    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Plateau:
        """Return the settings, checked.

        Raises:
          UserError: an unknown setting, or a value that torch refuses too.
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in settings.items():
            if name not in fields:
                known = ", ".join(sorted(fields))
                raise UserError(f"train.lr_scheduler_kwargs: '{name}' is not a setting of '{NAME}' (it has: {known})")
            choices = {"mode": ("min",), "threshold_mode": ("rel", "abs")}.get(name)
            if choices and value not in choices:
                raise UserError(f"train.lr_scheduler_kwargs: {name} is '{value}'; it must be {' or '.join(choices)}")
            if not choices and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
                raise UserError(f"train.lr_scheduler_kwargs: {name} is {value!r}; it must be a number, 0 or above")
        if settings.get("factor", 0) >= 1:
            raise UserError(f"train.lr_scheduler_kwargs: factor is {settings['factor']:g}; it must be below 1")
        return cls(**settings)

    def step(self, counts: PlateauCounts, eval_loss: float, rate: float) -> tuple[PlateauCounts, float]:
        """Return the counts after an evaluation, and the learning rate from here on."""
        best, waited, cooldown = counts.best, counts.without_gain + 1, counts.cooldown
        enough = best * (1 - self.threshold) if self.threshold_mode == "rel" else best - self.threshold
        if eval_loss < enough:
            best, waited = eval_loss, 0
        if cooldown > 0:
            waited, cooldown = 0, cooldown - 1
        if waited <= self.patience:
            return PlateauCounts(best, waited, cooldown), rate
        lower = max(rate * self.factor, self.min_lr)
        return PlateauCounts(best, 0, self.cooldown), lower if rate - lower > self.eps else rate

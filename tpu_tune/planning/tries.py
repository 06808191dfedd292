"""Plans of one configuration with single keys changed, as `suggest` and `ways` try them, and a count of compilations.

Compiling a large model takes minutes; so what is too large by its counted bytes already is not compiled, and the number
of compilations is limited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.errors import UserError
from tpu_tune.planning.choice import with_overrides
from tpu_tune.planning.devices import Device
from tpu_tune.planning.figures import plan
from tpu_tune.planning.plan_text import override_flags
from tpu_tune.training.execution import REMAT

Overrides = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass
class Tries:
    """Plans of one configuration on one device, with overrides; `budget` is the number of compilations left."""

    config: ConfigDict
    device: Device
    rows: int | None
    compile: bool
    budget: int
    say: Say

    def try_out(self, overrides: Overrides, compile: bool | None = None) -> dict[str, Any] | None:
        """Return a plan's figures; None if the overrides do not fit model or mesh, or no compilation is left."""
        compile = self.compile if compile is None else compile
        if compile and self.budget <= 0:
            return None
        try:
            # Evaluation with as many rows needs less memory than training, so it is not compiled.
            figures = plan(with_overrides(self.config, overrides), self.device, None, compile, evaluate=False)
        except UserError as error:
            self.say(f"  {override_flags(overrides)}: {error}")
            return None
        if compile:
            self.budget -= 1
            peak = figures["peak_bytes_per_device"]
            self.say(
                f"  {override_flags(overrides)}: {'fits' if figures['fits'] else 'does not fit'}"
                + (f", {peak / 1e9:.2f} GB" if peak else "")
            )
        return figures

    def with_run(self, overrides: Overrides, figures: dict[str, Any]) -> dict[str, Any]:
        """Return figures with the run's length for the known number of rows, which the tries leave out."""
        try:
            config = with_overrides(self.config, overrides)
            counted = plan(config, self.device, self.rows, compile=False, evaluate=False)
        except UserError as error:  # a step has more rows than the data
            return {**figures, "notes": [*figures["notes"], str(error)]}
        run, slower = counted["run"], figures["step"]["seconds_estimate"] / counted["step"]["seconds_estimate"]
        hours = run["hours_estimate"]
        return {**figures, "run": {**run, "hours_estimate": hours and hours * slower}}


def rows_per_device(config: ConfigDict, rows: int) -> Overrides:
    """Return overrides for `rows` rows per device, with accumulation so that a step has as many rows as before."""
    rows_per_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    return {
        "train.per_device_train_batch_size": rows,
        "train.gradient_accumulation_steps": max(1, rows_per_step // rows),
    }


def changes(config: ConfigDict, overrides: Overrides) -> Overrides:
    """Return the overrides that differ from the config, with no more rows for evaluation than for training."""
    rows = overrides["train.per_device_train_batch_size"]
    changed = {**overrides, "train.per_device_eval_batch_size": min(config.train.per_device_eval_batch_size, rows)}
    different = {key: value for key, value in changed.items() if configuration.config_get(config, key) != value}
    if config.model.remat == "auto" and changed.get("model.remat") == REMAT:
        del different["model.remat"]  # it is what auto takes where nothing faster fits
    return different


def persistent_bytes(figures: Mapping[str, Any]) -> int:
    """Return the bytes of everything that a device keeps between steps."""
    return sum(size for name, size in figures["breakdown"].items() if name not in ("scratch", "gradients"))

"""What keys ask of each other, and the schema of the whole configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.config.engine import Schema
from tpu_tune.config.sections import Config
from tpu_tune.errors import UserError


def evaluates(config: ConfigDict) -> bool:
    """Whether a run has evaluations, as far as its settings say."""
    data = config.data
    return config.train.eval_strategy != "no" and bool(data.eval or data.eval_ratio or data.eval_dataset_size)


def source_paths(value: str | Sequence[str | Mapping[str, Any]]) -> list[str]:
    """The paths that `data.train` or `data.eval` names; an entry without one is no path."""
    if isinstance(value, str):
        return [value] if value else []
    return [str(entry if isinstance(entry, str) else entry.get("path", "")) for entry in value]


def _hold(config: ConfigDict) -> None:
    train, tokens = config.train, config.model.add_special_tokens
    if train.max_steps <= 0 and train.num_train_epochs <= 0:
        raise UserError("config key 'train.num_train_epochs' must be positive (or set 'train.max_steps')")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if train[name] > 1 and train[name] != int(train[name]):
            raise UserError(
                f"config key 'train.{name}' is {train[name]:g}; it must be a whole number of updates, or a share of "
                "the run below 1"
            )
    going_by_them = {name: bool(train[name]) for name in ("load_best_model_at_end", "early_stopping_patience")}
    going_by_them["lr_scheduler_type"] = train.lr_scheduler_type == "reduce_lr_on_plateau"
    for name, asked in going_by_them.items():
        if asked and not evaluates(config):
            what = f"'train.{name}'" + (" reduce_lr_on_plateau" if name == "lr_scheduler_type" else "")
            raise UserError(
                f"config key {what} needs evaluations to go by; set 'train.eval_strategy' to steps or epoch, "
                "and give 'data.eval' or a 'data.eval_ratio' above 0"
            )
    if train.load_best_model_at_end and train.save_strategy == "no":
        raise UserError(
            "config key 'train.load_best_model_at_end' needs checkpoints; set 'train.save_strategy' to steps or epoch"
        )
    if train.loraplus_lr_ratio and config.method != "lora":
        raise UserError("config key 'train.loraplus_lr_ratio' needs adapters; set method=lora, or leave it at 0")
    if sum(size == -1 for size in config.mesh.values()) > 1:
        raise UserError("only one of mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence may be -1")
    for index, token in enumerate(tokens):
        if not token.strip():
            raise UserError(f"config key 'model.add_special_tokens' holds {token!r}; a token must not be empty")
        if token in tokens[:index]:
            raise UserError(f"config key 'model.add_special_tokens' names '{token}' twice")
    if config.model.train_added_tokens and not tokens:
        raise UserError(
            "config key 'model.train_added_tokens' is set and there are no tokens to train; name them in "
            "'model.add_special_tokens'"
        )
    if config.method == "full" and config.quantize.format != "none":
        raise UserError(
            "method 'full' trains every weight and a quantized weight cannot be trained; set quantize.format=none, or "
            "method=lora"
        )


SCHEMA = Schema("config", Config, _hold)
default, flatten, from_file = SCHEMA.default, SCHEMA.flatten, SCHEMA.from_file
from_dict, assign, check = SCHEMA.from_dict, SCHEMA.assign, SCHEMA.check

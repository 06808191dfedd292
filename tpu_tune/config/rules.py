"""What keys ask of each other, and the schema of the whole configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.config.engine import Schema, config_get
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


# Key of `head` -> the value that asks for nothing, and the head that it belongs to.
_OF_HEADS = {
    "num_labels": (0, "classification"), "labels": ([], "classification"), "problem_type": ("auto", "classification"),
    "center_rewards_coefficient": (0.0, "reward"),
}  # fmt: skip


CALIBRATED = ("int8", "int4", "nf4")  # values of quantize.format that quantize.calibration is for


def _hold_head(config: ConfigDict) -> None:
    head, labels = config.head, list(config.head.labels)
    for name, (neutral, owner) in _OF_HEADS.items():
        if head.name != owner and config_get(config, f"head.{name}") not in (neutral, ()):
            raise UserError(f"config key 'head.{name}' belongs to head.name={owner}, and head.name is {head.name}")
    if labels and head.num_labels not in (0, len(labels)):
        raise UserError(f"config key 'head.num_labels' is {head.num_labels}, and 'head.labels' names {len(labels)}")
    if len({*labels}) < len(labels) or not all(labels):
        raise UserError(f"config key 'head.labels' is {labels}; the names must differ, and none may be empty")
    if head.name != "lm" and config.objective.name != "sft":
        raise UserError(
            f"objective.name={config.objective.name} is for a language model; a {head.name} head has its own loss: "
            "leave objective.name out"
        )
    if head.name != "lm" and config.train.sample_prompts:
        raise UserError(f"config key 'train.sample_prompts' needs a model that writes; head.name is {head.name}")


def _hold_start(config: ConfigDict) -> None:
    how = config.lora.init_lora_weights
    if config.method != "lora" or how in ("true", "gaussian"):
        return
    said = f"config key 'lora.init_lora_weights' is {how}, which"
    if config.lora.use_dora:
        raise UserError(f"{said} cannot be written with DoRA's magnitudes; set lora.use_dora=False, or it to true")
    if how == "loftq" and config.quantize.format == "none":
        raise UserError(f"{said} starts from what quantization has lost; set quantize.format, or it to true")
    if how != "loftq" and config.quantize.calibration:
        raise UserError(
            f"{said} takes weights out of the model that quantize.calibration runs; use loftq, or set it to 0"
        )


def _hold(config: ConfigDict) -> None:
    _hold_head(config)
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
    if config.quantize.calibration and config.quantize.format not in CALIBRATED:
        raise UserError(
            f"config key 'quantize.calibration' needs quantize.format to be one of {', '.join(CALIBRATED)}, and it is "
            f"{config.quantize.format}"
        )
    _hold_start(config)
    if config.method == "full" and config.quantize.format != "none":
        raise UserError(
            "method 'full' trains every weight and a quantized weight cannot be trained; set quantize.format=none, or "
            "method=lora"
        )


SCHEMA = Schema("config", Config, _hold)
default, flatten, from_file = SCHEMA.default, SCHEMA.flatten, SCHEMA.from_file
from_dict, assign, check = SCHEMA.from_dict, SCHEMA.assign, SCHEMA.check

"""Warnings before a run starts: settings that are allowed, and of which little or nothing would come.

Too few updates, an evaluation or a warm-up that the run never gets to, a batch larger than the rows, added tokens that
nobody trains. Each is one line that names the key to change; `train` says them, and `plan` as far as it can know.
"""

from __future__ import annotations

from collections.abc import Container

from ml_collections import ConfigDict

from tpu_tune.errors import counted
from tpu_tune.models import Architecture
from tpu_tune.training.arithmetic import AT_THE_END, RunLength, interval
from tpu_tune.training.optimizers import is_schedule_free
from tpu_tune.training.schedules import warmup_length
from tpu_tune.transforms import Method, Targets

FEW_UPDATES = 20


def of_length(config: ConfigDict, length: RunLength, evaluates: bool, examples: int | None = None) -> list[str]:
    """Return the warnings about a run's length.

    Args:
      config: the whole configuration.
      length: the run's arithmetic.
      evaluates: whether there are held-out rows.
      examples: training examples, where several were packed into a row.
    """
    train, total = config.train, length.total_steps
    lines = _rows(config, length, examples)
    if total < FEW_UPDATES:
        lines.append(f"only {counted(total, 'update')}, from which little is learned; {_more(train)}")
    steps = {"logging": f"the only metrics are the {'first and the ' if train.logging_first_step else ''}last update's"}
    if evaluates and train.eval_strategy == "steps" and train.eval_steps < AT_THE_END:
        steps["eval"] = "the only evaluation is at the end"
    for name, so in steps.items():
        every = interval(train[f"{name}_steps"], total)
        if every > total:
            lines.append(
                f"train.{name}_steps={every} is beyond the run's {counted(total, 'update')}, so {so}; "
                f"train.{name}_steps=0.1 is every tenth of the run"
            )
    return lines + of_warmup(config, total)


def of_warmup(config: ConfigDict, total: int) -> list[str]:
    """Return the warning about a warm-up that is not used, or not over when the run is."""
    train, name = config.train, "warmup_steps" if config.train.warmup_steps else "warmup_ratio"
    warmup, setting = warmup_length(total, train.warmup_steps, train.warmup_ratio), f"train.{name}={train[name]:g}"
    if not warmup:
        return []
    if train.lr_scheduler_type in ("constant", "reduce_lr_on_plateau") and not is_schedule_free(train):
        other = "; constant_with_warmup has one" if train.lr_scheduler_type == "constant" else ""
        return [f"{setting} has no effect: train.lr_scheduler_type={train.lr_scheduler_type} has no warm-up{other}"]
    if warmup < total:
        return []
    return [
        f"{setting} is a warm-up as long as the run's {counted(total, 'update')}, so train.learning_rate is "
        "never reached; train.warmup_steps=0 with train.warmup_ratio=0.05 takes a twentieth of the run"
    ]


def of_tokens(config: ConfigDict, arch: Architecture, method: Method, known: Container[str] = ()) -> list[str]:
    """Return the warning about added tokens whose embeddings are not trained; `known` are tokens of the model's own."""
    tokens = [token for token in config.model.add_special_tokens if token not in known]
    if not tokens or not isinstance(method, Targets):
        return []
    trained = [*(each.module for each in (*method.adapted, *method.tokens)), *method.saved]
    if arch.names.embed in [module.path for module in trained]:
        return []
    return [
        f"the added tokens {', '.join(tokens)} are not trained: each has the mean of all embeddings, so the model "
        "cannot tell them apart; set model.train_added_tokens=True"
    ]


def _rows(config: ConfigDict, length: RunLength, examples: int | None) -> list[str]:
    if length.rows >= length.batch:
        return []
    keys = [
        f"train.{name} ({value})"
        for name, value in (
            ("per_device_train_batch_size", length.per_device),
            ("gradient_accumulation_steps", length.accumulation),
        )
        if value > 1
    ]
    rows = counted(length.rows, "row")
    packed = config.data.packing and examples is not None and examples > length.rows
    what = (
        f"packing makes {rows} of {counted(examples, 'example')}"
        if packed
        else f"there {'is' if length.rows == 1 else 'are'} {rows}"
    )
    advice = [f"lower {' or '.join(keys)}"] if keys else []
    advice += [f"lower data.max_length ({config.data.max_length}) or set data.packing=False"] if packed else []
    return [f"{what}, fewer than the {length.batch:,} of a batch; {', or '.join(advice) or 'use fewer devices'}"]


def _more(train: ConfigDict) -> str:
    longer = "raise train.max_steps" if train.max_steps > 0 else "raise train.num_train_epochs"
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        if train[name] > 1 and train.max_steps <= 0:
            return f"{longer} ({train.num_train_epochs:g}), or lower train.{name} ({train[name]})"
    return longer + (f" ({train.max_steps})" if train.max_steps > 0 else f" ({train.num_train_epochs:g})")

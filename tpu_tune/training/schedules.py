"""Learning-rate schedules under Hugging Face's names and with its formulas.

`make_schedule` returns an optax schedule: a function of the update's index (0-based, may be traced) to the learning
rate used for that update. With warm-up the first update has a learning rate of exactly zero, as in `transformers`.
Source of every formula: `transformers.optimization` (the `_get_*_lr_lambda` functions).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.training import plateau
from tpu_tune.training.optimizers import is_schedule_free

Factor = Callable[[jax.Array], jax.Array]  # step (int32) -> multiplier of the learning rate (float32)


def warmup_length(total_steps: int, warmup_steps: int = 0, warmup_ratio: float = 0.0) -> int:
    """Number of warm-up updates: `warmup_steps` if positive, else the ratio of all updates, rounded up."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)


def make_schedule(
    name: str,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    **kwargs: Any,
) -> optax.Schedule:
    """Build the schedule called `name`.

    Args:
      name: one of `SCHEDULES` (Hugging Face's `lr_scheduler_type`), or reduce_lr_on_plateau, which is constant here:
        what lowers it is the evaluation loss (`plateau`).
      learning_rate: the peak.
      total_steps: updates in the whole run.
      warmup_steps: updates that climb linearly from zero; takes precedence over `warmup_ratio`.
      warmup_ratio: the same as a share of `total_steps`.
      **kwargs: the schedule's own settings (Hugging Face's `lr_scheduler_kwargs`), e.g. `num_cycles`, `min_lr_rate`.

    Returns:
      A function from the 0-based update index (int or traced int array) to a float32 scalar.

    Raises:
      UserError: unknown name, unknown or missing setting.
    """
    if name == "greedy":
        raise UserError(f"train.lr_scheduler_type '{name}' is not supported; choose {_known()}")
    if name == plateau.NAME:
        plateau.Plateau.from_settings(kwargs)
        name, kwargs = "constant", {}
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, (*SCHEDULES, plateau.NAME), 1, 0.4)
        hint = f"did you mean '{near[0]}'? known: " if near else "choose "
        raise UserError(f"unknown train.lr_scheduler_type '{name}'; {hint}{_known()}")
    build = SCHEDULES[name]
    settings = {key for key, p in inspect.signature(build).parameters.items() if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(set(kwargs) - settings)
    if unknown:
        allowed = ", ".join(sorted(settings)) or "none"
        raise UserError(f"train.lr_scheduler_kwargs: '{unknown[0]}' is not a setting of '{name}' (it has: {allowed})")
    factor = build(learning_rate, total_steps, warmup_length(total_steps, warmup_steps, warmup_ratio), **kwargs)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        return learning_rate * factor(jnp.asarray(step, jnp.int32))

    return schedule


def configured_schedule(train: ConfigDict, total_steps: int) -> optax.Schedule:
    """Build the schedule that a configuration's `train` section names, over `total_steps` updates.

    A schedule-free optimizer warms up as its package does, under either name of a constant rate: from the first update
    on, and not from zero.

    Raises:
      UserError: unknown name, unknown or missing setting.
    """
    own_warmup = is_schedule_free(train)
    schedule = make_schedule(
        "constant_with_warmup" if own_warmup else train.lr_scheduler_type,
        train.learning_rate,
        total_steps,
        train.warmup_steps,
        train.warmup_ratio,
        **train.lr_scheduler_kwargs,
    )
    return (lambda step: schedule(step + 1)) if own_warmup else schedule


def _known() -> str:
    return ", ".join((*SCHEDULES, plateau.NAME))


def _climb(step: jax.Array, warmup: int) -> jax.Array:
    return step / jnp.float32(max(1, warmup))


def _after(step: jax.Array, warmup: int, total: int) -> jax.Array:
    """Share of the updates after warm-up that are done; integers are subtracted first, so it is exact."""
    return (step - warmup) / jnp.float32(max(1, total - warmup))


def _with_warmup(warmup: int, then: Factor) -> Factor:
    return lambda step: jnp.where(step < warmup, _climb(step, warmup), then(step))


def _constant(lr: float, total: int, warmup: int) -> Factor:
    return lambda step: jnp.ones((), jnp.float32)  # Hugging Face's "constant" takes no warm-up


def _constant_with_warmup(lr: float, total: int, warmup: int) -> Factor:
    return _with_warmup(warmup, lambda step: jnp.float32(1))


def _linear(lr: float, total: int, warmup: int) -> Factor:
    return _with_warmup(warmup, lambda step: jnp.maximum(0, (total - step) / jnp.float32(max(1, total - warmup))))


def _wave(progress: jax.Array, cycles: float, floor: float = 0.0) -> jax.Array:
    factor = 0.5 * (1 + jnp.cos(jnp.pi * cycles * 2 * progress))
    return jnp.maximum(0, factor * (1 - floor) + floor)


def _cosine(lr: float, total: int, warmup: int, *, num_cycles: float = 0.5) -> Factor:
    return _with_warmup(warmup, lambda step: _wave(_after(step, warmup, total), num_cycles))


def _cosine_with_restarts(lr: float, total: int, warmup: int, *, num_cycles: int = 1) -> Factor:
    def then(step):
        # Done in integers where the number of cycles is one: (cycles * (s - W)) mod (T - W) is exact, so a restart
        # falls on its very step, which a float32 remainder may miss.
        span = max(1, total - warmup)
        if float(num_cycles).is_integer():
            within = jnp.remainder(int(num_cycles) * (step - warmup), span) / jnp.float32(span)
        else:
            within = jnp.remainder(num_cycles * _after(step, warmup, total), 1.0)
        factor = jnp.maximum(0, 0.5 * (1 + jnp.cos(jnp.pi * within)))
        return jnp.where(step - warmup >= span, 0.0, factor)

    return _with_warmup(warmup, then)


def _polynomial(lr: float, total: int, warmup: int, *, lr_end: float = 1e-7, power: float = 1.0) -> Factor:
    if not lr > lr_end:
        raise UserError(f"train.learning_rate {lr} must be above lr_end {lr_end} for 'polynomial'")

    def then(step):
        left = jnp.clip(1 - _after(step, warmup, total), 0, 1)
        return ((lr - lr_end) * left**power + lr_end) / lr

    return _with_warmup(warmup, then)


def _inverse_sqrt(lr: float, total: int, warmup: int, *, timescale: int | None = None) -> Factor:
    scale = timescale if timescale is not None else (warmup or 10_000)
    # Below the warm-up the root is not used; the floor keeps it finite there.
    return _with_warmup(warmup, lambda step: jax.lax.rsqrt(jnp.maximum(step + scale - warmup, 1e-6) / scale))


def _min_rate(lr: float, min_lr: float | None, min_lr_rate: float | None, name: str) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise UserError(f"'{name}' needs one of min_lr and min_lr_rate in train.lr_scheduler_kwargs")
    return min_lr_rate if min_lr is None else min_lr / lr


def _cosine_with_min_lr(
    lr: float,
    total: int,
    warmup: int,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Factor:
    floor = _min_rate(lr, min_lr, min_lr_rate, "cosine_with_min_lr")
    return _with_warmup(warmup, lambda step: _wave(_after(step, warmup, total), num_cycles, floor))


def _cosine_warmup_with_min_lr(
    lr: float,
    total: int,
    warmup: int,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Factor:
    floor = _min_rate(lr, min_lr, min_lr_rate, "cosine_warmup_with_min_lr")

    def factor(step):
        # The one schedule that counts from one: its first update is not at zero.
        if warmup_lr_rate is None:
            climb = (step + 1) / jnp.float32(max(1, warmup))
        else:
            climb = warmup_lr_rate + (1 - warmup_lr_rate) * step / jnp.float32(max(1, warmup - 1))
        return jnp.where(step < warmup, climb, _wave(_after(step + 1, warmup, total), num_cycles, floor))

    return factor


_SHAPES: dict[str, Callable[[jax.Array, float], jax.Array]] = {  # share of the phase left, cycles -> factor
    "linear": lambda left, cycles: left,
    "cosine": lambda left, cycles: 0.5 * (1 + jnp.cos(jnp.pi * cycles * 2 * (1 - left))),
    "1-sqrt": lambda left, cycles: 1 - jnp.sqrt(jnp.clip(1 - left, 0, 1)),
}


def _warmup_stable_decay(
    lr: float,
    total: int,
    warmup: int,
    *,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Factor:
    if num_decay_steps is None:
        raise UserError("'warmup_stable_decay' needs num_decay_steps in train.lr_scheduler_kwargs")
    for key, shape in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if shape not in _SHAPES:
            raise UserError(f"train.lr_scheduler_kwargs: {key} is '{shape}'; it must be linear, cosine or 1-sqrt")
    decay_start = warmup + (total - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps)

    def lifted(factor):
        return jnp.maximum(0, factor * (1 - min_lr_ratio) + min_lr_ratio)

    def factor(step):
        # The warm-up is a decay of half a wave walked backwards.
        climb = lifted(_SHAPES[warmup_type](_climb(step, warmup), 0.5))
        left = 1 - (step - decay_start) / jnp.float32(max(1, num_decay_steps))
        decay = lifted(_SHAPES[decay_type](left, num_cycles))
        decay = jnp.where(step < decay_start + num_decay_steps, decay, min_lr_ratio)
        return jnp.where(step < warmup, climb, jnp.where(step < decay_start, 1.0, decay))

    return factor


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
}

"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682; AdamWScheduleFree of the package `schedulefree`).

Three weights instead of a falling learning rate, of which two are kept:

    z   moves by AdamW's step without momentum, taken at y
    x   is the mean of all z so far, each weighed by the square of the largest rate until then: what is used
    y   = (1 - beta1) z + beta1 x, where gradients and weight decay are taken: what a `TrainState` trains

z is in the optimizer's state beside the squares' mean, so that all takes the memory of AdamW. Whoever evaluates, shows
or keeps weights takes x = (y - (1 - beta1) z) / beta1 by `Steps.averaged`, and whoever reads a checkpoint gets it from
`read_trainable`; training goes on from y, which no evaluation changes. It is not `optax.contrib.schedule_free` because
that weighs a step by the rate of the one after it, which differs during warm-up, and cannot have its rate set.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tpu_tune.errors import UserError

SCHEDULES = ("constant", "constant_with_warmup")


class ScheduleFreeState(NamedTuple):
    """The optimizer's state; what a checkpoint needs to be read without the configuration is in it too.

    Attributes:
      b1: the share of x in y.
      z: a leaf for every trained one, float32.
      count: updates made.
      weight_sum: of all z in x.
      max_rate: the largest learning rate so far.
      learning_rate: of the next update, where there is no schedule; else None.
      inner: the state of the step's direction.
    """

    b1: Float[Array, ""]
    z: Any
    count: Int[Array, ""]
    weight_sum: Float[Array, ""]
    max_rate: Float[Array, ""]
    learning_rate: Float[Array, ""] | None
    inner: Any


def check(train: Any) -> None:
    """Check the `train` part of a configuration with this optimizer.

    Raises:
      UserError: a schedule that lowers the rate, or an average that y says nothing about.
    """
    if train.lr_scheduler_type not in SCHEDULES:
        raise UserError(
            f"train.optim={train.optim} averages instead of lowering the learning rate: set "
            f"train.lr_scheduler_type={' or '.join(SCHEDULES)}, not {train.lr_scheduler_type}"
        )
    if not train.adam_beta1:
        raise UserError(f"train.optim={train.optim} needs a train.adam_beta1 above 0 (0.9 is usual)")


def schedule_free(
    direction: optax.GradientTransformation, schedule: optax.Schedule | None, b1: float, rate: float = 0.0
) -> optax.GradientTransformation:
    """Return the optimizer whose parameters are y.

    Args:
      direction: the step before the learning rate, of gradients and y; it has no momentum.
      schedule: update index -> learning rate. None: the rate is `learning_rate` in the state.
      b1: the share of x in y, above 0.
      rate: the first learning rate where there is no schedule.
    """

    def init(params: Any) -> ScheduleFreeState:
        zero = jnp.zeros((), jnp.float32)
        z = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
        first = jnp.float32(rate) if schedule is None else None
        return ScheduleFreeState(jnp.float32(b1), z, jnp.int32(0), zero, zero, first, direction.init(params))

    def update(grads: Any, state: ScheduleFreeState, params: Any) -> tuple[Any, ScheduleFreeState]:
        steps, inner = direction.update(grads, state.inner, params)
        lr = state.learning_rate if schedule is None else schedule(state.count)
        max_rate = jnp.maximum(state.max_rate, lr)
        weight = jnp.square(max_rate)
        total = state.weight_sum + weight
        share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)  # of the new z in x
        updates = jax.tree.map(
            lambda y, z, step: share * (z - y) + lr * (b1 * (1 - share) - 1) * step, params, state.z, steps
        )
        z = jax.tree.map(lambda z, step: z - lr * step, state.z, steps)
        return updates, state._replace(z=z, count=state.count + 1, weight_sum=total, max_rate=max_rate, inner=inner)

    return optax.GradientTransformation(init, update)

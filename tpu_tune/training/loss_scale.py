"""Dynamic loss scaling for float16, as in `torch.amp.GradScaler`.

float16 gradients underflow, so the loss is multiplied by `scale` before differentiation and the gradients divided by
it after. An update whose gradients are not finite is skipped and the scale halved; after `GROWTH_INTERVAL` finite
updates in a row it is doubled. The state is a tiny pytree that lives in the jitted step and in the checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

INITIAL_SCALE = 65536.0
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL = 2000


class LossScale(NamedTuple):
    """State of the loss scale.

    Attributes:
      scale: float32 scalar that the loss is multiplied by.
      finite_steps: int32 scalar, finite updates since the scale last changed.
    """

    scale: jax.Array
    finite_steps: jax.Array


def init(scale: float = INITIAL_SCALE) -> LossScale:
    """Return the state before the first update."""
    return LossScale(jnp.float32(scale), jnp.int32(0))


def update(state: LossScale, finite: jax.Array) -> LossScale:
    """Return the state after an update whose gradients were all `finite` (bool scalar) or not.

    The scale never grows past what float32 holds and never falls below 1, where scaling down would no longer help:
    gradients that are still not finite there are the model's own, and the caller counts them as failures.
    """
    count = jnp.where(finite, state.finite_steps + 1, 0)
    grow = count >= GROWTH_INTERVAL
    grown = state.scale * GROWTH_FACTOR
    raised = jnp.where(grow & jnp.isfinite(grown), grown, state.scale)
    lowered = jnp.maximum(state.scale * BACKOFF_FACTOR, 1.0)
    return LossScale(jnp.where(finite, raised, lowered), jnp.where(grow, 0, count).astype(jnp.int32))

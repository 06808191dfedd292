"""T5's relative positions: a learned bias on the scores of every layer, by buckets of distances."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.layout import Bias
from tpu_tune.models.architecture import Architecture
from tpu_tune.tensors import embed


def relative_bias(arch: Architecture, table: Any) -> Bias:
    """Return the function from indices to the learned bias on the scores, (B, heads, T, S) float32."""

    def bias(query_index: Int[Array, "B T"], key_index: Int[Array, "B S"]) -> Float[Array, "B H T S"]:
        distance = key_index[:, None, :] - query_index[:, :, None]
        return jnp.moveaxis(embed(buckets_of(arch, distance), table, jnp.float32), -1, 1)

    return bias


def buckets_of(arch: Architecture, distance: Int[Array, "..."]) -> Int[Array, "..."]:
    """T5's buckets (arXiv:1910.10683, section 2.1): exact to half their number, then logarithmic to `max_distance`.

    Without `causal`, one half of the buckets is for what lies ahead.
    """
    count = arch.relative.buckets
    if arch.causal:
        first, distance = 0, jnp.maximum(-distance, 0)
    else:
        count //= 2
        first, distance = jnp.where(distance > 0, count, 0), jnp.abs(distance)
    exact = count // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(arch.relative.max_distance / exact)
    far = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
    return first + jnp.where(distance < exact, distance, far)

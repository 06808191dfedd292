"""A running batch's cache, changed between two tokens: a row that joins, all rows moved, more rows and columns.

Every row writes its next token into the same column, `Cache.length`. A row that joins late therefore stands right
before that column, with columns of segment 0 on its left, which no token sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tpu_tune.models.architecture import Architecture
from tpu_tune.models.decoder import Cache
from tpu_tune.models.scan import Pasts


def put_row(arch: Architecture, cache: Cache, row: Int[Array, ""], new: Cache) -> Cache:
    """Return the cache with another one's only row in place of a row of its own, its last token in the last column.

    Args:
      arch: the model's facts.
      cache: the batch's, of at least as many columns as are written in `new`.
      row: which row is replaced.
      new: a cache of one row that is full: its width is its length.
    """
    width = new.segments.shape[1]
    start = cache.length - width

    def attention(old: Array, its: Array) -> Array:  # (repeats, B, S, heads, size)
        return jax.lax.dynamic_update_slice(old, its.astype(old.dtype), (0, row, start, 0, 0))

    def state(old: Array, its: Array) -> Array:  # (repeats, B, ...)
        return jax.lax.dynamic_update_slice_in_dim(old, its.astype(old.dtype), row, axis=1)

    segments = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(cache.segments[:1]), new.segments, start, axis=1)
    segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, row, axis=0)
    return dataclasses.replace(cache, past=_map(arch, attention, state, cache.past, new.past), segments=segments)


def moved(arch: Architecture, cache: Cache, by: Int[Array, ""]) -> Cache:
    """Return the cache with its columns moved to the right (to the left where `by` is negative).

    What leaves at one end comes in at the other, so that only columns without a token may do so.
    """
    past = _map(arch, lambda array: jnp.roll(array, by, axis=2), lambda array: array, cache.past)
    return dataclasses.replace(
        cache, past=past, segments=jnp.roll(cache.segments, by, axis=1), length=cache.length + by
    )


def grown(arch: Architecture, cache: Cache, rows: int, columns: int) -> Cache:
    """Return the cache with room for more rows and tokens, behind those that it has."""
    more_rows, more_columns = rows - cache.segments.shape[0], columns - cache.segments.shape[1]

    def attention(array: Array) -> Array:
        return jnp.pad(array, [(0, 0), (0, more_rows), (0, more_columns), (0, 0), (0, 0)])

    def state(array: Array) -> Array:
        return jnp.pad(array, [(0, 0), (0, more_rows)] + [(0, 0)] * (array.ndim - 2))

    segments = jnp.pad(cache.segments, [(0, more_rows), (0, more_columns)])
    return dataclasses.replace(cache, past=_map(arch, attention, state, cache.past), segments=segments)


def _map(arch: Architecture, attention: Callable[..., Array], state: Callable[..., Array], *pasts: Pasts) -> Pasts:
    """Map over what the layers keep: `attention` of keys and values, `state` of what has no column for each token."""
    kinds = [[arch.layer_kinds[group.first + place] for place in range(group.period)] for group in arch.groups]
    return tuple(
        tuple(
            jax.tree.map(attention if kind.delta is None else state, *past)
            for kind, *past in zip(of_group, *of_pasts, strict=True)
        )
        for of_group, *of_pasts in zip(kinds, *pasts, strict=True)
    )

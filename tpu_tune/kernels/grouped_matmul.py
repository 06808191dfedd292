"""Products of rows that lie sorted by group with one matrix a group: what the experts of a sparse model compute.

`x` (rows, k) has the rows of group 0 first, then those of group 1; rows behind the last group belong to none and give
zeros. Every group may have any number of rows, none included. On TPUs arrays go to `jax.lax.ragged_dot`. Elsewhere XLA
would turn that into one product of all rows with every group's matrix, so that a loop goes over the groups instead; it
is also what stored formats use everywhere, since it needs one group's matrix at a time. `reference` is the formula.

`ragged_dot` takes its operands row by row, and a TPU keeps a row of fewer than 128 numbers in 128. Of an adapter's A,
with its few columns, XLA would keep all layers that way: 16 times the memory at rank 8. So A gets its empty columns
layer by layer, by a product with the unit matrix, and its gradient is made transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LANES = 128  # of a TPU's row
_ROWS = 128  # rows of a group that are multiplied at one time
_OUTER = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
# x with the matrices' first or second axis, groups aside
_AXES = [jax.lax.RaggedDotDimensionNumbers((((1,), (1 + axis,)), ((), ())), [0], [0]) for axis in (0, 1)]


def grouped_matmul(
    x: Float[Array, "rows k"], w: Float[Array, "groups in out"], sizes: Int[Array, " groups"], axis: int
) -> Float[Array, "rows n"]:
    """Return each row's product with its group's matrix in x's dtype, x @ w (axis 0) or x @ w.T (axis 1).

    Args:
      x: rows sorted by group; k is `in`, or `out` for axis 1.
      w: one matrix a group, of any floating dtype; it is used in x's.
      sizes: int32, number of rows of each group.
      axis: axis of the matrices that is contracted.
    """

    def loop(x: Array, w: Array, sizes: Array) -> Array:
        return matmul_each(x, lambda group: w[group].astype(x.dtype), w.shape[2 - axis], sizes, axis)

    return jax.lax.platform_dependent(x, w, sizes, tpu=functools.partial(_ragged_matmul, axis=axis), default=loop)


def matmul_each(
    x: Float[Array, "rows k"],
    matrix: Callable[[Int[Array, ""]], Float[Array, "in out"]],
    width: int,
    sizes: Int[Array, " groups"],
    axis: int,
) -> Float[Array, "rows n"]:
    """Return what `grouped_matmul` does, with each group's matrix made when its turn comes; empty groups are skipped.

    Args:
      x: rows sorted by group.
      matrix: group -> its matrix, in x's dtype.
      width: the result's width, n.
      sizes: int32, number of rows of each group.
      axis: axis of the matrices that is contracted.
    """
    step = _step(len(x))
    padded = jnp.pad(x, [(0, step), (0, 0)])

    def one_group(group: Array, start: Array, count: Array, out: Array) -> Array:
        w = matrix(group)

        def one_piece(piece: Array, out: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(padded, start + piece * step, step)
            y = jax.lax.dot_general(rows, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
            # The last piece may reach into the next groups' rows: their turn comes later.
            return jax.lax.dynamic_update_slice_in_dim(out, y.astype(x.dtype), start + piece * step, 0)

        return jax.lax.fori_loop(0, (count + step - 1) // step, one_piece, out)

    out = _over_groups(one_group, sizes, jnp.zeros((len(padded), width), x.dtype))
    return _without_rest(out[: len(x)], sizes)


def grouped_outer(
    x: Float[Array, "rows k"], y: Float[Array, "rows n"], sizes: Int[Array, " groups"]
) -> Float[Array, "groups k n"]:
    """Return x.T @ y of each group's rows, in float32: the gradient of the groups' matrices."""

    def each(x: Array, y: Array, sizes: Array) -> Array:
        return add_grouped_outer(jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32), x, y, sizes)

    return jax.lax.platform_dependent(x, y, sizes, tpu=_ragged_outer, default=each)


def add_grouped_outer(
    total: Float[Array, "groups k n"],
    x: Float[Array, "rows k"],
    y: Float[Array, "rows n"],
    sizes: Int[Array, " groups"],
) -> Float[Array, "groups k n"]:
    """Return total + x.T @ y of each group's rows, float32, without a second array of that size if total is donated."""
    step = _step(len(x))
    x, y = (jnp.pad(part, [(0, step), (0, 0)]) for part in (x, y))

    def one_group(group: Array, start: Array, count: Array, out: Array) -> Array:
        def one_piece(piece: Array, total: Array) -> Array:
            left, right = (jax.lax.dynamic_slice_in_dim(part, start + piece * step, step) for part in (x, y))
            own = (piece * step + jnp.arange(step) < count)[:, None]
            left = jnp.where(own, left, 0)
            return total + jax.lax.dot_general(
                left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        own = jax.lax.fori_loop(0, (count + step - 1) // step, one_piece, out[group])
        return jax.lax.dynamic_update_index_in_dim(out, own, group, 0)

    return _over_groups(one_group, sizes, total)


def _ragged_matmul(x: Array, w: Array, sizes: Array, axis: int) -> Array:
    w, width = w.astype(x.dtype), w.shape[2 - axis]
    if axis == 0 and width < _LANES:
        w = jnp.einsum("gkn,nm->gkm", w, jnp.eye(width, _LANES, dtype=w.dtype), precision="highest")
    y = jax.lax.ragged_dot_general(x, w, sizes, _AXES[axis], preferred_element_type=jnp.float32)
    return _without_rest(y[:, :width].astype(x.dtype), sizes)


def _ragged_outer(x: Array, y: Array, sizes: Array) -> Array:
    narrow = y.shape[1] < x.shape[1]
    pair = (y, x) if narrow else (x, y)
    outer = jax.lax.ragged_dot_general(*pair, sizes, _OUTER, preferred_element_type=jnp.float32)
    return jnp.swapaxes(outer, 1, 2) if narrow else outer


def _over_groups(one_group: Callable[..., Any], sizes: Array, out: Array) -> Array:
    """Run one_group(group, first row, number of rows, out) -> out for the groups that have rows, in their order."""
    starts = jnp.cumsum(sizes) - sizes
    present = jnp.argsort(sizes == 0, stable=True)

    def turn(number: Array, out: Array) -> Array:
        group = present[number]
        return one_group(group, starts[group], sizes[group], out)

    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), turn, out)


def _step(rows: int) -> int:
    return min(_ROWS, -(-rows // 8) * 8)


def _without_rest(y: Array, sizes: Array) -> Array:
    """Return y with zeros in the rows that belong to no group, which a kernel may leave as they were."""
    return jnp.where((jnp.arange(len(y)) < jnp.sum(sizes))[:, None], y, 0)


def reference(x: Array, w: Array, sizes: Array) -> Array:
    """Return x @ w by the formula, every row with every matrix: for tests."""
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(len(x))[:, None]
    chosen = (rows >= ends - sizes) & (rows < ends)
    return jnp.einsum("mk,gkn,mg->mn", x, w, chosen.astype(x.dtype), precision="highest")

"""`product(x, w, transposed)`: a matrix product whose derivative keeps no more than it must.

What it keeps of a quantized w is the codes, where autodiff of `x @ dequantize(w)` would keep the dequantized weight of
every layer, and of x nothing unless w is trained. Sums are float32 whatever the operands are, and a float32 weight (an
adapter) used by bfloat16 activations gets its gradient without a rounding between.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.grouped_matmul import grouped_matmul as multiply_groups
from tpu_tune.kernels.grouped_matmul import grouped_outer, matmul_each

ARRAYS = (jax.Array, np.ndarray)


class Contracts(Protocol):
    """A stored weight that computes its own products."""

    def contract(self, x: Array, axis: int) -> Array:
        """Return x @ w (axis 0) or x @ w.T (axis 1) in x's dtype, summed in float32."""

    def expert(self, index: Int[Array, ""], dtype: Any) -> Float[Array, "in out"]:
        """Return one expert's matrix, dequantized, of a weight that stacks one for each expert."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*batch k"], w: Array | Contracts, transposed: bool) -> Float[Array, "*batch n"]:
    """Return x @ w, or x @ w.T, summed in float32 and rounded to x's dtype once.

    Args:
      x: left operand; k is `in`, or `out` where transposed.
      w: the weight, (in, out); a gradient flows into an array only, what is stored in another form is frozen.
      transposed: whether to contract over `out`.
    """
    return _contract(x, w, int(transposed))


def contract_array(x: Array, w: Array, axis: int, dtype: Any = jnp.float32) -> Array:
    """Return x @ w (axis 0) or x @ w.T (axis 1) of arrays, summed in float32 and rounded to x's dtype once.

    Args:
      x, w: the operands, of one dtype.
      axis: of w, to contract over.
      dtype: what the product writes. A GPU's sums are float32 in any case, and x's own saves it a pass over memory.
    """
    dimensions = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=dtype).astype(x.dtype)


def _contract(x: Array, w: Any, axis: int) -> Array:
    return contract_array(x, w.astype(x.dtype), axis) if isinstance(w, ARRAYS) else w.contract(x, axis)


def _forward(x: Any, w: Any, transposed: bool) -> tuple[Array, tuple[Array | None, Any]]:
    is_trained = any(leaf.perturbed for leaf in jax.tree.leaves(w))
    x, w = x.value, jax.tree.map(lambda leaf: leaf.value, w)
    return product(x, w, transposed), (x if is_trained else None, w)


def _backward(transposed: bool, residuals: tuple[Array | None, Any], g: Array) -> tuple[Array, Any]:
    x, w = residuals
    x_gradient = _contract(g, w, int(not transposed))
    if x is None:
        return x_gradient, None
    if transposed:
        return x_gradient, _outer(g, x).astype(w.dtype)
    if 4 * g.shape[-1] > x.shape[-1]:
        return x_gradient, _outer(x, g).astype(w.dtype)
    # XLA's CPU backend transposes the first operand. For an adapter's A it should be the narrow one; the barrier keeps
    # XLA from exchanging them again.
    return x_gradient, jax.lax.optimization_barrier(_outer(g, x)).T.astype(w.dtype)


def _outer(left: Array, right: Array) -> Array:
    """Return left.T @ right over all tokens, in float32."""
    batch = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(left, right, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)


product.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(
    x: Float[Array, "rows k"], w: Array | Contracts, sizes: Int[Array, " experts"], transposed: bool = False
) -> Float[Array, "rows n"]:
    """Return each row's product with its expert's matrix, as `product` does with one matrix for all.

    Args:
      x: rows sorted by expert; those behind the last expert's give zeros.
      w: one (in, out) matrix an expert on a leading axis; a gradient flows into an array only.
      sizes: int32, number of rows of each expert.
      transposed: whether to contract over `out`.
    """
    return _contract_groups(x, w, sizes, int(transposed))


def _contract_groups(x: Array, w: Any, sizes: Array, axis: int) -> Array:
    if isinstance(w, ARRAYS):
        return multiply_groups(x, w, sizes, axis)
    return matmul_each(x, lambda index: w.expert(index, x.dtype), w.shape[1 - axis], sizes, axis)


def _forward_groups(x: Any, w: Any, sizes: Any, transposed: bool) -> tuple[Array, tuple[Array | None, Any, Array]]:
    is_trained = any(leaf.perturbed for leaf in jax.tree.leaves(w))
    x, w, sizes = x.value, jax.tree.map(lambda leaf: leaf.value, w), sizes.value
    return grouped_product(x, w, sizes, transposed), (x if is_trained else None, w, sizes)


def _backward_groups(transposed: bool, residuals: tuple[Array | None, Any, Array], g: Array) -> tuple[Any, Any, None]:
    x, w, sizes = residuals
    x_gradient = _contract_groups(g, w, sizes, int(not transposed))
    if x is None:
        return x_gradient, None, None
    pair = (g, x) if transposed else (x, g)
    return x_gradient, grouped_outer(*pair, sizes).astype(w.dtype), None


grouped_product.defvjp(_forward_groups, _backward_groups, symbolic_zeros=True)

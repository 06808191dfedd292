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
from jaxtyping import Array, Float

ARRAYS = (jax.Array, np.ndarray)


class Contracts(Protocol):
    """A stored weight that computes its own products."""

    def contract(self, x: Array, axis: int) -> Array:
        """Return x @ w (axis 0) or x @ w.T (axis 1) in x's dtype, summed in float32."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*batch k"], w: Array | Contracts, transposed: bool) -> Float[Array, "*batch n"]:
    """Return x @ w, or x @ w.T, summed in float32 and rounded to x's dtype once.

    Args:
      x: left operand; k is `in`, or `out` where transposed.
      w: the weight, (in, out); a gradient flows into an array only, what is stored in another form is frozen.
      transposed: whether to contract over `out`.
    """
    return _contract(x, w, int(transposed))


def contract_array(x: Array, w: Array, axis: int) -> Array:
    """Return x @ w (axis 0) or x @ w.T (axis 1) of arrays, summed in float32 and rounded to x's dtype once."""
    wide = jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


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

"""`matmul`, `embed` and `unembed`: what a weight leaf does, whatever kind of leaf it is.

Model code calls these three and never asks for a leaf's type. The product under them has its own derivative: what it
keeps of a `QuantizedTensor` is the codes, where autodiff of `x @ dequantize(w)` would keep the dequantized weight of
every layer, and of x nothing unless w is trained. Sums are float32 whatever the operands are, and a float32 weight
(an adapter) used by bfloat16 activations gets its gradient without a rounding between.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.chunks import token_keys
from tpu_tune.kernels.quantized_matmul import fits, quantized_matmul
from tpu_tune.tensors.formats import FORMATS
from tpu_tune.tensors.quantized import QuantizedTensor
from tpu_tune.tensors.wrapped import LayerView, LoraTensor, SavedTensor, TokensTensor, Transposed

PIECE = 2**24  # weights that exist dequantized at one time, where products are computed in pieces


def matmul(x: Float[Array, "*batch in"], w: Any) -> Float[Array, "*batch out"]:
    """Return x @ w in x's dtype for a kernel leaf w of logical shape (in, out)."""
    if isinstance(w, LoraTensor):
        return _lora_matmul(x, w)
    if isinstance(w, SavedTensor):
        return matmul(x, w.value)
    if isinstance(w, TokensTensor):
        return _replace_columns(matmul(x, w.base), x, w)
    if isinstance(w, Transposed):
        return unembed(x, w.base)
    return _product(x, w, False)


def embed(ids: Int[Array, "*batch"], w: Any, dtype: Any) -> Float[Array, "*batch dim"]:
    """Return the rows of an embedding leaf w of logical shape (vocabulary, dim), in `dtype`."""
    if isinstance(w, LoraTensor):
        rows = embed(ids, w.base, dtype)
        update = w.a[ids].astype(dtype) @ w.b.astype(dtype) * w.scale.astype(dtype)
        if w.magnitude is None:
            return rows + update
        return (w.magnitude / _dora_norm(w)).astype(dtype) * (rows + update)
    if isinstance(w, SavedTensor):
        return embed(ids, w.value, dtype)
    if isinstance(w, TokensTensor):
        place = jnp.full(w.base.shape[0], -1, jnp.int32).at[w.ids].set(jnp.arange(len(w.ids), dtype=jnp.int32))[ids]
        return jnp.where(place[..., None] < 0, embed(ids, w.base, dtype), w.rows[place].astype(dtype))
    if isinstance(w, QuantizedTensor):
        return w.dequantize(dtype)[ids]
    return w[ids].astype(dtype)


def unembed(x: Float[Array, "*batch dim"], w: Any) -> Float[Array, "*batch vocabulary"]:
    """Return x @ w.T: an embedding leaf (vocabulary, dim) as a tied head.

    An adapter or a trained copy on the embedding does not reach the head, single trained tokens do: as PEFT has it.
    """
    if isinstance(w, TokensTensor):
        return _replace_columns(unembed(x, w.base), x, w)
    if isinstance(w, (LoraTensor, SavedTensor)):
        return unembed(x, w.base)
    return _product(x, w, True)


def dense(w: Any) -> Float[Array, "*layers in out"]:
    """Return a leaf as one float32 array, adapters merged in; a leading layer axis is kept."""
    if isinstance(w, (LayerView, QuantizedTensor)):
        return _weight(w, jnp.float32)
    if isinstance(w, SavedTensor):
        return dense(w.value)
    if isinstance(w, TokensTensor):
        base = dense(w.base)
        return base.at[w.ids].set(w.rows) if w.axis == 0 else base.at[:, w.ids].set(w.rows.T)
    if isinstance(w, Transposed):
        return jnp.swapaxes(dense(w.base), -1, -2)
    if isinstance(w, LoraTensor):
        base = dense(w.base)
        merged = base + w.scale[..., None, None] * (w.a @ w.b)
        if w.magnitude is None:
            return merged
        merged = merged * (w.magnitude / _dora_norm(w))[..., None, :]
        return merged if w.active is None else jnp.where(w.active[..., None, None], merged, base)
    return w.astype(jnp.float32)


def _lora_matmul(x: Array, w: LoraTensor) -> Array:
    y = matmul(x, w.base)
    dropped = x if w.key is None or w.dropout == 0.0 else _dropout(x, w.key, w.dropout)
    update = _product(_product(dropped, w.a, False), w.b, False) * w.scale.astype(x.dtype)
    if w.magnitude is None:
        return y + update
    # PEFT's DoRA: the norm is a constant to the gradient (section 4.3), and the dropped input meets the base too.
    ratio = (w.magnitude / _dora_norm(w)).astype(x.dtype)
    base = y if dropped is x else matmul(dropped, w.base)
    decomposed = y + (ratio - 1) * base + ratio * update
    return decomposed if w.active is None else jnp.where(w.active, decomposed, y)


def _replace_columns(logits: Array, x: Array, w: TokensTensor) -> Array:
    """Return logits with those of the trained tokens computed from their own rows."""
    return logits.at[..., w.ids].set(_product(x, w.rows, True), unique_indices=True)


def _dora_norm(w: LoraTensor) -> Float[Array, "*layers out"]:
    merged = dense(w.base) + w.scale[..., None, None] * (w.a @ w.b)
    return jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=-2))


def _dropout(x: Array, key: Array, rate: float) -> Array:
    """Drop elements of x, (..., tokens, dim); `key` is one, or one a token (see `kernels.chunks.token_keys`)."""
    keys = token_keys(key, jnp.arange(x.shape[-2])) if key.ndim == 0 else key
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (*x.shape[:-2], x.shape[-1])))(keys)
    keep = jnp.moveaxis(keep, 0, -2)
    return (x / (1 - rate)).astype(x.dtype) * keep.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array | QuantizedTensor, transposed: bool) -> Array:
    """Return x @ w, or x @ w.T, summed in float32 and rounded to x's dtype once."""
    return _times(x, w, int(transposed))


def _product_forward(x: Any, w: Any, transposed: bool) -> tuple[Array, tuple[Array | None, Any]]:
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(w))
    x, w = x.value, jax.tree.map(lambda leaf: leaf.value, w)
    return _product(x, w, transposed), (x if trained else None, w)


def _product_backward(transposed: bool, kept: tuple[Array | None, Any], g: Array) -> tuple[Array, Any]:
    x, w = kept
    to_input = _times(g, w, int(not transposed))
    if x is None:
        return to_input, None
    if transposed:
        return to_input, _outer(g, x).astype(w.dtype)
    if 4 * g.shape[-1] > x.shape[-1]:
        return to_input, _outer(x, g).astype(w.dtype)
    # XLA's CPU backend transposes the first operand. Of an adapter's A it should be the narrow one; the barrier keeps
    # XLA from exchanging them again.
    return to_input, jax.lax.optimization_barrier(_outer(g, x)).T.astype(w.dtype)


def _outer(left: Array, right: Array) -> Array:
    """Return left.T @ right over all tokens, in float32."""
    batch = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(left, right, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _times(x: Array, w: Any, axis: int) -> Array:
    """Return x @ w (axis 0) or x @ w.T (axis 1), summed in float32 and rounded to x's dtype once."""
    if isinstance(w, LayerView) and w.plan.implementation == "pieces":
        return _in_pieces(x, w, axis)
    if isinstance(w, LayerView) and w.plan.implementation == "pallas":
        stack = w.stack
        if fits(stack.shape, stack.pack_block, stack.group_size):
            return quantized_matmul(
                x,
                stack.codes,
                stack.scales,
                stack.scale_max,
                w.layer,
                FORMATS[stack.format].decode,
                stack.group_size,
                axis == 1,
                w.plan,
            )
    return _contract(x, _weight(w, x.dtype), axis)


def _in_pieces(x: Array, w: LayerView, axis: int) -> Array:
    """Compute the product some output columns, or some rows, at a time: no more of w exists dequantized."""
    stack = w.stack
    unit = 128 if axis == 0 else math.lcm(stack.pack_block, stack.group_size)
    size, other = stack.shape[1 - axis], stack.shape[axis]
    width = max(1, PIECE // other // unit) * unit
    if width >= size or size % unit:
        return _contract(x, _weight(w, x.dtype), axis)

    def piece(number: Array, y: Array) -> Array:
        start = jnp.minimum(number * (width // unit), (size - width) // unit) * unit  # the last ones overlap
        part = _contract(x, w.cut(1 - axis, start, width).dequantize(x.dtype), axis)
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=-1)

    return jax.lax.fori_loop(0, -(-size // width), piece, jnp.zeros((*x.shape[:-1], size), x.dtype))


def _contract(x: Array, w: Array, axis: int) -> Array:
    wide = jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


def _weight(w: Array | QuantizedTensor | LayerView, dtype: Any) -> Array:
    w = w.cut() if isinstance(w, LayerView) else w
    return w.dequantize(dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)

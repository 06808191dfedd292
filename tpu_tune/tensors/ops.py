"""`matmul`, `embed` and `unembed`: what a weight leaf does, whatever kind of leaf it is.

Model code calls these three and never asks for a leaf's type. A product with a `QuantizedTensor` has its own
derivative whose residual is the codes: autodiff of `x @ dequantize(w)` would keep the dequantized weight of every
layer instead.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.tensors.quantized import QuantizedTensor
from tpu_tune.tensors.wrapped import LoraTensor, SavedTensor, Transposed


def matmul(x: Float[Array, "*batch in"], w: Any) -> Float[Array, "*batch out"]:
    """Return x @ w in x's dtype for a kernel leaf w of logical shape (in, out)."""
    if isinstance(w, LoraTensor):
        return _lora_matmul(x, w)
    if isinstance(w, SavedTensor):
        return matmul(x, w.value)
    if isinstance(w, Transposed):
        return unembed(x, w.base)
    if isinstance(w, QuantizedTensor):
        return _quantized_matmul(x, w)
    return x @ w.astype(x.dtype)


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
    if isinstance(w, QuantizedTensor):
        return w.dequantize(dtype)[ids]
    return w[ids].astype(dtype)


def unembed(x: Float[Array, "*batch dim"], w: Any) -> Float[Array, "*batch vocabulary"]:
    """Return x @ w.T: an embedding leaf (vocabulary, dim) as a tied head.

    An adapter or a trained copy on the embedding does not reach the head: PEFT's does not either.
    """
    if isinstance(w, (LoraTensor, SavedTensor)):
        return unembed(x, w.base)
    if isinstance(w, QuantizedTensor):
        return _quantized_unembed(x, w)
    return jnp.einsum("...d,vd->...v", x, w.astype(x.dtype))


def dense(w: Any) -> Float[Array, "*layers in out"]:
    """Return a leaf as one float32 array, adapters merged in; a leading layer axis is kept."""
    if isinstance(w, QuantizedTensor):
        return w.dequantize()
    if isinstance(w, SavedTensor):
        return dense(w.value)
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
    update = (dropped @ w.a.astype(x.dtype)) @ w.b.astype(x.dtype) * w.scale.astype(x.dtype)
    if w.magnitude is None:
        return y + update
    # PEFT's DoRA: the norm is a constant to the gradient (section 4.3), and the dropped input meets the base too.
    ratio = (w.magnitude / _dora_norm(w)).astype(x.dtype)
    base = y if dropped is x else matmul(dropped, w.base)
    decomposed = y + (ratio - 1) * base + ratio * update
    return decomposed if w.active is None else jnp.where(w.active, decomposed, y)


def _dora_norm(w: LoraTensor) -> Float[Array, "*layers out"]:
    merged = dense(w.base) + w.scale[..., None, None] * (w.a @ w.b)
    return jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=-2))


def _dropout(x: Array, key: Array, rate: float) -> Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


@jax.custom_vjp
def _quantized_matmul(x: Array, w: QuantizedTensor) -> Array:
    return x @ w.dequantize(x.dtype)


def _quantized_matmul_forward(x: Array, w: QuantizedTensor) -> tuple[Array, QuantizedTensor]:
    return _quantized_matmul(x, w), w


def _quantized_matmul_backward(w: QuantizedTensor, g: Array) -> tuple[Array, None]:
    return jnp.einsum("...o,io->...i", g, w.dequantize(g.dtype)), None


_quantized_matmul.defvjp(_quantized_matmul_forward, _quantized_matmul_backward)


@jax.custom_vjp
def _quantized_unembed(x: Array, w: QuantizedTensor) -> Array:
    return jnp.einsum("...d,vd->...v", x, w.dequantize(x.dtype))


def _quantized_unembed_forward(x: Array, w: QuantizedTensor) -> tuple[Array, QuantizedTensor]:
    return _quantized_unembed(x, w), w


def _quantized_unembed_backward(w: QuantizedTensor, g: Array) -> tuple[Array, None]:
    return g @ w.dequantize(g.dtype), None


_quantized_unembed.defvjp(_quantized_unembed_forward, _quantized_unembed_backward)

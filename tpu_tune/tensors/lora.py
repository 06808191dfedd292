"""`LoraTensor`: a frozen leaf with a low-rank update beside it, as PEFT defines it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpu_tune.kernels.chunks import token_keys
from tpu_tune.kernels.random_bits import keep_mask
from tpu_tune.tensors.leaf import dense, embed, grouped_matmul, matmul, unembed
from tpu_tune.tensors.product import grouped_product, product


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "scale", "key", "magnitude", "active"],
    meta_fields=["dropout"],
)
@dataclasses.dataclass(frozen=True)
class LoraTensor:
    """base + scale * a @ b (LoRA, arXiv:2106.09685), or its weight-decomposed form (DoRA, arXiv:2402.09353).

    Attributes:
      base: the frozen leaf: an array, a `QuantizedTensor` or a `Transposed`.
      a: (..., in, rank) float32; for an embedding (..., vocabulary, rank). Of experts, (..., experts, in, rank).
      b: (..., rank, out) float32; of experts, (..., experts, rank, out).
      scale: (...,) float32, alpha / rank or alpha / sqrt(rank); of experts, (..., experts), the same for all.
      key: a typed PRNG key a layer for dropout, or None in evaluation.
      magnitude: DoRA's magnitudes, (..., out) float32; None for plain LoRA.
      active: (...,) bool, which of the stacked layers carry the adapter; None: all. Only DoRA needs to know: where a
        and b are zero, plain LoRA changes nothing.
      dropout: probability that an element of the adapter's input is dropped.
    """

    base: Any
    a: Float[Array, "*layers in rank"]
    b: Float[Array, "*layers rank out"]
    scale: Float[Array, "*layers"]
    key: Array | None = None
    magnitude: Float[Array, "*layers out"] | None = None
    active: Bool[Array, "*layers"] | None = None
    dropout: float = 0.0

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x @ base + scale * dropout(x) @ a @ b, under DoRA with the columns' norms set to `magnitude`."""
        y = matmul(x, self.base)
        dropped = x if self.key is None or self.dropout == 0.0 else _dropout(x, self.key, self.dropout)
        update = product(product(dropped, self.a, False), self.b, False) * self.scale.astype(x.dtype)
        if self.magnitude is None:
            return y + update
        # PEFT's DoRA: the norm is a constant to the gradient (section 4.3), and the dropped input meets the base too.
        ratio = (self.magnitude / self._column_norms()).astype(x.dtype)
        base = y if dropped is x else matmul(dropped, self.base)
        decomposed = y + (ratio - 1) * base + ratio * update
        return decomposed if self.active is None else jnp.where(self.active, decomposed, y)

    def grouped_matmul(self, x: Float[Array, "rows in"], sizes: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """Return what `matmul` does, each row with its expert's base, A and B; there is no dropout and no DoRA here."""
        update = grouped_product(grouped_product(x, self.a, sizes), self.b, sizes)
        return grouped_matmul(x, self.base, sizes) + update * self.scale[0].astype(x.dtype)

    def embed(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """Return the rows of base + scale * a @ b."""
        rows = embed(ids, self.base, dtype)
        update = self.a[ids].astype(dtype) @ self.b.astype(dtype) * self.scale.astype(dtype)
        if self.magnitude is None:
            return rows + update
        return (self.magnitude / self._column_norms()).astype(dtype) * (rows + update)

    def unembed(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return x @ base.T: an adapter on the embedding does not reach a tied head."""
        return unembed(x, self.base)

    def dense(self) -> Float[Array, "*layers in out"]:
        """Return the merged weight."""
        base = dense(self.base)
        merged = base + self.scale[..., None, None] * (self.a @ self.b)
        if self.magnitude is None:
            return merged
        merged = merged * (self.magnitude / self._column_norms())[..., None, :]
        return merged if self.active is None else jnp.where(self.active[..., None, None], merged, base)

    def _column_norms(self) -> Float[Array, "*layers out"]:
        merged = dense(self.base) + self.scale[..., None, None] * (self.a @ self.b)
        return jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=-2))


def _dropout(x: Array, key: Array, rate: float) -> Array:
    """Drop elements of x, (..., tokens, dim); `key` is one key, or one a token (see `kernels.chunks.token_keys`)."""
    keys = token_keys(key, jnp.arange(x.shape[-2])) if key.ndim == 0 else key
    keep = jnp.moveaxis(keep_mask(keys, (*x.shape[:-2], x.shape[-1]), 1 - rate), 0, -2)
    return (x / (1 - rate)).astype(x.dtype) * keep.astype(x.dtype)

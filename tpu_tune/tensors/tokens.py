"""`TokensTensor`: an embedding or head of which single tokens are trained (PEFT's `trainable_token_indices`)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.tensors.leaf import dense, embed, matmul, unembed
from tpu_tune.tensors.product import product


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "ids", "rows"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class TokensTensor:
    """A frozen embedding or head in which some tokens have rows of their own (PEFT's `trainable_token_indices`).

    Attributes:
      base: the frozen leaf: an array, a `QuantizedTensor` or a `Transposed`.
      ids: the tokens, each once.
      rows: the trained rows that replace these tokens' rows of `base`, float32.
      axis: where the tokens lie in `base`: 0 in an embedding (vocabulary, dim), whose tied head uses the rows too; 1 in
        a head's kernel (dim, vocabulary).
    """

    base: Any
    ids: Int[Array, " n"]
    rows: Float[Array, "n dim"]
    axis: int = 0

    unties_head = False  # the trained rows reach a tied head

    def matmul(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return a head's logits."""
        return self._replace_columns(matmul(x, self.base), x)

    def embed(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """Return the rows of `base`; the trained tokens have their own."""
        row_of = jnp.full(self.base.shape[0], -1, jnp.int32)
        row = row_of.at[self.ids].set(jnp.arange(len(self.ids), dtype=jnp.int32))[ids]
        return jnp.where(row[..., None] < 0, embed(ids, self.base, dtype), self.rows[row].astype(dtype))

    def unembed(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return a tied head's logits, which the trained rows reach."""
        return self._replace_columns(unembed(x, self.base), x)

    def dense(self) -> Float[Array, "*layers in out"]:
        """Return `base` with the trained rows in it."""
        base = dense(self.base)
        return base.at[self.ids].set(self.rows) if self.axis == 0 else base.at[:, self.ids].set(self.rows.T)

    def _replace_columns(self, logits: Array, x: Array) -> Array:
        return logits.at[..., self.ids].set(product(x, self.rows, True), unique_indices=True)

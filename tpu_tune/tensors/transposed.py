"""`Transposed`: an embedding as the kernel of the head that is tied to it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.tensors.leaf import dense, unembed


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Transposed:
    """An embedding (vocabulary, dim) used as the head's kernel (dim, vocabulary), without a copy."""

    base: Any

    def matmul(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return x @ base.T."""
        return unembed(x, self.base)

    def embed(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """A head's kernel is no embedding.

        Raises:
          TypeError: always.
        """
        raise TypeError("a head's kernel has no rows to look up")

    def unembed(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """A head's kernel is no embedding.

        Raises:
          TypeError: always.
        """
        raise TypeError("a head's kernel is not tied to another head")

    def dense(self) -> Float[Array, "dim vocabulary"]:
        """Return the transposed embedding in float32."""
        return jnp.swapaxes(dense(self.base), -1, -2)

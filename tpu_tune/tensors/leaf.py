"""What every kind of weight leaf can do, and how the model asks for it: `matmul`, `embed`, `unembed`, `dense`,
and `grouped_matmul` where a leaf stacks the matrices of experts.

A leaf of the parameter tree is an array or an object of a class like `QuantizedTensor` or `LoraTensor`: one class in
one file, a frozen dataclass registered as a pytree, with the methods of `Leaf`. Model code calls the functions
here and never asks for a leaf's type, so that a new kind of leaf is a new class and nothing else. A leaf that wraps
another one holds it in a field called `base` (see `map_base`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.tensors.product import ARRAYS, grouped_product, product


class Leaf(Protocol):
    """A weight that is not a plain array; its methods are what the functions of this module do with it.

    Under `jax.lax.scan` a leaf of stacked layers is sliced array by array, and the slice is again a valid leaf. A leaf
    that wraps another one over an embedding and lets the tied head use its own values says `unties_head = False`; by
    default the head is taken to go on using `base`, as PEFT has it. A stored format has five members more, which
    `QuantizedTensor` shows: `contract` and `expert` (`product.Contracts`), `layer_view`, and for meshes `row_unit` and
    `map_parts`.
    """

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x @ w in x's dtype."""

    def embed(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """Return rows of an embedding (vocabulary, dim)."""

    def unembed(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return x @ w.T in x's dtype: an embedding used as a tied head."""

    def grouped_matmul(self, x: Float[Array, "rows in"], sizes: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """Return each row's product with its expert's matrix, of a leaf that stacks experts; rows sorted by expert."""

    def dense(self) -> Float[Array, "*layers in out"]:
        """Return the weight as one float32 array."""


def matmul(x: Float[Array, "*batch in"], w: Array | Leaf) -> Float[Array, "*batch out"]:
    """Return x @ w in x's dtype for a kernel leaf w of logical shape (in, out); sums are float32."""
    return product(x, w, False) if isinstance(w, ARRAYS) else w.matmul(x)


def grouped_matmul(
    x: Float[Array, "rows in"], w: Array | Leaf, sizes: Int[Array, " experts"]
) -> Float[Array, "rows out"]:
    """Return each row's product with its expert's matrix in x's dtype; sums are float32.

    Args:
      x: rows sorted by expert; those behind the last expert's give zeros.
      w: a leaf of logical shape (experts, in, out).
      sizes: int32, number of rows of each expert.
    """
    return grouped_product(x, w, sizes) if isinstance(w, ARRAYS) else w.grouped_matmul(x, sizes)


def embed(ids: Int[Array, "*batch"], w: Array | Leaf, dtype: Any) -> Float[Array, "*batch dim"]:
    """Return the rows of an embedding leaf w of logical shape (vocabulary, dim), in `dtype`."""
    return w[ids].astype(dtype) if isinstance(w, ARRAYS) else w.embed(ids, dtype)


def unembed(x: Float[Array, "*batch dim"], w: Array | Leaf) -> Float[Array, "*batch vocabulary"]:
    """Return x @ w.T in x's dtype: an embedding leaf (vocabulary, dim) as a tied head.

    An adapter or a trained copy on the embedding does not reach the head, single trained tokens do: as PEFT has it.
    """
    return product(x, w, True) if isinstance(w, ARRAYS) else w.unembed(x)


def dense(w: Array | Leaf) -> Float[Array, "*layers in out"]:
    """Return a leaf as one float32 array, adapters merged in; a leading layer axis is kept."""
    return w.astype(jnp.float32) if isinstance(w, ARRAYS) else w.dense()


def map_base(function: Callable[[Any], Any], leaf: Any) -> Any:
    """Return the leaf with `function` applied to what lies under all that wraps it: an array or a stored format."""
    if hasattr(leaf, "base"):
        return dataclasses.replace(leaf, base=map_base(function, leaf.base))
    return function(leaf)

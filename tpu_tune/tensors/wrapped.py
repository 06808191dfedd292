"""Leaves that wrap another leaf: `LoraTensor`, `SavedTensor`, `TokensTensor` and `Transposed`.

`transforms.combine` puts them into the parameter tree inside the jitted loss; `ops.py` says what they mean in a
matmul. They are pytrees, so a stacked one is sliced by `jax.lax.scan` like any array.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int


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
      a: (..., in, rank) float32; for an embedding (..., vocabulary, rank).
      b: (..., rank, out) float32.
      scale: (...,) float32, alpha / rank or alpha / sqrt(rank).
      key: a typed PRNG key a layer for dropout, or None in evaluation.
      magnitude: DoRA's (..., out) float32, or None.
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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A module that is trained in full beside its frozen original (PEFT's `modules_to_save`).

    The module itself uses `value`; a tied head goes on using `base`, as PEFT's copy of the module leaves it.
    """

    base: Any
    value: Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "ids", "rows"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class TokensTensor:
    """A frozen embedding or head in which some tokens have rows of their own (PEFT's `trainable_token_indices`).

    Attributes:
      base: the frozen leaf: an array, a `QuantizedTensor` or a `Transposed`.
      ids: the tokens, each once.
      rows: what stands in for their rows, float32.
      axis: where the tokens lie in `base`: 0 in an embedding (vocabulary, dim), whose tied head uses the rows too; 1 in
        a head's kernel (dim, vocabulary).
    """

    base: Any
    ids: Int[Array, " n"]
    rows: Float[Array, "n dim"]
    axis: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Transposed:
    """An embedding (vocabulary, dim) used as the head's kernel (dim, vocabulary), without a copy."""

    base: Any

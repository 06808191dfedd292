"""Leaves that wrap another leaf: `LoraTensor`, `SavedTensor`, `TokensTensor`, `Transposed` and `LayerView`.

`transforms.combine` puts them into the parameter tree inside the jitted loss; `ops.py` says what they mean in a
matmul. They are pytrees, so a stacked one is sliced by `jax.lax.scan` like any array.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from tpu_tune.kernels.quantized_matmul import MatmulPlan
from tpu_tune.tensors.quantized import QuantizedTensor


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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack", "layer"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer of a stacked `QuantizedTensor`, not cut out: what reads it reads the stack.

    Slices that `jax.lax.scan` makes of its inputs are copies wherever they go into another loop, and all of a layer's
    at once. Of this, a product cuts what it needs at that moment.

    Attributes:
      stack: all layers, on a leading axis.
      layer: which.
      plan: how products with it are computed.
    """

    stack: QuantizedTensor
    layer: Int[Array, ""]
    plan: MatmulPlan = MatmulPlan()

    @property
    def shape(self) -> tuple[int, int]:
        """The logical (in, out)."""
        return self.stack.shape

    def cut(self, axis: int = 1, start: Any = 0, size: int | None = None) -> QuantizedTensor:
        """Return the layer, or of its axis `in` (0: whole groups and pack blocks) or `out` (1) a part."""
        stack, size = self.stack, self.stack.shape[axis] if size is None else size

        def slice_of(leaf: Array, rows_each: int) -> Array:
            """Cut a stacked leaf, each row of which stands for so many of the kernel's (0: for all)."""
            starts, sizes = [self.layer, 0, 0], [1, *leaf.shape[1:]]
            if axis == 1:
                starts[2], sizes[2] = start, size
            elif rows_each:
                starts[1], sizes[1] = start // rows_each, size // rows_each
            return jax.lax.dynamic_slice(leaf, starts, sizes)[0]

        return dataclasses.replace(
            stack,
            codes=slice_of(stack.codes, 2 if stack.pack_block > 1 else 1),
            scales=slice_of(stack.scales, stack.group_size),
            scale_max=None if stack.scale_max is None else slice_of(stack.scale_max, 0),
            shape=(size, stack.shape[1]) if axis == 0 else (stack.shape[0], size),
        )


def outside_scan(leaves: Any, plan: MatmulPlan) -> tuple[Any, Callable[[Any, Array], Any]]:
    """Split stacked leaves into what `jax.lax.scan` is to walk and what stays outside, quantized tensors.

    Args:
      leaves: a tree of them.
      plan: how products with the quantized ones are computed.

    Returns:
      A tree for scan's inputs, and a function (one layer of it, the layer's number) -> the layer's leaves.
    """

    def is_quantized(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedTensor)

    flat, structure = jax.tree.flatten(leaves, is_leaf=is_quantized)
    walked = [None if is_quantized(leaf) else leaf for leaf in flat]

    def layer(inside: Any, number: Array) -> Any:
        return structure.unflatten(
            [
                LayerView(leaf, number, plan) if is_quantized(leaf) else part
                for leaf, part in zip(flat, inside, strict=True)
            ]
        )

    return walked, layer

"""`LayerView`: one layer of a stacked `QuantizedTensor`, read where it lies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.quantized_matmul import MatmulPlan, fits, quantized_matmul
from tpu_tune.tensors.formats import FORMATS
from tpu_tune.tensors.product import contract_array, grouped_product, product

if TYPE_CHECKING:
    from tpu_tune.tensors.quantized import QuantizedTensor

PIECE = 2**24  # weights that exist dequantized at one time, where products are computed in pieces
SMALL_PIECE = 2**22  # on TPU v2 and v3, where each takes seven bytes on the way
# Ways of GPUs, see `_piece`, and the weights that exist dequantized at one time.
GPU_PIECES = {"gpu_pieces": 2**24, "gpu_large_pieces": 2**26}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack", "layer"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer of a stacked `QuantizedTensor`, not cut out: what reads it reads the stack.

    Slices that `jax.lax.scan` makes of its inputs are copies wherever they go into another loop, and all of a layer's
    at once. Of a `LayerView`, a product cuts only what it needs at that moment.

    Attributes:
      stack: all layers, on a leading axis.
      layer: index of the layer on that axis.
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
        """Return the layer, or a part of its axis `in` (0: whole groups and pack blocks) or `out` (1)."""
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

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x @ w."""
        return product(x, self, False)

    def embed(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """Return rows of the layer."""
        return self.cut().embed(ids, dtype)

    def unembed(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return x @ w.T."""
        return product(x, self, True)

    def dense(self) -> Float[Array, "in out"]:
        """Return the layer in float32."""
        return self.cut().dense()

    def contract(self, x: Array, axis: int) -> Array:
        """Return x @ w (axis 0) or x @ w.T (axis 1), as `plan` says."""
        stack, how = self.stack, self.plan.implementation
        if how == "pallas" and fits(stack.shape, stack.pack_block, stack.group_size, self.plan):
            return quantized_matmul(
                x,
                stack.codes,
                stack.scales,
                stack.scale_max,
                self.layer,
                FORMATS[stack.format].decode,
                stack.group_size,
                axis == 1,
                self.plan,
            )
        return self._in_pieces(x, axis) if how in ("pieces", *GPU_PIECES) else self.cut().contract(x, axis)

    def grouped_matmul(self, x: Float[Array, "rows in"], sizes: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """Return each row's product with its expert's matrix, of a stack of layers that stack experts."""
        return grouped_product(x, self, sizes)

    def expert(self, index: Int[Array, ""], dtype: Any) -> Float[Array, "in out"]:
        """Return one expert's matrix, dequantized."""
        matrix = jax.tree.map(lambda part: part[self.layer, index], self.stack)
        return matrix.looked_up(dtype) if self.plan.implementation in GPU_PIECES else matrix.dequantize(dtype)

    def _in_pieces(self, x: Array, axis: int) -> Array:
        """Compute the product some output columns, or some rows, at a time: no more of w exists dequantized."""
        stack, how = self.stack, self.plan.implementation
        unit = 128 if axis == 0 else stack.row_unit
        size, other = stack.shape[1 - axis], stack.shape[axis]
        most = GPU_PIECES.get(how, SMALL_PIECE if self.plan.core.old else PIECE)
        width = max(1, most // other // unit) * unit
        if width >= size or size % unit:
            return self._piece(self.cut(), x, axis)

        def add_piece(number: Array, y: Array) -> Array:
            start = jnp.minimum(number * (width // unit), (size - width) // unit) * unit  # the last ones overlap
            part = self._piece(self.cut(1 - axis, start, width), x, axis)
            return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=-1)

        return jax.lax.fori_loop(0, -(-size // width), add_piece, jnp.zeros((*x.shape[:-1], size), x.dtype))

    def _piece(self, weight: QuantizedTensor, x: Array, axis: int) -> Array:
        """Compute the product with a part of the layer; on a GPU the way that is fast there, with the same weights."""
        if self.plan.implementation in GPU_PIECES:
            return contract_array(x, weight.looked_up(x.dtype), axis, x.dtype)
        return weight.contract(x, axis)


def stack_of_one(leaf: Any, plan: MatmulPlan) -> Any:
    """Return a view of a quantized matrix that stands alone, so that its products are computed as `plan` says.

    Any other leaf comes back as it is.
    """
    if not hasattr(leaf, "layer_view"):
        return leaf
    return jax.tree.map(lambda part: part[None], leaf).layer_view(jnp.int32(0), plan)


def outside_scan(leaves: Any, plan: MatmulPlan) -> tuple[Any, Callable[[Any, Array], Any]]:
    """Split stacked leaves into what `jax.lax.scan` is to slice and what stays outside: parts that have a `layer_view`.

    Args:
      leaves: a tree of stacked leaves.
      plan: how products with the quantized leaves are computed.

    Returns:
      A tree for scan's inputs, and a function (one slice of it, the layer's index in the stack) -> the layer's leaves.
    """

    def has_view(leaf: Any) -> bool:
        return hasattr(leaf, "layer_view")

    flat, structure = jax.tree.flatten(leaves, is_leaf=has_view)
    sliced = [None if has_view(leaf) else leaf for leaf in flat]

    def layer(slices: Any, index: Array) -> Any:
        pairs = zip(flat, slices, strict=True)
        return structure.unflatten([leaf.layer_view(index, plan) if has_view(leaf) else part for leaf, part in pairs])

    return sliced, layer

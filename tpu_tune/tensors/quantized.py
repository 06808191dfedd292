"""`QuantizedTensor`: a frozen (in, out) kernel as codes and scales, really half a byte a weight at four bits.

Invariants:
  * `shape` is the logical (in, out); leading axes of the arrays (stacked layers) are not part of it, so a slice of a
    stacked tensor by `jax.lax.scan` or `tree.map` is again a valid tensor.
  * Four-bit codes are packed inside blocks of `pack_block` input rows: row k shares a byte with row k + pack_block/2.
    A shard of whole blocks is a valid tensor of its own, which a row-parallel matmul needs.
  * Group g holds rows g*group_size .. (g+1)*group_size - 1; the last group may be short.
  * With double quantization `scales` are integers of one byte, and a scale is its integer times scale_max / 255: uint8
    where scales are maxima, int8 from -127 to 127 where they have a sign (int4). In mxfp4 they are uint8 too, the
    exponents of powers of two, and there is no `scale_max`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from tpu_tune.errors import UserError
from tpu_tune.kernels.quantized_matmul import MatmulPlan, powers_of_two
from tpu_tune.tensors.formats import FORMATS, exponents_of, fp4_tiny
from tpu_tune.tensors.layer_view import LayerView
from tpu_tune.tensors.product import contract_array, grouped_product, product

PACK_BLOCK = 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "scale_max"],
    meta_fields=["format", "shape", "group_size", "pack_block"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantized kernel of logical shape (in, out).

    Attributes:
      codes: uint8, (..., in/2, out) packed at four bits, (..., in, out) at eight.
      scales: (..., groups, out), each group's scale in float32 (its absolute maximum, or in int4 -7/8 of its extreme,
        which code 0 then stands for), or one byte (see above).
      scale_max: (..., 1, out) float32 under double quantization, what the integer 255 stands for; else None.
      format: a key of `formats.FORMATS`.
      shape: the logical shape, (in, out).
      group_size: number of input rows that share a scale.
      pack_block: number of input rows packed together (see the module's docstring); 1 where codes take a byte.
    """

    codes: Array
    scales: Array
    scale_max: Array | None
    format: str
    shape: tuple[int, int]
    group_size: int
    pack_block: int

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[Array, "*layers in out"],
        scales: Float[Array, "*layers groups out"] | Int[Array, "*layers groups out"],
        format: str,
        group_size: int,
    ) -> QuantizedTensor:
        """Pack codes, one a byte as `Format.encode` gives them, and float32 scales (mxfp4: exponents) into a tensor.

        numpy's arrays stay numpy's.
        """
        shape = tuple(codes.shape[-2:])
        block = pack_block(shape[0], format)
        return cls(_pack(codes, block) if block > 1 else codes, scales, None, format, shape, group_size, block)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def unpacked(self) -> UInt8[Array, "*layers in out"]:
        """Return the codes, one a byte, in row order."""
        return _unpack(self.codes, self.pack_block) if self.pack_block > 1 else self.codes

    def group_scales(self) -> Float[Array, "*layers groups out"]:
        """Return each group's scale in float32; of mxfp4's, which its codes' numbers want halved, see `formats`."""
        if FORMATS[self.format].exponents:
            return powers_of_two(self.scales)
        if self.scale_max is None:
            return self.scales.astype(jnp.float32)
        return self.scales.astype(jnp.float32) * (self.scale_max * jnp.float32(1 / 255))

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "*layers in out"]:
        """Return the weight: decoded and scaled in float32, then cast, as bitsandbytes and transformers do."""
        codes, form = self.unpacked(), FORMATS[self.format]
        values = _scale_groups(form.decode(codes), self.group_scales(), self.group_size)
        if form.exponents:
            exponents = _each_row(self.scales, self.group_size, self.shape[0])
            values = jnp.where(exponents < 2, fp4_tiny(codes, exponents), values)
        return values.astype(dtype)

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x @ w."""
        return product(x, self, False)

    def embed(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """Return rows of a quantized embedding; no others are decoded."""
        half, within = self.pack_block // 2, ids % self.pack_block
        if half:
            codes = self.codes[ids // self.pack_block * half + within % half]
            codes = jnp.where((within < half)[..., None], codes & 15, codes >> 4)
        else:
            codes = self.codes[ids]
        scales = dataclasses.replace(self, scales=self.scales[..., ids // self.group_size, :]).group_scales()
        return (FORMATS[self.format].decode(codes) * scales).astype(dtype)

    def unembed(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return x @ w.T."""
        return product(x, self, True)

    def dense(self) -> Float[Array, "*layers in out"]:
        """Return the weight in float32."""
        return self.dequantize()

    def contract(self, x: Array, axis: int) -> Array:
        """Return x @ w (axis 0) or x @ w.T (axis 1), dequantized whole in x's dtype."""
        return contract_array(x, self.dequantize(x.dtype), axis)

    def grouped_matmul(self, x: Float[Array, "rows in"], sizes: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """Return each row's product with its expert's matrix."""
        return grouped_product(x, self, sizes)

    def expert(self, index: Int[Array, ""], dtype: Any) -> Float[Array, "in out"]:
        """Return one expert's matrix, dequantized."""
        return jax.tree.map(lambda part: part[index], self).dequantize(dtype)

    def layer_view(self, layer: Int[Array, ""], plan: MatmulPlan) -> LayerView:
        """Return one layer of a stacked tensor without cutting it out."""
        return LayerView(self, layer, plan)

    @property
    def row_unit(self) -> int:
        """Input rows that a mesh keeps together: whole groups and whole pack blocks."""
        return math.lcm(self.group_size, self.pack_block)

    def map_parts(self, function: Callable[[bool], Any]) -> QuantizedTensor:
        """Return the same structure of `function`'s results for each array, told whether the array has an axis `in`."""
        largest = None if self.scale_max is None else function(False)
        return dataclasses.replace(self, codes=function(True), scales=function(True), scale_max=largest)


def pack_block(rows: int, format: str) -> int:
    """Return the number of input rows packed together for a kernel of `rows` rows.

    Raises:
      UserError: a four-bit format and an odd number of rows.
    """
    if FORMATS[format].bits == 8:
        return 1
    if rows % 2:
        raise UserError(f"a kernel of {rows} input rows cannot be packed two codes a byte; add it to quantize.exclude")
    return PACK_BLOCK if rows % PACK_BLOCK == 0 else rows


@functools.partial(jax.jit, static_argnames=("format", "group_size", "double_quant", "symmetric"))
def quantize_tensor(
    weight: Float[Array, "*layers in out"],
    format: str,
    group_size: int = 64,
    double_quant: bool = False,
    symmetric: bool = False,
) -> QuantizedTensor:
    """Quantize a kernel with one scale for each `group_size` input rows of each output column.

    For nf4 at group 64 codes and scales equal bitsandbytes' (QLoRA, arXiv:2305.14314, section 3) on the transposed
    torch weight where 64 divides `in`. Double quantization stores the scales as uint8, linear up to the column's
    largest; its error equals that of bitsandbytes' dynamic map at 4 + 8/64 + 32/in bits a weight. mxfp4's scales take
    a byte by themselves. What was dequantized from mxfp4 comes back as it was. int4 has the group's extreme at the
    lowest of its 16 levels.

    Args:
      weight: the kernel, any number of layers before its two axes.
      format, group_size: see `QuantizedTensor`.
      double_quant: store the scales in a byte each.
      symmetric: int4 with 15 levels, -7 to 7, the group's absolute maximum at one end, as runs had it once.

    Raises:
      UserError: four bits and an odd number of input rows.
    """
    weight = weight.astype(jnp.float32)
    form = FORMATS[format]
    found = group_scale(_grouped(_pad_rows(weight, -weight.shape[-2] % group_size), group_size), format, symmetric)
    scales = exponents_of(found) if form.exponents else found
    steps = powers_of_two(scales) if form.exponents else found
    codes = form.encode(_scale_groups(weight, inverse_scale(steps), group_size))
    tensor = QuantizedTensor.from_codes(codes, scales, format, group_size)
    return double_quantize(tensor) if double_quant else tensor


def group_scale(weights: Float[Array, "*n group out"], format: str, symmetric: bool = False) -> Float[Array, "*n out"]:
    """Return the scale by which a group of rows is quantized: its absolute maximum, or by its extreme (int4)."""
    sizes, form = jnp.abs(weights), FORMATS[format]
    if not form.far_end or symmetric:
        return jnp.max(sizes, axis=-2)
    at = jnp.argmax(sizes, axis=-2)[..., None, :]
    return jnp.take_along_axis(weights, at, axis=-2)[..., 0, :] * jnp.float32(1 / form.far_end)


def inverse_scale(scales: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return 1 / scale, and 0 for a scale of 0."""
    return jnp.where(scales != 0, 1.0 / jnp.where(scales != 0, scales, 1.0), 0.0)


def double_quantize(tensor: QuantizedTensor) -> QuantizedTensor:
    """Store the group scales in a byte each, linear up to the output column's largest; mxfp4's are a byte already."""
    form = FORMATS[tensor.format]
    if form.exponents:
        return tensor
    scales = tensor.group_scales()
    largest = jnp.max(jnp.abs(scales), axis=-2, keepdims=True)
    count, dtype = (127, jnp.int8) if form.far_end else (255, jnp.uint8)
    codes = jnp.round(scales * (count / jnp.where(largest > 0, largest, 1.0))).astype(dtype)
    return dataclasses.replace(tensor, scales=codes, scale_max=largest * jnp.float32(255 / count))


def _scale_groups(values: Array, scales: Array, group_size: int) -> Array:
    rows = values.shape[-2]
    if rows % group_size == 0:
        return (_grouped(values, group_size) * scales[..., None, :]).reshape(values.shape)
    return values * _each_row(scales, group_size, rows)


def _each_row(scales: Array, group_size: int, rows: int) -> Array:
    return jnp.repeat(scales, group_size, axis=-2)[..., :rows, :]


def _grouped(values: Array, size: int) -> Array:
    *layers, rows, columns = values.shape
    return values.reshape(*layers, rows // size, size, columns)


def _pad_rows(values: Array, count: int) -> Array:
    return jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, count), (0, 0)]) if count else values


def _pack(codes: Array, block: int) -> Array:
    blocks = _grouped(codes, block)
    low, high = blocks[..., : block // 2, :], blocks[..., block // 2 :, :]
    packed = low | (high << 4)
    return packed.reshape(*codes.shape[:-2], codes.shape[-2] // 2, codes.shape[-1])


def _unpack(packed: Array, block: int) -> Array:
    blocks = _grouped(packed, block // 2)
    codes = jnp.concatenate([blocks & 0xF, blocks >> 4], axis=-2)
    return codes.reshape(*packed.shape[:-2], packed.shape[-2] * 2, packed.shape[-1])

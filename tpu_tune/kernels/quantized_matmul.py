"""A product with a four-bit kernel: which implementation runs, and the Pallas kernel for TPUs.

Left to XLA, `x @ dequantize(w)` writes the dequantized weight to memory, there and back, for every product: 270 MB of
scratch for LLaMA-7B's `up_proj` on a v5e. The Pallas kernel decodes a block of codes in the chip's own memory, where it
meets the MXU, and holds nothing else. On GPUs `tensors.layer_view` dequantizes pieces, one after another. The reference
is the formula itself, on a weight dequantized whole; the implementations add in another order.

Codes lie as `tensors.quantized` packs them: row k of a block of 256 shares a byte with row k + 128. They come stacked
with the number of the layer to use, so that no layer is cut out of the stack.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from tpu_tune.errors import UserError
from tpu_tune.kernels.mesh import ROWS, SEQUENCE

BLOCK = 256  # rows of the kernel that are packed together: one step of the loop over them
_COLUMNS = 256
_TOKENS = 1024  # so many share one decoding


@dataclasses.dataclass(frozen=True)
class MatmulPlan:
    """How products with quantized kernels are computed.

    Attributes:
      implementation: xla (dequantize whole), pieces (dequantize some columns or rows at a time), or pallas.
      wide_operands: let the Pallas kernel multiply float32, where the MXU takes no bfloat16.
      mesh: the devices, each of which multiplies its own tokens with the whole kernel; None on one device.
    """

    implementation: str = "xla"
    wide_operands: bool = False
    mesh: Mesh | None = None


def for_device(implementation: str, mesh: Mesh) -> MatmulPlan:
    """Return how to compute products on a mesh's devices: as asked for, or the best where that is auto.

    On a mesh with an axis `tensor` it is xla in any case.

    Raises:
      UserError: the Pallas kernel on what is not a TPU.
    """
    device = mesh.devices.flat[0]
    on_tpu = device.platform == "tpu"
    if implementation == "pallas" and not on_tpu:
        raise UserError(
            f"model.quantized_matmul=pallas needs a TPU, and this is {device.device_kind}; leave it at auto"
        )
    if implementation == "auto":
        implementation = "pallas" if on_tpu else ("xla" if device.platform == "cpu" else "pieces")
    if mesh.shape["tensor"] > 1:
        implementation = "xla"  # which cuts codes and products over the axis by itself
    old = on_tpu and device.device_kind.startswith(("TPU v2", "TPU v3"))
    return MatmulPlan(implementation, old, mesh if mesh.size > 1 else None)


def fits(shape: tuple[int, int], pack_block: int, group_size: int) -> bool:
    """Return whether the Pallas kernel takes a four-bit kernel of logical shape (in, out)."""
    rows, columns = shape
    return pack_block == BLOCK and rows % BLOCK == 0 and columns % 128 == 0 and (BLOCK // 2) % group_size == 0


def powers_of_two(exponents: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Return 2^(s - 128) in float32 for the exponents s of mxfp4's scales; 0 for s < 2, which has no normal float32."""
    return jax.lax.bitcast_convert_type(jnp.maximum(exponents.astype(jnp.int32) - 1, 0) << 23, jnp.float32)


def quantized_matmul(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "layers half_in out"],
    scales: Array,
    scale_max: Float[Array, "layers 1 out"] | None,
    layer: Int[Array, ""],
    decode: Callable[[Array], Array],
    group_size: int,
    transposed: bool,
    plan: MatmulPlan = MatmulPlan("pallas"),
    interpret: bool = False,
) -> Float[Array, "*batch n"]:
    """Return x @ w, or x @ w.T, in x's dtype, for w (in, out) = layer `layer` of a stack; sums are float32.

    Args:
      x: left operand; k is `in`, or `out` where transposed.
      codes: four-bit codes, two a byte.
      scales: (layers, in / group_size, out), float32; or uint8, with their largest in `scale_max`, or as exponents (see
        `powers_of_two`).
      scale_max: each column's largest scale under double quantization.
      layer: index of the layer in the stack.
      decode: integer codes -> float32, elementwise.
      group_size: number of rows that share a scale; divides 128.
      transposed: whether to contract over `out`.
      plan: says whether operands are float32, and on which mesh to run.
      interpret: run the kernel as plain JAX, to test it without a TPU.
    """
    on_one_device = functools.partial(
        _on_one_device,
        decode=decode,
        group_size=group_size,
        transposed=transposed,
        interpret=interpret,
        operands=jnp.dtype("float32") if plan.wide_operands else x.dtype,
    )
    if plan.mesh is None:
        return on_one_device(x, codes, scales, scale_max, layer)
    tokens = PartitionSpec(ROWS, SEQUENCE, None)
    replicated = PartitionSpec()
    return jax.shard_map(
        on_one_device, mesh=plan.mesh, in_specs=(tokens, *[replicated] * 4), out_specs=tokens, check_vma=False
    )(x, codes, scales, scale_max, layer)


def _on_one_device(
    x: Array,
    codes: Array,
    scales: Array,
    scale_max: Array | None,
    layer: Array,
    *,
    decode: Any,
    group_size: int,
    transposed: bool,
    operands: Any,
    interpret: bool,
) -> Array:
    shape, width = x.shape, x.shape[-1]
    x = x.reshape(-1, width)
    tokens = min(_TOKENS, -(-x.shape[0] // 16) * 16)
    count = -(-x.shape[0] // tokens)
    x = jnp.pad(x, [(0, count * tokens - x.shape[0]), (0, 0)])
    rows, columns = 2 * codes.shape[1], codes.shape[2]
    wide = _COLUMNS if columns % _COLUMNS == 0 else 128
    steps = rows // BLOCK, columns // wide
    body = functools.partial(_backward if transposed else _forward, decode, group_size, operands)
    if transposed:
        grid, out = (count, *steps), rows
        block_index = lambda m, k, n: (k, n)  # noqa: E731
        x_spec = pl.BlockSpec((tokens, wide), lambda m, k, n, _: (m, n))
        out_spec = pl.BlockSpec((tokens, BLOCK), lambda m, k, n, _: (m, k))
        partial_sums = pltpu.VMEM((tokens, BLOCK), jnp.float32)
    else:
        grid, out = (count, steps[1], steps[0]), columns
        block_index = lambda m, n, k: (k, n)  # noqa: E731
        x_spec = pl.BlockSpec((tokens, BLOCK), lambda m, n, k, _: (m, k))
        out_spec = pl.BlockSpec((tokens, wide), lambda m, n, k, _: (m, n))
        partial_sums = pltpu.VMEM((tokens, wide), jnp.float32)

    def whole_columns(leaf: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, leaf.shape[1], wide), lambda *at: (at[3][0], 0, block_index(*at[:3])[1]))

    specs = [
        x_spec,
        pl.BlockSpec((1, BLOCK // 2, wide), lambda *at: (at[3][0], *block_index(*at[:3]))),
        whole_columns(scales),
    ]
    operands = [x, codes, scales]
    if scale_max is not None:
        specs.append(whole_columns(scale_max))
        operands.append(scale_max)
    y = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs,
            out_specs=out_spec,
            scratch_shapes=[partial_sums, pltpu.VMEM((scales.shape[1], wide), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(jnp.reshape(layer, 1).astype(jnp.int32), *operands)
    return y[: math.prod(shape[:-1])].reshape(*shape[:-1], out)


def _forward(decode: Any, group_size: int, dtype: Any, _: Any, x: Any, codes: Any, scales: Any, *rest: Any) -> None:
    *largest, out, sums, float_scales = rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        float_scales[...] = _group_scales(scales, largest)

    for half, w in enumerate(_halves(decode, group_size, codes, float_scales, step, dtype)):
        part = x[:, half * BLOCK // 2 : (half + 1) * BLOCK // 2].astype(dtype)
        sums[...] += jnp.dot(part, w, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = sums[...].astype(out.dtype)


def _backward(decode: Any, group_size: int, dtype: Any, _: Any, g: Any, codes: Any, scales: Any, *rest: Any) -> None:
    *largest, out, sums, float_scales = rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    float_scales[...] = _group_scales(scales, largest)
    for half, w in enumerate(_halves(decode, group_size, codes, float_scales, pl.program_id(1), dtype)):
        part = jax.lax.dot_general(
            g[...].astype(dtype), w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        sums[:, half * BLOCK // 2 : (half + 1) * BLOCK // 2] += part

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = sums[...].astype(out.dtype)


def _group_scales(scales: Any, largest: list[Any]) -> Array:
    stored = scales[0]
    if not largest:
        return stored if stored.dtype == jnp.float32 else powers_of_two(stored)
    return stored.astype(jnp.int32).astype(jnp.float32) * (largest[0][0] * jnp.float32(1 / 255))


def _halves(decode: Any, group_size: int, codes: Any, scales: Any, step: Array, dtype: Any) -> list[Array]:
    """Return the two halves of a block's rows, dequantized: those in the low nibbles, and those in the high."""
    packed = codes[0].astype(jnp.int32)
    groups = BLOCK // group_size
    halves = []
    for half, part in enumerate((packed & 0xF, packed >> 4)):
        values = decode(part)
        pieces = [
            values[i * group_size : (i + 1) * group_size] * scales[pl.ds(step * groups + half * groups // 2 + i, 1), :]
            for i in range(groups // 2)
        ]
        halves.append(jnp.concatenate(pieces, axis=0).astype(dtype))
    return halves

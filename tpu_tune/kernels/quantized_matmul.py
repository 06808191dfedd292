"""A product with a quantized kernel: which implementation runs, and on a mesh what each device does.

Left to XLA, `x @ dequantize(w)` writes the dequantized weight to memory, there and back, for every product: 270 MB of
scratch for LLaMA-7B's `up_proj` on a v5e. The Pallas kernel for TPUs (`quantized_blocks`) decodes a block of codes in
the chip's own memory, where it meets the MXU, and holds nothing else. On GPUs `tensors.layer_view` dequantizes pieces,
one after another. The reference is the formula itself, on a weight dequantized whole; the implementations add in
another order.

Codes lie as `tensors.quantized` packs them: at four bits, row k of a block of 256 shares a byte with row k + 128. They
come stacked with the number of the layer to use, so that no layer is cut out of the stack.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from tpu_tune.errors import UserError
from tpu_tune.kernels.mesh import ROWS, SEQUENCE
from tpu_tune.kernels.quantized_blocks import BLOCK, Core, Kernel, core_of, multiply


@dataclasses.dataclass(frozen=True)
class MatmulPlan:
    """How products with quantized kernels are computed.

    Attributes:
      implementation: xla (dequantize whole), pieces (dequantize some columns or rows at a time), or pallas.
      core: what the Pallas kernel is cut for.
      mesh: the devices, each of which multiplies its own tokens with its part of the kernel; None on one device.
      cut: the mesh axes that cut the kernel's (in, out); None where it is whole.
    """

    implementation: str = "xla"
    core: Core = Core()
    mesh: Mesh | None = None
    cut: tuple[str | None, str | None] = (None, None)


def for_device(implementation: str, mesh: Mesh) -> MatmulPlan:
    """Return how to compute products on a mesh's devices: as asked for, or the best where that is auto.

    On a mesh with an axis `tensor`, what would run in pieces runs whole.

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
        slow = core_of(device).slow and mesh.shape["tensor"] == 1  # cut over `tensor`, pieces would be whole matrices
        implementation = "xla" if device.platform == "cpu" else ("pallas" if on_tpu and not slow else "pieces")
    if mesh.shape["tensor"] > 1 and implementation == "pieces":
        implementation = "xla"  # which cuts codes and products over the axis by itself
    return MatmulPlan(implementation, core_of(device), mesh if mesh.size > 1 else None)


def fits(shape: tuple[int, int], pack_block: int, group_size: int, plan: MatmulPlan = MatmulPlan()) -> bool:
    """Return whether the Pallas kernel takes a quantized kernel of logical shape (in, out), cut as the plan says."""
    parts = [1 if axis is None else plan.mesh.shape[axis] for axis in plan.cut]
    rows, columns = (size // count for size, count in zip(shape, parts, strict=True))
    return pack_block in (1, BLOCK) and rows % BLOCK == 0 and columns % 128 == 0 and (BLOCK // 2) % group_size == 0


def powers_of_two(exponents: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Return 2^(s - 128) in float32 for the exponents s of mxfp4's scales; 0 for s < 2, which has no normal float32."""
    return jax.lax.bitcast_convert_type(jnp.maximum(exponents.astype(jnp.int32) - 1, 0) << 23, jnp.float32)


def quantized_matmul(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "layers stored_in out"],
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
      codes: two a byte, or one.
      scales: (layers, in / group_size, out), float32; or one byte, uint8 or with a sign int8, in parts of
        `scale_max` / 255; or uint8 as exponents (see `powers_of_two`).
      scale_max: what a scale's integer 255 stands for in each column under double quantization.
      layer: index of the layer in the stack.
      decode: integer codes -> float32, elementwise.
      group_size: number of rows that share a scale; divides 128.
      transposed: whether to contract over `out`.
      plan: the core that it is for, and on which mesh to run.
      interpret: run the kernel as plain JAX, to test it without a TPU.
    """
    leaves = [scales] if scale_max is None else [scales, scale_max]
    inner, outer = plan.cut[::-1] if transposed else plan.cut
    kernel = Kernel(
        decode=decode,
        group_scales=_group_scales,
        packed=codes.shape[1] * 2 == scales.shape[1] * group_size,
        group_size=group_size,
        transposed=transposed,
        out=x.dtype if inner is None else jnp.dtype("float32"),  # parts are rounded when they are added
        core=plan.core,
    )

    def on_one_device(x: Array, codes: Array, leaves: list[Array], layer: Array) -> Array:
        y = multiply(x.reshape(-1, x.shape[-1]), codes, leaves, layer, kernel, interpret=interpret)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if inner is None else jax.lax.psum(y, inner).astype(x.dtype)

    if plan.mesh is None:
        return on_one_device(x, codes, leaves, layer)
    tokens = functools.partial(PartitionSpec, ROWS, SEQUENCE)
    stacked = PartitionSpec(None, *plan.cut)
    specs = (tokens(inner), stacked, [stacked, PartitionSpec(None, None, plan.cut[1])][: len(leaves)], PartitionSpec())
    return jax.shard_map(on_one_device, mesh=plan.mesh, in_specs=specs, out_specs=tokens(outer), check_vma=False)(
        x, codes, leaves, layer
    )


def _group_scales(stored: Array, largest: Array | None = None) -> Array:
    if largest is None:
        return stored if stored.dtype == jnp.float32 else powers_of_two(stored)
    return stored.astype(jnp.int32).astype(jnp.float32) * (largest * jnp.float32(1 / 255))

"""Pallas kernel for TPUs: tokens times a quantized matrix that is decoded block by block while the MXU multiplies.

The steps (tokens, outputs, contraction) stand in one line. Each multiplies with the block that the step before it
decoded, and decodes the next: the first step only decodes. The compiler does vector work beside the MXU's only where
nothing branches, so zeroing the sums and rounding them are part of every step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

BLOCK = 256  # rows of a four-bit matrix that are packed together
_TOKENS = 2048  # at most so many share one decoding
_DECODED = 2**19  # weights that a step decodes at most: the kernel's code grows with them
_SCALE_ROWS = 32  # a tile of bytes
_COMPILER = 3 * 2**20  # bytes of fast memory that the compiler wants at least for itself
_STEP = 400  # cycles that a step costs beside its products: copies, jumps, filling the MXU (as a v5e's bundles say)


@dataclasses.dataclass(frozen=True)
class Core:
    """What the kernel has to know of a TensorCore.

    Attributes:
      macs: bfloat16 multiplications a cycle.
      bandwidth: bytes from HBM a cycle, of what can be had.
      vmem: bytes of its fast memory for the kernel's arrays; the compiler wants some more for itself.
      decoding: cycles to decode one weight, beside the MXU's work; fitted to times of many tiles by the bundles.
      count: cores behind one JAX device, which share the outputs.
      old: whether the MXU takes float32 operands alone and lanes cannot be looked up (v2, v3).
      slow: whether products of pieces that XLA dequantizes take less time than the kernel (v3; of v2 not known).
    """

    macs: int = 65536
    bandwidth: int = 490
    vmem: int = 13 * 2**20
    decoding: float = 0.006
    count: int = 1
    old: bool = False
    slow: bool = False


_CORES = (  # by the start of the device's name
    ("TPU v2", Core(macs=16384, bandwidth=450, decoding=0.05, old=True)),
    ("TPU v3", Core(macs=32768, bandwidth=430, decoding=0.05, old=True, slow=True)),
    ("TPU v4", Core(bandwidth=520, decoding=0.022, count=2)),
    ("TPU v5 lite", Core()),
    ("TPU v5", Core(bandwidth=710, count=2)),
    ("TPU v6", Core(macs=262144, bandwidth=840, vmem=26 * 2**20)),
    ("TPU7x", Core(macs=262144, bandwidth=1500, vmem=26 * 2**20)),
)


def core_of(device: Any) -> Core:
    """Return a JAX device's core; a TPU that is not known is taken for a v5e."""
    return next((core for name, core in _CORES if device.device_kind.startswith(name)), Core())


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut: tokens a block, and rows and columns of the matrix a block."""

    tokens: int
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The static side of a product.

    Attributes:
      decode: integer codes -> float32, elementwise.
      group_scales: a block of scales as they are stored, and where they have one their maximum -> float32.
      packed: whether a byte holds two codes.
      group_size: number of rows that share a scale; divides 128.
      transposed: whether columns are contracted instead of rows.
      out: the result's dtype.
      core: the core that it is for.
    """

    decode: Callable[[Array], Array]
    group_scales: Callable[..., Array]
    packed: bool
    group_size: int
    transposed: bool
    out: Any
    core: Core

    def operands(self, x: Array) -> Any:
        """Return the dtype in which the MXU gets both sides."""
        return jnp.dtype("float32") if self.core.old else x.dtype

    def matrix(self, deep: Any, wide: Any) -> tuple[Any, Any]:
        """Return what belongs to (rows, columns) of what belongs to the contracted side and to the outputs."""
        return (wide, deep) if self.transposed else (deep, wide)


def best_tiles(tokens: int, shape: tuple[int, int], kernel: Kernel, x: Any) -> Tiles:
    """Return the tiles that take the fewest cycles by a rough count and fit the core's fast memory.

    Args:
      tokens: number of tokens.
      shape: (rows, columns) of the matrix.
      kernel: what is computed.
      x: the left operand, for its dtype.
    """
    core = kernel.core
    contracted, outputs = shape[::-1] if kernel.transposed else shape
    given, used, out = x.dtype.itemsize, kernel.operands(x).itemsize, jnp.dtype(kernel.out).itemsize
    codes = 0.5 if kernel.packed else 1.0

    def cycles(size: int, deep: int, wide: int) -> float:
        steps = -(-tokens // size) * -(-outputs // wide) * (contracted // deep)
        loading, storing = size * deep * given + deep * wide * codes, size * wide * out
        moved = loading + storing * deep / contracted
        decoding = deep * wide * core.decoding
        each = max(size * deep * wide / core.macs, moved / core.bandwidth, decoding) + _STEP
        return steps * each + (loading + storing) / core.bandwidth + decoding  # what nothing hides, first and last

    def fits(size: int, deep: int, wide: int) -> bool:
        rows, columns = kernel.matrix(deep, wide)
        held = size * wide * (4 + 2 * out) + size * deep * 2 * given + deep * wide * (2 * codes + used)
        held += size * deep * used if used != given else 0
        held += max(size * deep * given - _COMPILER, 0)  # it lays the tokens out anew
        whole = rows % BLOCK == 0 and contracted % deep == 0 and wide <= outputs
        return whole and deep * wide <= _DECODED and held <= core.vmem

    fewest = -(-tokens // _TOKENS)
    counts = [-(-tokens // (16 * fewest * times)) * 16 for times in (1, 2, 3)]  # more decoding, but larger blocks
    sizes = (1024, 512, 256, 128)
    cuts = [cut for cut in itertools.product(counts, sizes, (2048, *sizes)) if fits(*cut)]
    smallest = (counts[0], *((128, BLOCK) if kernel.transposed else (BLOCK, 128)))
    size, deep, wide = min(cuts, key=lambda cut: (cycles(*cut), cut), default=smallest)
    return Tiles(size, *kernel.matrix(deep, wide))


def multiply(
    x: Float[Array, "tokens k"],
    codes: Array,
    scales: list[Array],
    layer: Array,
    kernel: Kernel,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "tokens n"]:
    """Return x @ w, or x @ w.T, for layer `layer` of stacked matrices; sums are float32.

    Args:
      x: left operand.
      codes: (layers, rows, columns) uint8, half as many rows where packed.
      scales: their leaves, (layers, groups, columns) and perhaps (layers, 1, columns).
      layer: which.
      kernel: what is computed.
      tiles: how it is cut; None: the best by `best_tiles`.
      interpret: run the kernel as plain JAX, to test it without a TPU.
    """
    tokens = x.shape[0]
    rows, columns = codes.shape[1] * (2 if kernel.packed else 1), codes.shape[2]
    tiles = tiles or best_tiles(tokens, (rows, columns), kernel, x)
    x = jnp.pad(x, [(0, -tokens % 16), (0, 0)])
    contracted, outputs = (columns, rows) if kernel.transposed else (rows, columns)
    deep, wide = (tiles.columns, tiles.rows) if kernel.transposed else (tiles.rows, tiles.columns)
    depth, blocks = contracted // deep, -(-outputs // wide)
    share = -(-blocks // kernel.core.count)  # a last core may do a block that is done already
    steps = -(-x.shape[0] // tiles.tokens) * share * depth

    def place(core: Array, step: Array) -> tuple[Array, Array, Array]:
        """Return which block of tokens, of outputs, and of the contracted side."""
        row, rest = _divmod(step, share * depth, steps)
        output, inner = _divmod(rest, depth, share * depth)
        return row, jnp.minimum(core * share + output, blocks - 1), inner

    def multiplied(core: Array, step: Array) -> tuple[Array, Array, Array]:
        return place(core, jnp.maximum(step - 1, 0))

    def decoded(core: Array, step: Array) -> tuple[Array, Array]:
        _, output, inner = place(core, jnp.minimum(step, steps - 1))
        return kernel.matrix(inner, output)

    groups = tiles.rows // kernel.group_size  # of a block; few of them share a block of scales
    height = min(max(_SCALE_ROWS, groups), scales[0].shape[1])

    def scales_at(core: Array, step: Array, layer: Any) -> tuple[Array, Array, Array]:
        row, column = decoded(core, step)
        return layer[0], _divide(row * groups, height, rows), column

    codes_block = (1, tiles.rows // (2 if kernel.packed else 1), tiles.columns)
    specs = [
        pl.BlockSpec((tiles.tokens, deep), lambda *at: multiplied(*at[:2])[::2]),
        pl.BlockSpec(codes_block, lambda *at: (at[2][0], *decoded(*at[:2]))),
        pl.BlockSpec((1, height, tiles.columns), scales_at),
        *[pl.BlockSpec((1, 1, tiles.columns), lambda *at: (at[2][0], 0, decoded(*at[:2])[1])) for _ in scales[1:]],
    ]
    operands = kernel.operands(x)

    def body(_: Any, x: Any, codes: Any, *rest: Any) -> None:
        *scales, out, sums, group_scales, w = rest
        core, step = pl.program_id(0), pl.program_id(1)

        def decode() -> None:
            row, _ = decoded(core, step)
            first = 0 if height == groups else _divmod(row * groups, height, rows)[1]
            group_scales[:height, :] = kernel.group_scales(*[leaf[0] for leaf in scales])
            _decode_block(kernel, codes, group_scales, first, w)

        pl.when(step == 0)(decode)

        @pl.when(step > 0)
        def _() -> None:
            dims = (((1,), (1 if kernel.transposed else 0,)), ((), ()))
            found = jax.lax.dot_general(x[...].astype(operands), w[...], dims, preferred_element_type=jnp.float32)
            found += jnp.where(_divmod(step - 1, depth, steps)[1] == 0, 0.0, sums[...])
            sums[...] = found
            out[...] = found.astype(out.dtype)  # the block leaves the chip when the next one begins
            decode()

    y = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), kernel.out),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(kernel.core.count, steps + 1),
            in_specs=specs,
            out_specs=pl.BlockSpec((tiles.tokens, wide), lambda *at: multiplied(*at[:2])[:2]),
            scratch_shapes=[
                pltpu.VMEM((tiles.tokens, wide), jnp.float32),
                pltpu.VMEM((-(-height // groups) * groups, tiles.columns), jnp.float32),
                pltpu.VMEM((tiles.rows, tiles.columns), operands),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=kernel.core.vmem + _COMPILER,
        ),
        interpret=interpret,
    )(jnp.reshape(layer, 1).astype(jnp.int32), x, codes, *scales)
    return y[:tokens]


def _decode_block(kernel: Kernel, codes: Any, scales: Any, first: Array | int, w: Any) -> None:
    """Write a block's weights to `w`; its groups' scales are the rows of `scales` from `first` on."""
    table = None
    if kernel.packed and not kernel.core.old:
        table = kernel.decode(jax.lax.broadcasted_iota(jnp.int32, (8, 128), 1) & 15)[:1]
    for top in range(0, w.shape[0], BLOCK):
        if kernel.packed:
            pairs = codes[0, top // 2 : (top + BLOCK) // 2, :].astype(jnp.int32)
            halves = [pairs & 15, pairs >> 4]
        else:
            halves = [
                codes[0, top + start : top + start + BLOCK // 2, :].astype(jnp.int32) for start in (0, BLOCK // 2)
            ]
        for half, start in zip(halves, (top, top + BLOCK // 2), strict=True):
            for row in range(0, BLOCK // 2, kernel.group_size):
                group = half[row : row + kernel.group_size]
                values = kernel.decode(group) if table is None else _look_up(table, group)
                scale = scales[pl.ds(first + (start + row) // kernel.group_size, 1), :]
                w[start + row : start + row + kernel.group_size, :] = (values * scale).astype(w.dtype)


def _look_up(table: Array, codes: Array) -> Array:
    """Return table[codes]: one instruction for each 1,024 of them, where a tree of selects takes 35."""
    rows = jnp.broadcast_to(table, (codes.shape[0], 128))
    lanes = [codes[:, start : start + 128] for start in range(0, codes.shape[1], 128)]
    return jnp.concatenate([jnp.take_along_axis(rows, part, axis=1) for part in lanes], axis=1)


def _divide(a: Array, b: int, most: int) -> Array:
    """Return a // b for 0 <= a <= most: by a product and a shift, where a division goes through the vector unit."""
    shift = (b * (most + 1) - 1).bit_length()
    factor = (1 << shift) // b + 1  # above 2^shift / b by less than 1 / (most + 1) of the result's unit
    if factor * most >= 2**31:
        return jax.lax.div(a, jnp.int32(b))
    return jax.lax.shift_right_logical(a * jnp.int32(factor), jnp.int32(shift))


def _divmod(a: Array, b: int, most: int) -> tuple[Array, Array]:
    quotient = _divide(a, b, most)
    return quotient, a - quotient * b

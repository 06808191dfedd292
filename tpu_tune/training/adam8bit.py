"""Adam's moments in 8-bit blocks (Dettmers et al., arXiv:2110.02861), as an optax transformation.

The number format is bitsandbytes' dynamic map, value for value. Each moment is a uint8 code per element and a float32
`absmax` per block. A code is a decade and a linear fraction within it, so it is encoded and decoded by arithmetic: a
table gather, which bitsandbytes uses, is slow on TPU.

Codes have the shape of the leaf and so take its sharding. A block is a run of up to 256 elements along the last axis
where that axis divides into runs of at least 128, so that a block never crosses a shard of the other axes; otherwise
(thin matrices such as LoRA's A) it is 256 elements of the flattened matrix of one layer. Matrices of fewer than 4096
elements stay float32, as bitsandbytes does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 256
MIN_ELEMENTS = 4096
_DECADES = 7  # 10^-6 .. 10^0 of the block's absmax


class BlockMoment(NamedTuple):
    """One moment of one leaf.

    Attributes:
      codes: uint8, the leaf's shape.
      absmax: float32, one per block: the shape of `to_blocks(leaf)` without its last axis.
    """

    codes: jax.Array
    absmax: jax.Array


class Adam8bitState(NamedTuple):
    """Optimizer state: `mu` and `nu` hold, per leaf, a BlockMoment or a float32 array for small leaves."""

    count: jax.Array
    mu: Any
    nu: Any


def _block_size(last: int) -> int | None:
    return next((size for size in range(BLOCK, BLOCK // 2 - 1, -1) if last % size == 0), None)


def to_blocks(x: jax.Array, stacked: bool = False) -> jax.Array:
    """View a leaf as (..., blocks, block size); blocks do not cross layers (axis 0 of a `stacked` leaf)."""
    size = _block_size(x.shape[-1]) if x.ndim else None
    if size is not None:
        return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    flat = x.reshape(x.shape[0], -1) if stacked else x.reshape(1, -1)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK)))
    return flat.reshape(flat.shape[0], -1, BLOCK)


def _from_blocks(blocks: jax.Array, shape: tuple[int, ...], stacked: bool) -> jax.Array:
    if _block_size(shape[-1]) is not None:
        return blocks.reshape(shape)
    lead = shape[0] if stacked else 1
    return blocks.reshape(lead, -1)[:, : math.prod(shape) // lead].reshape(shape)


def _decode_magnitude(index: jax.Array, first: int) -> jax.Array:
    """Value in [0, 1] of map entry `index` >= 0; decade i has first * 2^i entries, entry 0 is zero, the last is one.

    In bitsandbytes' `create_dynamic_map` decade i holds the midpoints of linspace(0.1, 1, first * 2^i + 1) * 10^(i-6).
    """
    position = index.astype(jnp.float32) - 1.0 + first  # decade i starts at first * 2^i
    value = jnp.zeros_like(position)
    for i in range(_DECADES):
        count = first * 2**i
        step = 0.9 / count
        line = 10.0 ** (i - _DECADES + 1) * (0.1 + step * (position - count + 0.5))
        value = jnp.where(position >= count, line, value)
    return jnp.where(position >= first * 2**_DECADES, 1.0, value)


def _encode_magnitude(x: jax.Array, first: int) -> jax.Array:
    """Index of the map entry nearest to `x` in [0, 1] (int32)."""
    index = jnp.zeros(x.shape, jnp.int32)
    previous = 0.0  # largest value below this decade
    for i in range(_DECADES):
        count, scale = first * 2**i, 10.0 ** (i - _DECADES + 1)
        step = 0.9 / count
        # Entries are midpoints of equal intervals, so the nearest one is the interval that x lies in. Between decades
        # the border is halfway between the last entry of one and the first of the next.
        inside = jnp.clip(jnp.floor((x / scale - 0.1) / step).astype(jnp.int32), 0, count - 1)
        border = 0.5 * (previous + scale * (0.1 + 0.5 * step))
        index = jnp.where(x > border, inside + (count - first + 1), index)
        previous = scale * (1.0 - 0.5 * step)
    return jnp.where(x > 0.5 * (previous + 1.0), first * (2**_DECADES - 1) + 1, index)


def quantize_blocks(x: jax.Array, signed: bool, stacked: bool = False) -> BlockMoment:
    """Quantize a float32 leaf to the nearest entries of bitsandbytes' dynamic map, block by block.

    Args:
      x: float32, any shape; nonnegative when not `signed`.
      signed: whether the map has 128 positive values, 127 negative ones and zero; else 255 positive ones and zero.
      stacked: whether axis 0 counts layers.

    Returns:
      The codes (unsigned: the index in the map; signed: 0 to 128 the index of a nonnegative value, above it 128 plus
      that of a negative one) and each block's absmax.
    """
    blocks = to_blocks(x.astype(jnp.float32), stacked)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = jnp.abs(blocks) / jnp.where(absmax > 0, absmax, 1.0)[..., None]
    if signed:
        codes = _encode_magnitude(scaled, 1)
        # Index 128 is the value one. It takes the code that would be minus zero, so minus one does not exist (nor does
        # it in bitsandbytes): the nearest value is that of index 127.
        codes = jnp.where((blocks < 0) & (codes > 0), jnp.minimum(codes, 127) + 128, codes)
    else:
        codes = _encode_magnitude(scaled, 2)
    return BlockMoment(_from_blocks(codes.astype(jnp.uint8), x.shape, stacked), absmax)


def dequantize_blocks(moment: BlockMoment, signed: bool, stacked: bool = False, floor: float = 0.0) -> jax.Array:
    """Decode to float32 in the leaf's shape; magnitudes below `floor` of the block's absmax are raised to it."""
    codes = to_blocks(moment.codes, stacked).astype(jnp.int32)
    if signed:
        value = _decode_magnitude(jnp.where(codes > 128, codes - 128, codes), 1)
        value = jnp.where(codes > 128, -value, value)
    else:
        value = jnp.maximum(_decode_magnitude(codes, 2), floor)
    return _from_blocks(value * moment.absmax[..., None], moment.codes.shape, stacked)


# A second moment below half the smallest entry is stored as zero, and a first moment left beside it would be divided by
# epsilon alone. Decoding it as that half entry bounds the step instead, and errs by less than the rounding did.
_NU_FLOOR = 0.5 * 0.325e-6


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    stacked: Callable[[str], bool] = lambda path: False,
) -> optax.GradientTransformation:
    """Adam's direction with both moments kept in 8 bits; the arithmetic of each update is float32.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the square root, as in torch.
      stacked: says by a leaf's dotted path whether its axis 0 counts layers.

    Returns:
      An optax transformation; about 2.03 bytes of state a parameter.
    """

    def moment(path, leaf, signed):
        is_stacked = stacked(_dotted(path))
        elements = leaf.size // leaf.shape[0] if is_stacked else leaf.size
        zeros = jnp.zeros(leaf.shape, jnp.float32)
        return zeros if elements < MIN_ELEMENTS else quantize_blocks(zeros, signed, is_stacked)

    def init(params):
        with_path = jax.tree_util.tree_map_with_path
        return Adam8bitState(
            jnp.zeros((), jnp.int32),
            with_path(lambda path, leaf: moment(path, leaf, True), params),
            with_path(lambda path, leaf: moment(path, leaf, False), params),
        )

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        correct1 = 1 - b1 ** count.astype(jnp.float32)
        correct2 = 1 - b2 ** count.astype(jnp.float32)

        def one_leaf(path, grad, mu, nu):
            packed, is_stacked = isinstance(mu, BlockMoment), stacked(_dotted(path))
            grad = grad.astype(jnp.float32)
            if packed:
                mu = dequantize_blocks(mu, True, is_stacked)
                nu = dequantize_blocks(nu, False, is_stacked, _NU_FLOOR)
            mu = b1 * mu + (1 - b1) * grad
            nu = b2 * nu + (1 - b2) * jnp.square(grad)
            step = (mu / correct1) / (jnp.sqrt(nu / correct2) + eps)
            if packed:
                mu, nu = quantize_blocks(mu, True, is_stacked), quantize_blocks(nu, False, is_stacked)
            return step, mu, nu

        leaves, treedef = jax.tree_util.tree_flatten_with_path(grads)
        moments = zip(treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu), strict=True)
        results = [one_leaf(path, grad, mu, nu) for (path, grad), (mu, nu) in zip(leaves, moments, strict=True)]
        steps, mus, nus = ([result[k] for result in results] for k in range(3))
        return treedef.unflatten(steps), Adam8bitState(count, treedef.unflatten(mus), treedef.unflatten(nus))

    return optax.GradientTransformation(init, update)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")

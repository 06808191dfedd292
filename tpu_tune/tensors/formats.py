"""Number formats for frozen weights: int8, int4, nf4 and mxfp4 codes, one scale a group of input rows.

A format turns a float32 weight (..., in, out) into codes and a scale for each group, and back. Everything is
elementwise arithmetic: nf4 is decoded by a tree of selects on the code's bits, never by a table gather, which costs
eight times the bytes on a TPU. How codes are packed and scales stored is `quantized.py`'s business.

mxfp4 is the format of gpt-oss' experts (OCP Microscaling Formats 1.0): a code is a number of one sign, two exponent
and one mantissa bits, a scale is a power of two 2^(s - 127) with s in a byte, for 32 rows. Here codes are decoded to
twice the standard's numbers, small integers, and scales to half of its scales: 2^(255 - 127) is no float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# QLoRA (Dettmers et al. 2023, arXiv:2305.14314), Appendix E; values and decision thresholds as bitsandbytes' kernels.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format: `decode(encode(x))` approximates x in [-largest, largest].

    Attributes:
      bits: bits a code takes in storage; 4-bit codes are packed two a byte.
      encode: float32 in [-largest, largest] -> uint8 codes of the same shape.
      decode: uint8 codes -> float32 in [-largest, largest].
      largest: the largest number that a code stands for.
      group_size: number of rows that share a scale, where the format says it; 0 where any number may.
      exponents: whether scales are powers of two, each stored as its exponent in one byte.
      far_end: the number of the lowest code where that lies further out than the highest, else 0. A group's scale then
        has a sign, which puts the group's extreme on that code, whatever the extreme's own sign.
    """

    bits: int
    encode: Callable[[Float[Array, "..."]], UInt8[Array, "..."]]
    decode: Callable[[UInt8[Array, "..."]], Float[Array, "..."]]
    largest: float = 1.0
    group_size: int = 0
    exponents: bool = False
    far_end: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"a code takes 4 or 8 bits, not {self.bits}: nothing else is packed")


# Twice the standard's numbers of codes 0 to 7. What lies in the middle of two goes to the even code.
_FP4_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_ONE = 0x3F800000  # bits of 1.0


def _encode_fp4(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    codes = jnp.where(jnp.signbit(x), jnp.uint8(8), jnp.uint8(0))
    for code, (below, above) in enumerate(itertools.pairwise(_FP4_VALUES)):
        middle = (below + above) / 2
        codes += (jnp.abs(x) >= middle if code % 2 else jnp.abs(x) > middle).astype(jnp.uint8)
    return codes


def _decode_fp4(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    # From 2 on, the code's exponent and mantissa bits are the float32's, moved up and counted from 1.0.
    codes = codes.astype(jnp.int32)
    size = codes & 7
    bits = jnp.where(size < 2, size * _ONE, (size << 22) + _ONE)
    return jax.lax.bitcast_convert_type(bits | ((codes & 8) << 28), jnp.float32)


def fp4_tiny(codes: UInt8[Array, "..."], exponents: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Return mxfp4 weights whose scale is 2^-127 or 2^-126 (an exponent of 0 or 1), exact to the bit.

    Products flush such numbers to zero: they are less than float32's smallest normal one, or nearly. Their bits are
    made from those of the code, which has its last numbers below its smallest exponent as float32 does.
    """
    codes = codes.astype(jnp.int32)
    size = codes & 7
    halved = jnp.where(size < 4, size << 21, (size - 2) << 22)
    bits = jnp.where(exponents == 0, halved, size << 22)
    return jax.lax.bitcast_convert_type(bits | ((codes & 8) << 28), jnp.float32)


def exponents_of(maxima: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Return for each group's absolute maximum the exponent of the smallest scale under which it is a code's number."""
    bits = jax.lax.bitcast_convert_type(maxima / 6, jnp.int32)
    return jnp.clip((bits + 0x7FFFFF) >> 23, 2, 254).astype(jnp.uint8)


def _encode_nf4(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    # The codebook is sorted, so a code is the number of thresholds below x (strictly: ties go to the lower code).
    codes = jnp.zeros(x.shape, jnp.uint8)
    for threshold in NF4_THRESHOLDS:
        codes += (x > threshold).astype(jnp.uint8)
    return codes


def _decode_nf4(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    # The leaves of the tree are chosen among by exclusive or of their bit patterns, not by `where`: its operands would
    # be arrays of constants, which JAX moves out of the scan over layers and XLA then holds whole, one for each value.
    patterns = np.array(NF4_VALUES, np.float32).view(np.int32).tolist()
    lowest = -(codes & 1).astype(jnp.int32)  # all bits set, or none
    level = [
        jax.lax.bitcast_convert_type(even ^ (lowest & (even ^ odd)), jnp.float32)
        for even, odd in zip(patterns[::2], patterns[1::2], strict=True)
    ]
    for bit in range(1, 4):
        is_set = (codes & (1 << bit)) != 0
        level = [jnp.where(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _even(bits: int, far_end: bool) -> Format:
    """Evenly spaced codes -2^(b-1) .. 2^(b-1) - 1, stored with an offset of 2^(b-1); the highest stands for 1.

    Without `far_end` a group's scale is its absolute maximum, and the lowest code is not used.
    """
    largest, offset = 2 ** (bits - 1) - 1, 2 ** (bits - 1)

    def encode(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
        return (jnp.clip(jnp.round(x * largest), -offset, largest) + offset).astype(jnp.uint8)

    def decode(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
        return (codes.astype(jnp.float32) - offset) * jnp.float32(1 / largest)

    return Format(bits, encode, decode, far_end=-offset / largest if far_end else 0.0)


FORMATS: dict[str, Format] = {
    "int8": _even(8, far_end=False),
    "int4": _even(4, far_end=True),
    "nf4": Format(4, _encode_nf4, _decode_nf4),
    "mxfp4": Format(4, _encode_fp4, _decode_fp4, largest=_FP4_VALUES[-1], group_size=32, exponents=True),
}

"""Number formats for frozen weights: int8, int4 and nf4 codes, one scale a group of input rows.

A format turns a float32 weight (..., in, out) into codes and per-group absolute maxima and back. Everything is
elementwise arithmetic: nf4 is decoded by a tree of selects on the code's bits, never by a table gather, which costs
eight times the bytes on a TPU. How codes are packed and scales stored is `quantized.py`'s business.
"""

from __future__ import annotations

import dataclasses
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
    """A number format: `decode(encode(x))` approximates x in [-1, 1].

    Attributes:
      bits: bits a code takes in storage; 4-bit codes are packed two a byte.
      encode: float32 in [-1, 1] -> uint8 codes of the same shape.
      decode: uint8 codes -> float32 in [-1, 1].
    """

    bits: int
    encode: Callable[[Float[Array, "..."]], UInt8[Array, "..."]]
    decode: Callable[[UInt8[Array, "..."]], Float[Array, "..."]]

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"a code takes 4 or 8 bits, not {self.bits}: nothing else is packed")


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


def _symmetric(bits: int) -> Format:
    """Evenly spaced codes -(2^(b-1) - 1) .. 2^(b-1) - 1, stored with an offset of 2^(b-1)."""
    largest, offset = 2 ** (bits - 1) - 1, 2 ** (bits - 1)

    def encode(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
        return (jnp.clip(jnp.round(x * largest), -largest, largest) + offset).astype(jnp.uint8)

    def decode(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
        return (codes.astype(jnp.float32) - offset) * jnp.float32(1 / largest)

    return Format(bits, encode, decode)


FORMATS: dict[str, Format] = {
    "int8": _symmetric(8),
    "int4": _symmetric(4),
    "nf4": Format(4, _encode_nf4, _decode_nf4),
}
